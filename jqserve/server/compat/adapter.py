"""What the two compatible services have in common: token ids in, chunks and completes out, health, loads, tokenizer.

As gateways expect it (measured with smg): with `stream`, chunks carry what is new and then one complete per index;
without, completes alone, in the order of their indices: smg numbers the choices of a chat as they come. The text is the
gateway's business, so stop strings are matched here only to free the slot.
"""

from __future__ import annotations

import datetime
import time
from typing import Any

from google.protobuf.message import Message
from grpc.aio import ServicerContext

from jqserve.engine.request import FinishReason, TokenLogprobs
from jqserve.errors import PreconditionError, RequestError, UnsupportedError
from jqserve.server.admin import Admin
from jqserve.server.compat.call import Call, default_sampling, refuse_rank, refuse_undeclared
from jqserve.server.frontend import Frontend, State
from jqserve.server.generation import Generation
from jqserve.server.info import versions
from jqserve.server.pb import common_pb2
from jqserve.server.sequence import Delta, Finished
from jqserve.server.status import with_status
from jqserve.server.unread import write_or_give_up

PIECE = 64 * 1024  # bytes of a GetTokenizerChunk
#: of StartProfile: the trace has everything, from now to StopProfile, in --profile-dir
PROFILE_FIELDS = {
    1: "output_dir",
    2: "start_step",
    3: "num_steps",
    4: "activities",
    5: "with_stack",
    6: "record_shapes",
    7: "profile_by_stage",
}
REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}


