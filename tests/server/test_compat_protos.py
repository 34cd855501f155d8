"""Our declarations of the gateways' protocols against the protocols themselves (smg-grpc-proto 0.4.28, as facts)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from jqserve.server.compat import sglang, vllm
from jqserve.server.pb import common_pb2, sglang_scheduler_pb2, vllm_engine_pb2

FACTS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "peer_protos" / "peer_protos.json").read_text()
)
FILES = (common_pb2.DESCRIPTOR, vllm_engine_pb2.DESCRIPTOR, sglang_scheduler_pb2.DESCRIPTOR)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.package)
def test_every_field_and_rpc_is_the_protocols(file: FileDescriptor) -> None:
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    for message in proto.message_type:
        theirs = FACTS[f"{file.package}.{message.name}"]
        for field in message.field:
            ours = [field.name, field.type, field.label, field.type_name, field.proto3_optional]
            assert ours == theirs[str(field.number)], f"{message.name}.{field.name}"
    for service in proto.service:
        theirs = FACTS[f"{file.package}.{service.name}"]
        for method in service.method:
            assert [method.input_type, method.output_type, method.server_streaming] == theirs[method.name], method.name


@pytest.mark.parametrize(
    ("message", "declared", "named"),
    [
        ("vllm.grpc.engine.GenerateRequest", vllm_engine_pb2.GenerateRequest, vllm.REQUEST_FIELDS),
        ("vllm.grpc.engine.SamplingParams", vllm_engine_pb2.SamplingParams, {}),
        ("sglang.grpc.scheduler.GenerateRequest", sglang_scheduler_pb2.GenerateRequest, sglang.REQUEST_FIELDS),
        ("sglang.grpc.scheduler.SamplingParams", sglang_scheduler_pb2.SamplingParams, sglang.SAMPLING_FIELDS),
    ],
)
def test_every_field_of_a_request_is_honoured_or_refused_by_name(
    message: str, declared: Any, named: dict[int, str]
) -> None:
    numbers = {field.number for field in declared.DESCRIPTOR.fields}
    for number, (name, *_) in FACTS[message].items():
        assert (int(number) in numbers) != (named.get(int(number)) == name), f"{name} ({number})"
