"""vllm.grpc.engine.VllmEngine: what smg drives by default."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from grpc.aio import ServicerContext

from jqserve.engine.request import SamplingParams
from jqserve.errors import RequestError, UnsupportedError
from jqserve.server.compat.adapter import Adapter
from jqserve.server.compat.call import Call, refuse_rank, refuse_undeclared, text_constraint, top_count, unless_zero
from jqserve.server.pb import vllm_engine_pb2 as pb
from jqserve.server.pb import vllm_engine_pb2_grpc
from jqserve.server.status import with_status

SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
REQUEST_FIELDS = {
    6: "kv_transfer_params",
    7: "mm_inputs",
    8: "kv_transfer_params_json",
    10: "media_refs",
    11: "extra_mm_inputs",
}
#: where 0 cannot be meant: theirs -> ours
NUMBERS = {
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "top_k": "top_k",
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "min_tokens": "min_new_tokens",
}
CONSTRAINTS = {"json_schema": "json_schema", "regex": "regex", "grammar": "lark"}


class VllmServicer(Adapter, vllm_engine_pb2_grpc.VllmEngineServicer):
    messages = pb

    async def read(self, request: pb.GenerateRequest) -> Call:
        refuse_undeclared(request, REQUEST_FIELDS)
        refuse_undeclared(request.sampling_params, {})
        refuse_rank(request)
        kind = request.WhichOneof("input")
        if kind is None:
            raise RequestError("input", "is missing; give tokenized or text")
        prompt = list(request.tokenized.input_ids)
        if kind == "text":
            prompt = await self.frontend.encode("text", request.text, add_special_tokens=True)
        sampling = sampling_params(request.sampling_params, self.frontend.defaults)
        return Call(request.request_id, prompt, sampling, request.sampling_params.n or 1, request.stream)

    @with_status
    async def Abort(self, request: pb.AbortRequest, context: ServicerContext) -> pb.AbortResponse:
        for request_id in request.request_ids:
            self.frontend.abort(request_id)
        return pb.AbortResponse()

    @with_status
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: ServicerContext) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(**self.model_fields())

    @with_status
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: ServicerContext
    ) -> pb.GetServerInfoResponse:
        frontend = self.frontend
        return pb.GetServerInfoResponse(
            active_requests=len(frontend.generations),
            last_receive_timestamp=self.last_received,
            uptime_seconds=time.monotonic() - frontend.began,
            server_type="vllm-grpc",  # the protocol's name, which gateways look for
            data_parallel_size=1,
            max_num_seqs=frontend.info.get("max_running_requests") or 0,
            constrained_decoding_start="first_token",
        )


def sampling_params(message: pb.SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """`defaults` (the model's) where nothing is set. Ranges are the engine's to judge."""
    fields = unless_zero(message, NUMBERS)
    if message.HasField("temperature"):
        fields["temperature"] = message.temperature
    if message.HasField("max_tokens"):
        fields["max_new_tokens"] = message.max_tokens
    if message.HasField("seed"):
        fields["seed"] = message.seed
    if message.HasField("logprobs"):
        fields["logprobs"] = top_count("logprobs", message.logprobs)
    if message.HasField("prompt_logprobs"):
        fields["prompt_logprobs"] = top_count("prompt_logprobs", message.prompt_logprobs)
    if message.HasField("truncate_prompt_tokens"):
        raise UnsupportedError("truncate_prompt_tokens: jqserve refuses a prompt that is too long, it never cuts one")
    return dataclasses.replace(defaults, **fields, **shared(message), constraint=text_constraint(message, CONSTRAINTS))


def shared(message: Any) -> dict[str, Any]:
    """Fields of the same name in both protocols."""
    return dict(
        logit_bias=tuple(sorted((int(token), bias) for token, bias in message.logit_bias.items())),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        skip_special_tokens=message.skip_special_tokens,
    )