class Adapter:
    """Base of the servicers. `messages`: the generated module; both have messages of the same names."""

    messages: Any

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.admin = Admin(frontend)
        self.last_received = 0.0

    async def read(self, request: Any) -> Call:
        """The request in plain types. Raises `RequestError`, `UnsupportedError` for what is not honoured."""
        raise NotImplementedError

    def envelope(self, request_id: str) -> dict[str, str]:
        """Fields of every GenerateResponse beside the one that matters."""
        return {}

    @with_status
    async def Generate(self, request: Any, context: ServicerContext) -> None:
        try:
            answer = self._generate(request, context)
            del request  # what `_generate` lets go is not held here
            await answer
        except UnsupportedError as error:
            # Gateways make 500 of UNIMPLEMENTED and count it against the worker; for the caller it is a bad request.
            raise RequestError("request", str(error)) from error

    async def _generate(self, request: Any, context: ServicerContext) -> None:
        frontend = self.frontend
        frontend.need_room(request.sampling_params.n or 1)
        self.last_received = time.time()
        call = await self.read(request)
        del request
        generation = frontend.submit(
            call.prompt, call.sampling, n=call.n, request_id=call.request_id, text=False, pace=call.pace
        )
        with frontend.serving(generation, context) as serving:
            answers, early, due = [_Answer() for _ in range(call.n)], dict[int, Message](), 0
            async for item in generation:
                answer = answers[item.index]
                if isinstance(item, Delta):
                    answer.add(item)
                    if call.stream and item.token_ids:
                        await serving.write(self._chunk(call, generation, item, answer))
                else:
                    serving.finished(item)
                    early[item.index] = self._complete(call, generation, item, answer)
                    while (index := item.index if call.stream else due) in early:
                        await serving.write(early.pop(index))
                        due += 1

    def _chunk(self, call: Call, generation: Generation, item: Delta, answer: _Answer) -> Message:
        first = answer.tokens == len(item.token_ids)
        chunk = self.messages.GenerateStreamChunk(
            token_ids=item.token_ids,
            prompt_tokens=len(call.prompt),
            completion_tokens=answer.tokens,
            cached_tokens=generation.sequences[item.index].cached_tokens,
            output_logprobs=self._logprobs(call, item.token_ids, item.logprobs),
            input_logprobs=self._prompt_logprobs(call, generation, item.index) if first else None,
            index=item.index,
        )
        response: Message = self.messages.GenerateResponse(chunk=chunk, **self.envelope(generation.request_id))
        return response

    def _complete(self, call: Call, generation: Generation, item: Finished, answer: _Answer) -> Message:
        complete = self.messages.GenerateComplete(
            output_ids=answer.ids,
            finish_reason=REASONS[item.reason],
            prompt_tokens=len(call.prompt),
            completion_tokens=item.completion_tokens,
            cached_tokens=generation.sequences[item.index].cached_tokens,
            output_logprobs=self._logprobs(call, tuple(answer.ids), tuple(answer.logprobs)),
            input_logprobs=self._prompt_logprobs(call, generation, item.index),
            index=item.index,
        )
        if item.matched_stop is not None:
            complete.matched_stop_str = item.matched_stop
        elif item.matched_token is not None:
            complete.matched_token_id = item.matched_token
        response: Message = self.messages.GenerateResponse(complete=complete, **self.envelope(generation.request_id))
        return response

    def _logprobs(self, call: Call, ids: tuple[int, ...], entries: tuple[TokenLogprobs, ...]) -> Message | None:
        if call.sampling.logprobs is None:
            return None
        message: Message = self.messages.OutputLogProbs(
            token_logprobs=[entry.token for entry in entries],
            token_ids=ids,
            top_logprobs=self._tops(entries) if call.sampling.logprobs else (),
        )
        return message

    def _prompt_logprobs(self, call: Call, generation: Generation, index: int) -> Message | None:
        if call.sampling.prompt_logprobs is None or index:
            return None
        value, entries = self.messages.InputTokenLogProb, generation.sequences[0].prompt_logprobs
        tops = [self.messages.TopLogProbs(), *self._tops(entries)] if call.sampling.prompt_logprobs else ()
        message: Message = self.messages.InputLogProbs(
            token_logprobs=[value(), *(value(value=entry.token) for entry in entries)],
            token_ids=call.prompt[call.sampling.prompt_from - 1 :],
            top_logprobs=tops,
        )
        return message

    def _tops(self, entries: tuple[TokenLogprobs, ...]) -> list[Message]:
        return [self.messages.TopLogProbs(values=entry.top, token_ids=entry.top_ids) for entry in entries]

    @with_status
    async def HealthCheck(self, request: Any, context: ServicerContext) -> Any:
        """UNAVAILABLE while starting: smg registers a worker that answers at all, and would register one that cannot
        say yet which model it serves as model "unknown"."""
        frontend = self.frontend
        if frontend.state is State.STARTING:
            frontend.need_ready()
        return self.messages.HealthCheckResponse(healthy=frontend.is_ready, message=frontend.status_text)

    def model_fields(self) -> dict[str, Any]:
        """GetModelInfo. No tokenizer_path: gateways elsewhere cannot read it, and ask GetTokenizer instead."""
        frontend = self.frontend
        frontend.need_ready()
        info = frontend.info
        context = info.get("context_length") or 0
        model = info.get("model") or {}
        return dict(
            model_path=frontend.config.model_path,
            is_generation=True,
            served_model_name=frontend.config.name,
            max_context_length=context,
            max_req_input_len=max(0, context - 1),
            vocab_size=info.get("vocab_size") or 0,
            model_type=info.get("model_type") or "",
            architectures=[info["architecture"]] if info.get("architecture") else [],
            eos_token_ids=info.get("eos_token_ids") or (),
            pad_token_id=model.get("pad_token_id") or 0,
            bos_token_id=model.get("bos_token_id") or 0,
            default_sampling_params_json=default_sampling(frontend.defaults),
        )

    def load_message(self) -> Any:
        """GetLoads: one rank."""
        frontend, stats = self.frontend, self.frontend.stats
        kv = frontend.info.get("kv") or {}
        page = kv.get("page_size") or 0
        slots = frontend.info.get("max_running_requests") or 0
        load = self.messages.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting,
            num_total_reqs=stats.running + stats.waiting,
            num_used_tokens=stats.pages_used * page,
            max_total_num_tokens=stats.pages_total * page,
            token_usage=stats.pages_used / stats.pages_total if stats.pages_total else 0.0,
            gen_throughput=frontend.throughput,
            cache_hit_rate=frontend.cache_hit_rate,
            utilization=stats.running / slots if slots else 0.0,
            max_running_requests=slots,
        )
        now = datetime.datetime.now(datetime.UTC).isoformat()
        version = versions().get("jqserve", "")
        return self.messages.GetLoadsResponse(timestamp=now, version=version, dp_rank_count=1, loads=[load])

    @with_status
    async def GetLoads(self, request: Any, context: ServicerContext) -> Any:
        refuse_rank(request, "dp_rank")
        return self.load_message()

    @with_status
    async def GetTokenizer(self, request: Any, context: ServicerContext) -> None:
        data, digest = await self.frontend.tokenizer_bundle()
        for at in range(0, len(data), PIECE):
            last = at + PIECE >= len(data)
            piece = common_pb2.GetTokenizerChunk(data=data[at : at + PIECE], sha256=digest if last else "")
            await write_or_give_up(context, piece, self.frontend.config.unread_seconds)

    @with_status
    async def FlushCache(self, request: common_pb2.FlushCacheRequest, context: ServicerContext) -> Any:
        """As SGLang: only when nothing runs, which `timeout_s` waits for; the answer tells what could not be done."""
        try:
            pages = await self.admin.flush_cache_when_idle(request.timeout_s)
        except PreconditionError as error:
            return common_pb2.FlushCacheResponse(success=False, message=str(error))
        return common_pb2.FlushCacheResponse(success=True, message=f"{pages} pages were given back")

    @with_status
    async def StartProfile(self, request: common_pb2.StartProfileRequest, context: ServicerContext) -> Any:
        refuse_undeclared(request, PROFILE_FIELDS)
        return common_pb2.ProfileResponse(success=True, message=await self.admin.start_profile())

    @with_status
    async def StopProfile(self, request: common_pb2.StopProfileRequest, context: ServicerContext) -> Any:
        return common_pb2.ProfileResponse(success=True, message=await self.admin.stop_profile())


class _Answer:
    """What one index has given so far: a complete repeats all of it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def add(self, delta: Delta) -> None:
        self.ids += delta.token_ids
        self.logprobs += delta.logprobs
