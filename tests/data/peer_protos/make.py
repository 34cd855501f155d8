#!/usr/bin/env python
"""Writes peer_protos.json: numbers, names and types of the fields of the protocols that smg speaks.

Usage (in an environment with grpcio-tools):  pip download --no-deps smg-grpc-proto==0.4.28 and unpack it into DIR, then
  python tests/data/peer_protos/make.py DIR
"""

import json
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

WANTED = ("common", "vllm_engine", "sglang_scheduler")


def main(folder: Path) -> None:
    source = folder / "smg_grpc_proto" / "proto"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        arguments = ["protoc", f"-I{source}", f"-I{files('grpc_tools') / '_proto'}", f"--descriptor_set_out={out}"]
        assert protoc.main([*arguments, *(f"{name}.proto" for name in WANTED)]) == 0
        protos = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    facts: dict[str, dict[str, object]] = {}
    for file in protos.file:
        for message in file.message_type:
            fields = {f.number: [f.name, f.type, f.label, f.type_name, f.proto3_optional] for f in message.field}
            facts[f"{file.package}.{message.name}"] = fields
        for service in file.service:
            facts[f"{file.package}.{service.name}"] = {
                m.name: [m.input_type, m.output_type, m.server_streaming] for m in service.method
            }
    target = Path(__file__).with_name("peer_protos.json")
    target.write_text(json.dumps(facts, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
