"""The native service, jqserve.v1.Inference, over the front end's core."""

from __future__ import annotations

import dataclasses

from grpc.aio import ServicerContext

from jqserve.engine.request import FinishReason, TokenLogprobs
from jqserve.errors import JqserveError, RequestError
from jqserve.server import info, requests
from jqserve.server.frontend import LONG_TEXT, Frontend
from jqserve.server.pace import FLUSH_SECONDS, FLUSH_TOKENS, Pace
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc
from jqserve.server.score import first, score
from jqserve.server.sequence import Delta, Finished
from jqserve.server.serving import Serving
from jqserve.server.status import with_status

REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


class InferenceServicer(jqserve_pb2_grpc.InferenceServicer):
    """Protobuf in and out; everything else is `Frontend`'s."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    @with_status
    async def Generate(self, request: pb.GenerateRequest, context: ServicerContext) -> None:
        frontend = self.frontend
        n = request.sampling.n if request.sampling.HasField("n") else 1
        frontend.need_room(n)
        requests.check(request)
        frontend.check_model(request.model)
        sampling = requests.sampling_params(request.sampling, frontend.defaults)
        if (constraint := requests.constraint(request)) is not None:
            sampling = dataclasses.replace(sampling, constraint=constraint)
        output = request.output
        generation = frontend.submit(
            await self._prompt(request),
            sampling,
            n=n,
            request_id=request.request_id,
            text=output != pb.OUTPUT_TOKEN_IDS,
            pace=pace(request),
            priority=request.priority,
        )
        del request  # its text may be larger than all that follows from it
        with frontend.serving(generation, context) as serving:
            await self._stream(output, serving)

    async def _stream(self, output: int, serving: Serving) -> None:
        """Writes the events."""
        started, generation = False, serving.generation
        want_text, want_ids = output != pb.OUTPUT_TOKEN_IDS, output != pb.OUTPUT_TEXT
        async for item in generation:
            if not started:
                started = True
                begun = pb.Started(
                    request_id=generation.request_id,
                    prompt_tokens=generation.prompt_tokens,
                    cached_tokens=generation.sequences[0].cached_tokens,
                )
                await serving.write(pb.GenerateResponse(started=begun))
            if isinstance(item, Delta):
                delta = pb.Delta(
                    index=item.index,
                    text=item.text if want_text else "",
                    token_ids=item.token_ids if want_ids else (),
                    logprobs=map_logprobs(item.token_ids, item.logprobs),
                )
                if delta.text or delta.token_ids or delta.logprobs:
                    await serving.write(pb.GenerateResponse(delta=delta))
            else:
                serving.finished(item)
                cached = generation.sequences[item.index].cached_tokens
                await serving.write(pb.GenerateResponse(finished=finished(item, generation.prompt_tokens, cached)))

    async def _prompt(self, request: pb.GenerateRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            return list(request.token_ids.ids)
        if kind == "text":
            return await self.frontend.encode("text", request.text, add_special_tokens=True)
        if kind == "chat":
            return await self.frontend.encode("chat", self._render(request.chat), add_special_tokens=False)
        raise RequestError("prompt", "is missing; give text, token_ids or chat")

    def _render(self, chat: pb.Chat) -> str:
        self.frontend.check_size("chat", chat.ByteSize())
        return requests.render_chat(self.frontend.need_tokenizer("chat").need_chat(), chat)

    @with_status
    async def Abort(self, request: pb.AbortRequest, context: ServicerContext) -> pb.AbortResponse:
        requests.refuse_unknown_fields(request, "AbortRequest")
        return pb.AbortResponse(found=self.frontend.abort(request.request_id))

    @with_status
    async def Tokenize(self, request: pb.TokenizeRequest, context: ServicerContext) -> pb.TokenizeResponse:
        requests.refuse_unknown_fields(request, "TokenizeRequest")
        kind = request.WhichOneof("input")
        if kind is None:
            raise RequestError("input", "is missing; give text or chat")
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        text = request.text if kind == "text" else self._render(request.chat)
        ids = await self.frontend.encode(kind, text, add_special_tokens=special and kind == "text")
        return pb.TokenizeResponse(token_ids=ids, text=text)

    @with_status
    async def Detokenize(self, request: pb.DetokenizeRequest, context: ServicerContext) -> pb.DetokenizeResponse:
        requests.refuse_unknown_fields(request, "DetokenizeRequest")
        tokenizer = self.frontend.need_tokenizer("token_ids")
        ids = list(request.token_ids)
        limit = max(self.frontend.info.get("vocab_size") or 0, tokenizer.size)
        if ids and max(ids) >= limit:
            raise RequestError("token_ids", f"holds {max(ids)}; the vocabulary has {limit} tokens")
        if len(ids) <= LONG_TEXT:
            text = tokenizer.decode(ids, request.skip_special_tokens)
        else:
            text = await self.frontend.on_thread(tokenizer.decode, ids, request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text)

    @with_status
    async def Score(self, request: pb.ScoreRequest, context: ServicerContext) -> pb.ScoreResponse:
        try:
            return await score(self.frontend, request, context)
        except* JqserveError as errors:
            raise first(errors) from None

    @with_status
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: ServicerContext) -> pb.GetModelInfoResponse:
        return info.model_info(self.frontend)

    @with_status
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: ServicerContext
    ) -> pb.GetServerInfoResponse:
        return info.server_info(self.frontend)


def pace(request: pb.GenerateRequest) -> Pace | None:
    """What the request asks for; None: nothing."""
    tokens = request.flush_tokens if request.HasField("flush_tokens") else FLUSH_TOKENS
    if tokens < 1:
        raise RequestError("flush_tokens", "is 0; expected 1 or more")
    if not (request.HasField("flush_tokens") or request.HasField("flush_ms")):
        return None
    return Pace(tokens, request.flush_ms / 1000 if request.HasField("flush_ms") else FLUSH_SECONDS, fixed=True)


def map_logprobs(ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=token,
            logprob=entry.token,
            top=[pb.TopLogprob(token_id=t, logprob=p) for t, p in zip(entry.top_ids, entry.top)],
        )
        for token, entry in zip(ids, logprobs)
    ]


def finished(item: Finished, prompt_tokens: int, cached_tokens: int) -> pb.Finished:
    message = pb.Finished(
        index=item.index,
        reason=REASONS[item.reason],
        usage=pb.Usage(
            prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, completion_tokens=item.completion_tokens
        ),
        timings=pb.Timings(first_token=item.first_token_seconds, total=item.total_seconds),
        seed=item.seed,
    )
    if item.matched_stop is not None:
        message.stop = item.matched_stop
    elif item.matched_token is not None:
        message.token_id = item.matched_token
    return message
