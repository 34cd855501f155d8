"""sglang.grpc.scheduler.SglangScheduler: for gateways that know only this one (--grpc-compat sglang).

Prefer the other one. This protocol has no seed, so the server draws one (--random-seed makes them reproducible); and
smg 1.13.0 sends no stop strings over it: it cuts the text itself, while the worker computes on to the end and the usage
counts that, too (a string of one token it does send, as its id). Neither fault can be seen from here. What it has over
the other: smg's /generate asks for a prompt's logprobs. tests/gateway/test_demo.py holds all of this.
"""

from __future__ import annotations

import dataclasses
import time

from google.protobuf import json_format, struct_pb2
from grpc.aio import ServicerContext

from jqserve.engine.request import SamplingParams
from jqserve.errors import RequestError, UnsupportedError
from jqserve.server.compat.adapter import Adapter
from jqserve.server.compat.call import Call, refuse_rank, refuse_undeclared, text_constraint, top_count, unless_zero
from jqserve.server.compat.vllm import shared
from jqserve.server.info import versions
from jqserve.server.pace import Pace
from jqserve.server.pb import sglang_scheduler_pb2 as pb
from jqserve.server.pb import sglang_scheduler_pb2_grpc
from jqserve.server.status import with_status

SERVICE = pb.DESCRIPTOR.services_by_name["SglangScheduler"].full_name
REQUEST_FIELDS = {
    3: "mm_inputs",
    8: "token_ids_logprob",
    9: "return_hidden_states",
    10: "disaggregated_params",
    11: "custom_logit_processor",
    14: "input_embeds",
    15: "lora_id",
}
SAMPLING_FIELDS = {23: "custom_params"}
NUMBERS = {
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "min_new_tokens": "min_new_tokens",
}
STREAM_SECONDS = 10.0  # that a stream_interval may take to fill; SGLang waits for ever
CONSTRAINTS = {"json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "lark"}


class SglangServicer(Adapter, sglang_scheduler_pb2_grpc.SglangSchedulerServicer):
    messages = pb

    def envelope(self, request_id: str) -> dict[str, str]:
        return {"request_id": request_id}

    async def read(self, request: pb.GenerateRequest) -> Call:
        refuse_undeclared(request, REQUEST_FIELDS)
        refuse_undeclared(request.sampling_params, SAMPLING_FIELDS)
        refuse_rank(request)
        sampling = sampling_params(request.sampling_params, self.frontend.defaults)
        if request.require_reasoning and sampling.constraint is not None:
            raise UnsupportedError("require_reasoning: a constraint holds from the first token on, not after a thought")
        prompt = list(request.tokenized.input_ids)
        if request.return_logprob:
            tops = top_count("top_logprobs_num", request.top_logprobs_num)
            sampling = dataclasses.replace(sampling, logprobs=tops)
            if (start := request.logprob_start_len) != -1:
                if not 0 <= start < max(1, len(prompt)):
                    raise RequestError(
                        "logprob_start_len", f"is {start}; the prompt has {len(prompt)} tokens (-1: none of them)"
                    )
                # As SGLang: of the tokens from `start` on, of which the first one has none.
                sampling = dataclasses.replace(sampling, prompt_logprobs=tops, prompt_from=start + 1)
        n, pace = request.sampling_params.n or 1, stream_pace(request.sampling_params)
        return Call(request.request_id, prompt, sampling, n, request.stream, pace)

    @with_status
    async def Abort(self, request: pb.AbortRequest, context: ServicerContext) -> pb.AbortResponse:
        found = self.frontend.abort(request.request_id)
        return pb.AbortResponse(success=found, message="" if found else "no running request has this id")

    @with_status
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: ServicerContext) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(**self.model_fields())

    @with_status
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: ServicerContext
    ) -> pb.GetServerInfoResponse:
        frontend = self.frontend
        arguments = {
            "tp_size": 1,
            "max_running_requests": frontend.info.get("max_running_requests") or 0,
            "context_length": frontend.info.get("context_length") or 0,
        }
        return pb.GetServerInfoResponse(
            server_args=json_format.ParseDict(arguments, struct_pb2.Struct()),
            active_requests=len(frontend.generations),
            last_receive_timestamp=self.last_received,
            uptime_seconds=time.monotonic() - frontend.began,
            sglang_version=f"jqserve {versions().get('jqserve', '')}",
            server_type="grpc",
            max_total_num_tokens=(frontend.info.get("kv") or {}).get("tokens") or 0,
        )


def stream_pace(message: pb.SamplingParams) -> Pace | None:
    """None: the server's."""
    if not message.HasField("stream_interval"):
        return None
    if message.stream_interval < 1:
        raise RequestError("stream_interval", f"is {message.stream_interval}; expected 1 token or more")
    return Pace(message.stream_interval, STREAM_SECONDS, fixed=True)


def sampling_params(message: pb.SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """Senders write every default out, so 0 is meant (temperature), except where it would make no sense."""
    fields = unless_zero(message, NUMBERS)
    fields["temperature"] = message.temperature
    if message.top_k:
        fields["top_k"] = max(0, message.top_k)  # -1 is off
    if message.HasField("max_new_tokens"):
        fields["max_new_tokens"] = message.max_new_tokens
    for token in message.logit_bias:
        if not token.isdecimal():
            raise RequestError("logit_bias", f"{token[:20]!r} is not a token id")
    return dataclasses.replace(defaults, **fields, **shared(message), constraint=text_constraint(message, CONSTRAINTS))
