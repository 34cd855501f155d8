"""The two gateway protocols over the wire, with the echoing engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import threading
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jqserve.engine.request import SamplingParams, TokenLogprobs
from jqserve.server.compat import sglang, vllm
from jqserve.server.config import ServerConfig
from jqserve.server.pb import common_pb2, sglang_scheduler_pb2_grpc, vllm_engine_pb2_grpc
from jqserve.server.pb import sglang_scheduler_pb2 as sgl
from jqserve.server.pb import vllm_engine_pb2 as vll
from tests.server.fake_engine import EOS, SLOW, STUCK
from tests.server.running_server import DEMO, Running, running_server

CONFIG = ServerConfig(str(DEMO), port=0, served_model_name="echo")
IDS = [656, 904, 1903]


@dataclasses.dataclass
class Dialect:
    """One of the protocols, and how to say the same things in it."""

    name: str
    pb: Any
    service: str
    stub: Any
    running: Running

    def request(self, ids: list[int], limit: int, *, stream: bool = True, **sampling: Any) -> Any:
        names = {"max_tokens": limit} if self.name == "vllm" else {"max_new_tokens": limit, "temperature": 1.0}
        logprobs = sampling.pop("logprobs", None)
        request = self.pb.GenerateRequest(
            request_id=sampling.pop("request_id", ""),
            tokenized=self.pb.TokenizedInput(input_ids=ids),
            sampling_params=self.pb.SamplingParams(**names, **sampling),
            stream=stream,
        )
        if logprobs is not None:
            if self.name == "vllm":
                request.sampling_params.logprobs = logprobs
            else:
                request.return_logprob, request.top_logprobs_num, request.logprob_start_len = True, logprobs, -1
        return request


@contextlib.contextmanager
def serving(name: str, **settings: Any) -> Iterator[Dialect]:
    with (
        running_server(dataclasses.replace(CONFIG, grpc_compat=name, **settings)) as (running, _),
        grpc.insecure_channel(running.target) as channel,
    ):
        if name == "vllm":
            yield Dialect(name, vll, vllm.SERVICE, vllm_engine_pb2_grpc.VllmEngineStub(channel), running)
        else:
            yield Dialect(name, sgl, sglang.SERVICE, sglang_scheduler_pb2_grpc.SglangSchedulerStub(channel), running)


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def dialect(request: pytest.FixtureRequest) -> Iterator[Dialect]:
    with serving(request.param) as dialect:
        yield dialect


def test_a_stream_has_chunks_of_what_is_new_and_one_complete(dialect: Dialect) -> None:
    answers = list(dialect.stub.Generate(dialect.request(IDS, 9)))
    chunks = [answer.chunk for answer in answers[:-1]]
    assert [token for chunk in chunks for token in chunk.token_ids] == IDS * 3
    assert [chunk.completion_tokens for chunk in chunks][-1] == 9
    assert all(chunk.prompt_tokens == 3 and chunk.index == 0 for chunk in chunks)
    complete = answers[-1].complete
    assert (list(complete.output_ids), complete.finish_reason) == (IDS * 3, "length")
    assert (complete.prompt_tokens, complete.completion_tokens) == (3, 9)


def test_without_stream_there_is_only_the_complete(dialect: Dialect) -> None:
    (answer,) = dialect.stub.Generate(dialect.request([*IDS, EOS], 9, stream=False))
    complete = answer.complete
    assert list(complete.output_ids) == [*IDS, EOS] and complete.finish_reason == "stop"
    assert complete.matched_token_id == EOS and complete.WhichOneof("matched_stop") == "matched_token_id"


def test_n_is_told_apart_by_index(dialect: Dialect) -> None:
    answers = [a.complete for a in dialect.stub.Generate(dialect.request(IDS, 4, stream=False, n=3))]
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert all(list(answer.output_ids) == (IDS * 2)[:4] for answer in answers)
    assert len(list(dialect.stub.Generate(dialect.request(IDS, 4, stream=False)))) == 1  # n = 0 is not set


def test_completes_come_in_the_order_of_their_indices(dialect: Dialect) -> None:
    """smg numbers the choices of an unstreamed chat as they come; the first copy is the slow one here."""
    seed = {"seed": SLOW} if dialect.name == "vllm" else {}  # the other protocol has none
    answers = [a.complete for a in dialect.stub.Generate(dialect.request(IDS, 20, stream=False, n=3, **seed))]
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert [answer.completion_tokens for answer in answers] == [20, 20, 20]


def test_stop_strings_end_the_sequence_in_the_engine(dialect: Dialect) -> None:
    (answer,) = dialect.stub.Generate(dialect.request(IDS, 400, stream=False, stop=["e tw"]))
    complete = answer.complete
    assert (complete.finish_reason, complete.matched_stop_str) == ("stop", "e tw")
    assert list(complete.output_ids) == IDS[:2]


def test_logprobs(dialect: Dialect) -> None:
    answers = list(dialect.stub.Generate(dialect.request(IDS, 5, logprobs=2)))
    streamed = [value for answer in answers[:-1] for value in answer.chunk.output_logprobs.token_logprobs]
    whole = answers[-1].complete.output_logprobs
    assert streamed == list(whole.token_logprobs) == [-0.5] * 5
    assert list(whole.token_ids) == (IDS * 2)[:5]
    assert [list(top.token_ids) for top in whole.top_logprobs] == [[0, 1]] * 5


def test_defaults_of_the_model_where_nothing_is_set(dialect: Dialect) -> None:
    info = dialect.stub.GetModelInfo(dialect.pb.GetModelInfoRequest())
    assert info.default_sampling_params_json == '{"temperature": 0.5, "repetition_penalty": 1.25}'


def refused(dialect: Dialect, request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(dialect.stub.Generate(request))
    return caught.value.code().name, caught.value.details()


def test_what_is_not_honoured_is_refused(dialect: Dialect) -> None:
    code, text = refused(dialect, dialect.request(IDS, 4, json_schema="{}"))
    assert code == "INVALID_ARGUMENT" and "grammar" in text  # and not UNIMPLEMENTED, which gateways take for a fault
    code, text = refused(dialect, dialect.request(IDS, 4, structural_tag="{}"))
    assert code == "INVALID_ARGUMENT" and "structural_tag" in text
    known = {"vllm": "json_schema, regex, grammar, json_object, choice", "sglang": "regex, json_schema, ebnf_grammar"}
    assert text.endswith(f"supported: {known[dialect.name]}")
    code, text = refused(dialect, dialect.request([], 4))
    assert code == "INVALID_ARGUMENT" and text.startswith("prompt")
    request = dialect.request(IDS, 4)
    request.data_parallel_rank = 3
    assert refused(dialect, request)[0] == "INVALID_ARGUMENT"
    number = 7 if dialect.name == "vllm" else 3  # mm_inputs, an empty message
    request = dialect.request(IDS, 4).SerializeToString() + bytes([number << 3 | 2, 0])
    code, text = refused(dialect, dialect.pb.GenerateRequest.FromString(request))
    assert code == "INVALID_ARGUMENT" and "mm_inputs" in text


def test_vllm_takes_seeds_and_refuses_truncation() -> None:
    with serving("vllm") as dialect:
        request = dialect.request(IDS, 4, seed=STUCK)
        with pytest.raises(grpc.RpcError):
            list(dialect.stub.Generate(request, timeout=0.2))  # the engine knows this seed
        code, text = refused(dialect, dialect.request(IDS, 4, truncate_prompt_tokens=2))
        assert code == "INVALID_ARGUMENT" and "truncate_prompt_tokens" in text
        assert refused(dialect, dialect.request(IDS, 4, logprobs=-1))[0] == "INVALID_ARGUMENT"


def test_abort_takes_unknown_ids_and_ends_known_ones(dialect: Dialect) -> None:
    sampling = {"seed": SLOW} if dialect.name == "vllm" else {}
    request = dialect.request(IDS, 500, request_id="mine", **sampling)
    call = dialect.stub.Generate(request)
    next(call)
    ids = {"request_ids": ["nobody", "mine"]} if dialect.name == "vllm" else {"request_id": "mine"}
    dialect.stub.Abort(dialect.pb.AbortRequest(**ids))
    last = list(call)[-1].complete
    assert last.finish_reason in ("abort", "length")  # the echo may have been faster
    assert dialect.name != "vllm" or last.finish_reason == "abort"
    dialect.stub.Abort(dialect.pb.AbortRequest(**ids))


def test_health_infos_and_loads(dialect: Dialect) -> None:
    stub, pb = dialect.stub, dialect.pb
    health = stub.HealthCheck(pb.HealthCheckRequest())
    assert health.healthy and health.message == "ready"
    model = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.served_model_name, model.vocab_size, model.max_context_length) == ("echo", 4096, 512)
    assert model.is_generation and list(model.eos_token_ids) == [EOS] and model.max_req_input_len == 511
    server = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert server.uptime_seconds > 0 and not server.is_paused
    (load,) = stub.GetLoads(pb.GetLoadsRequest(include=["core"])).loads
    assert load.max_running_requests == 64 and load.num_running_reqs == 0
    with grpc.insecure_channel(dialect.running.target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=dialect.service))
        assert check.status == health_pb2.HealthCheckResponse.SERVING


def test_the_tokenizer_comes_as_a_zip_with_its_digest_at_the_end(dialect: Dialect) -> None:
    chunks = list(dialect.stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(chunk.data for chunk in chunks)
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert hashlib.sha256(data).hexdigest() == chunks[-1].sha256
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {"tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"} <= set(
            archive.namelist()
        )
        assert archive.read("tokenizer.json") == Path(DEMO / "tokenizer.json").read_bytes()


def test_operations_need_admin(dialect: Dialect) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        dialect.stub.FlushCache(common_pb2.FlushCacheRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED and "--admin" in caught.value.details()


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_cache_is_flushed_once_nothing_runs(name: str) -> None:
    with serving(name, admin=True, engine={"token_seconds": 0.02}) as dialect:

        def flush(seconds: float) -> Any:
            return dialect.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=seconds), timeout=20)

        assert flush(0).success
        running = dialect.stub.Generate(dialect.request([5], 400))
        next(running)
        refused = flush(0.05)
        assert not refused.success and "still run: 1" in refused.message
        threading.Timer(0.3, running.cancel).start()
        flushed = flush(10)
        assert flushed.success and flushed.message.startswith("7 pages")
        for bad in (-1, float("nan"), float("inf")):
            with pytest.raises(grpc.RpcError, match="timeout_s") as caught:
                flush(bad)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_profiles_and_loads_are_not_asked_for_what_they_are_not(dialect: Dialect) -> None:
    trace = common_pb2.StartProfileRequest.FromString(b"\x0a\x04/tmp")  # output_dir
    for call, says in (
        (lambda: dialect.stub.StartProfile(trace), "output_dir"),
        (lambda: dialect.stub.GetLoads(dialect.pb.GetLoadsRequest(dp_rank=1)), "dp_rank: is 1"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert says in caught.value.details()


def test_sglang_paces_a_stream_and_refuses_what_it_cannot_do() -> None:
    with serving("sglang") as dialect:
        answers = list(dialect.stub.Generate(dialect.request(IDS, 13, stream_interval=6)))
        assert max(len(answer.chunk.token_ids) for answer in answers) >= 6
        assert "stream_interval" in refused(dialect, dialect.request(IDS, 4, stream_interval=0))[1]
        request = dialect.request(IDS, 4, regex="a")
        request.require_reasoning = True
        assert "require_reasoning" in refused(dialect, request)[1]
        for start in (-2, 3):
            request = dialect.request(IDS, 4, logprobs=1)
            request.logprob_start_len = start
            assert "logprob_start_len" in refused(dialect, request)[1]


@pytest.mark.parametrize("start", [0, 1, 2])
def test_sglang_counts_a_prompts_logprobs_from_where_it_was_asked(start: int) -> None:
    """SGLang gives prompt[start:], and no logprob for the first of them."""
    servicer = sglang.SglangServicer(types.SimpleNamespace(defaults=SamplingParams()))  # type: ignore[arg-type]
    request = sgl.GenerateRequest(
        tokenized=sgl.TokenizedInput(input_ids=IDS), return_logprob=True, logprob_start_len=start
    )
    call = asyncio.run(servicer.read(request))
    scored = tuple(TokenLogprobs(-float(place)) for place in range(call.sampling.prompt_from, len(IDS)))
    generation: Any = types.SimpleNamespace(sequences=[types.SimpleNamespace(prompt_logprobs=scored)])
    message: Any = servicer._prompt_logprobs(call, generation, 0)
    assert list(message.token_ids) == IDS[start:]
    assert [entry.value for entry in message.token_logprobs][1:] == [-float(p) for p in range(start + 1, len(IDS))]
    assert not message.token_logprobs[0].HasField("value") and len(message.token_logprobs) == len(IDS) - start


def test_none_means_none() -> None:
    with (
        running_server(dataclasses.replace(CONFIG, grpc_compat="none")) as (running, _),
        grpc.insecure_channel(running.target) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        vllm_engine_pb2_grpc.VllmEngineStub(channel).HealthCheck(vll.HealthCheckRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
