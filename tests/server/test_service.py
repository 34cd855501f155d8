"""The native service over the wire, with an engine that echoes: streams, statuses, cancellation, limits."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jqserve.client import Client, ServerError
from jqserve.engine import wire
from jqserve.server.app import SERVICE
from jqserve.server.config import ServerConfig
from jqserve.server.pb import jqserve_pb2 as pb
from tests.server import fake_engine
from tests.server.fake_engine import BROKEN, REFUSED, SLOW, STUCK
from tests.server.running_server import DEMO, Running, running_server

CONFIG = ServerConfig(str(DEMO), port=0, served_model_name="echo", arguments={"port": 0, "x": None})


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Running, Client]]:
    with running_server(CONFIG) as pair:
        yield pair


@pytest.fixture(scope="module")
def client(server: tuple[Running, Client]) -> Client:
    return server[1]


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def busy(client: Client) -> int:
    return client.server_info().load.running


def test_it_announces_plan_and_address(server: tuple[Running, Client]) -> None:
    running, _ = server
    assert running.announced == ["the plan of the echo model", f"listening on {running.target}"]


def test_generate_streams_text_ids_and_the_end(client: Client) -> None:
    ids = client.tokenize("What is 463 + 88? Grün 😀", add_special_tokens=False)
    stream = client.generate(ids, max_new_tokens=2 * len(ids), seed=7, flush_tokens=1)
    events = list(stream.events())
    result = stream.result
    assert result.token_ids == ids * 2
    assert result.text == "What is 463 + 88? Grün 😀" * 2
    assert all("\ufffd" not in event.text for event in events)
    assert [e.finish_reason for e in events if e.finish_reason] == ["length"] and events[-1].finish_reason == "length"
    assert (result.prompt_tokens, result.completion_tokens, result.choices[0].seed) == (len(ids), 2 * len(ids), 7)
    assert result.request_id
    assert 0 < result.choices[0].first_token_seconds <= result.choices[0].total_seconds


def test_text_and_chat_prompts(client: Client) -> None:
    text = client.generate("hello there", max_new_tokens=4, temperature=0).wait()
    assert text.token_ids[:2] == client.tokenize("hello there")[:2]
    messages = [{"role": "user", "content": "hello"}]
    chat = client.generate(messages, max_new_tokens=4, ignore_eos=True).wait()
    rendered = client.tokenize(messages)
    assert chat.prompt_tokens == len(rendered)
    assert client.detokenize(rendered) == "<|bos|><|user|>hello<|end|><|assistant|>"
    assert client.detokenize(rendered, skip_special_tokens=True) == "hello"


def test_stop_strings_across_tokens_end_the_sequence_and_free_the_slot(client: Client) -> None:
    ids = client.tokenize("one two three four five six", add_special_tokens=False)
    result = client.generate(ids, max_new_tokens=400, stop=["ee fo", "never"], seed=SLOW).wait()
    assert result.text == "one two thr"
    assert result.choices[0].matched_stop == "ee fo" and result.finish_reason == "stop"
    assert result.completion_tokens == len(result.token_ids) < len(ids)
    eventually(lambda: busy(client) == 0)


def test_a_least_length_beyond_the_context_ends_with_it(client: Client) -> None:
    context = fake_engine.INFO["context_length"]
    result = client.generate([5] * (context - 9), min_new_tokens=2**32 - 1, seed=1).wait()
    assert result.completion_tokens == 9 and result.finish_reason == "length"
    with pytest.raises(ServerError, match="4 is more than max_new_tokens 3"):
        client.generate([5], min_new_tokens=4, max_new_tokens=3).wait()


def test_the_engine_learns_which_answers_a_stop_string_has_ended(
    server: tuple[Running, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, client = server
    link, told = running.server.frontend.link, []
    assert link is not None
    send = link._send
    monkeypatch.setattr(link, "_send", lambda message: (told.append(message), send(message)))
    ids = client.tokenize("one two three", add_special_tokens=False)
    client.generate(ids, max_new_tokens=400, stop="three", seed=SLOW).wait()
    cancelled = client.generate(ids, max_new_tokens=400, stop="never", seed=SLOW)
    next(cancelled.events())
    cancelled.cancel()
    eventually(lambda: sum(isinstance(message, wire.Abort) for message in told) == 2)
    assert [message.stopped for message in told if isinstance(message, wire.Abort)] == [True, False]


def test_a_priority_reaches_the_engine(server: tuple[Running, Client], monkeypatch: pytest.MonkeyPatch) -> None:
    running, client = server
    link, told = running.server.frontend.link, []
    assert link is not None
    send = link._send
    monkeypatch.setattr(link, "_send", lambda message: (told.append(message), send(message)))
    client.generate([5, 6], max_new_tokens=1, priority=7, n=2).wait()
    client.generate([5, 6], max_new_tokens=1, priority=-3).wait()
    client.generate([5, 6], max_new_tokens=1).wait()
    over = [one for message in told for one in wire.Decoder().feed(wire.encode(message))]  # as the engine reads them
    assert [one.request.priority for one in over if isinstance(one, wire.Add)] == [7, 7, -3, 0]


def test_text_held_back_for_a_stop_string_comes_at_the_end(client: Client) -> None:
    ids = client.tokenize("alpha beta", add_special_tokens=False)
    result = client.generate(ids, max_new_tokens=len(ids), stop="beta!").wait()
    assert result.text == "alpha beta" and result.finish_reason == "length"


def test_eos_and_stop_tokens_give_no_text_but_are_counted(client: Client) -> None:
    ids = client.tokenize("one two three", add_special_tokens=False)
    eos = client.generate([*ids, fake_engine.EOS], max_new_tokens=100).wait()
    assert (eos.text, eos.finish_reason, eos.choices[0].matched_stop) == ("one two three", "stop", 2)
    assert eos.completion_tokens == len(ids) + 1 and eos.token_ids[-1] == fake_engine.EOS
    for stop in ([], ["zzz"]):
        by_id = client.generate(ids, max_new_tokens=100, stop_token_ids=[ids[-1]], stop=stop).wait()
        assert by_id.text == client.detokenize(ids[:-1]) and by_id.choices[0].matched_stop == ids[-1]


def test_n_sequences_have_their_own_seeds_and_are_told_apart(client: Client) -> None:
    ids = client.tokenize("one two three", add_special_tokens=False)
    first, second = (client.generate(ids, n=3, seed=5, max_new_tokens=6).wait() for _ in range(2))
    assert [c.text for c in first.choices] == [client.detokenize((ids * 6)[:6])] * 3
    assert [c.token_ids for c in first.choices] == [(ids * 6)[:6]] * 3
    assert len({c.seed for c in first.choices}) == 3 and first.choices[0].seed == 5
    assert [c.seed for c in first.choices] == [c.seed for c in second.choices]


def test_output_and_logprobs(client: Client) -> None:
    ids = client.tokenize("one two three", add_special_tokens=False)
    only_text = client.generate(ids, max_new_tokens=len(ids), output="text").wait()
    assert (only_text.text, only_text.token_ids) == ("one two three", [])
    only_ids = client.generate(ids, max_new_tokens=len(ids), output="token_ids", logprobs=2).wait()
    assert (only_ids.text, only_ids.token_ids) == ("", ids)
    logprobs = only_ids.choices[0].logprobs
    assert [entry.token_id for entry in logprobs] == ids
    assert [(top.token_id, top.logprob) for top in logprobs[0].top] == [(0, -0.5), (1, -0.5)]


def test_messages_are_coalesced(client: Client) -> None:
    def sizes(**options: Any) -> list[int]:
        stream = client.generate([5, 6, 7, 8], max_new_tokens=25, seed=SLOW, **options)
        return [len(event.token_ids) for event in stream.events() if event.token_ids]

    # A machine that is busy elsewhere sends more tokens at once, never fewer.
    in_fours, alone, by_time = sizes(flush_tokens=4, flush_ms=10_000), sizes(flush_tokens=1), sizes(flush_tokens=100)
    assert all(size >= 4 for size in in_fours[1:-1]) and len(in_fours) <= 7 < len(alone)
    assert 3 <= len(by_time) <= 12
    assert sum(in_fours) == sum(alone) == sum(by_time) == 25


ids_of = {"token_ids": pb.TokenIds(ids=[5, 6])}
BAD = {
    "prompt": ({}, "INVALID_ARGUMENT", "prompt"),
    "empty": ({"token_ids": pb.TokenIds()}, "INVALID_ARGUMENT", "prompt"),
    "vocabulary": ({"token_ids": pb.TokenIds(ids=[5, 4096])}, "INVALID_ARGUMENT", "token_ids"),
    "too long": ({"token_ids": pb.TokenIds(ids=[5] * 512)}, "INVALID_ARGUMENT", "prompt"),
    "no messages": ({"chat": pb.Chat()}, "INVALID_ARGUMENT", "chat.messages"),
    "bad json": ({"chat": pb.Chat(messages_json="[")}, "INVALID_ARGUMENT", "chat.messages_json"),
    "not a list": ({"chat": pb.Chat(messages_json="{}")}, "INVALID_ARGUMENT", "chat.messages_json"),
    "half a character": (
        {"chat": pb.Chat(messages_json='[{"role": "user", "content": "\\ud800"}]')},
        "INVALID_ARGUMENT",
        "chat",
    ),
    "no role": ({"chat": pb.Chat(messages_json='[{"content": "x"}]')}, "INVALID_ARGUMENT", "chat.messages[0].role"),
    "n": ({**ids_of, "sampling": pb.SamplingParams(n=0)}, "INVALID_ARGUMENT", "sampling.n"),
    "many": ({**ids_of, "sampling": pb.SamplingParams(n=100)}, "INVALID_ARGUMENT", "sampling.n"),
    "empty stop": ({**ids_of, "sampling": pb.SamplingParams(stop=[""])}, "INVALID_ARGUMENT", "sampling.stop"),
    "flush": ({**ids_of, "flush_tokens": 0}, "INVALID_ARGUMENT", "flush_tokens"),
    "long id": ({**ids_of, "request_id": "x" * 300}, "INVALID_ARGUMENT", "request_id"),
    "engine's": ({**ids_of, "sampling": pb.SamplingParams(seed=REFUSED)}, "INVALID_ARGUMENT", "sampling.temperature"),
    "model": ({**ids_of, "model": "other"}, "NOT_FOUND", ""),
    "constraint": ({**ids_of, "json_schema": "{}"}, "UNIMPLEMENTED", ""),
    "broken": ({**ids_of, "sampling": pb.SamplingParams(seed=BROKEN)}, "INTERNAL", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_statuses(client: Client, case: str) -> None:
    fields, code, field = BAD[case]
    with pytest.raises(grpc.RpcError) as caught:
        list(client.stub.Generate(pb.GenerateRequest(**fields)))
    assert caught.value.code().name == code, caught.value.details()
    assert dict(caught.value.trailing_metadata()).get("jqserve-field", "") == field
    assert "Traceback" not in caught.value.details()
    if field:
        assert caught.value.details().startswith(field)


def test_unknown_fields_are_refused(client: Client) -> None:
    def newer[M: Message](message: M) -> M:
        return type(message).FromString(message.SerializeToString() + b"\x98\x06\x01")  # field 99, varint 1

    chat = pb.Chat(messages=[newer(pb.ChatMessage(role="user", content="x"))])
    ids = pb.TokenIds(ids=[5])
    calls: list[Callable[[], object]] = [
        lambda: list(client.stub.Generate(newer(pb.GenerateRequest(token_ids=ids)))),
        lambda: list(client.stub.Generate(pb.GenerateRequest(token_ids=newer(ids)))),
        lambda: list(client.stub.Generate(pb.GenerateRequest(token_ids=ids, sampling=newer(pb.SamplingParams())))),
        lambda: list(client.stub.Generate(pb.GenerateRequest(token_ids=ids, choice=newer(pb.Choice(options=["x"]))))),
        lambda: list(client.stub.Generate(pb.GenerateRequest(chat=chat))),
        lambda: client.stub.Tokenize(pb.TokenizeRequest(chat=chat)),
        lambda: client.stub.Score(pb.ScoreRequest(inputs=[newer(pb.ScoreInput(text="x"))])),
        lambda: client.stub.Abort(newer(pb.AbortRequest(request_id="x"))),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError, match="no field 99"):
            call()


def test_cancelling_frees_the_slot_at_once(client: Client) -> None:
    stream = client.generate([5, 6, 7], max_new_tokens=400, seed=SLOW, n=3)
    next(iter(stream))
    assert busy(client) == 3
    stream.cancel()
    eventually(lambda: busy(client) == 0, seconds=1)
    with pytest.raises(ServerError) as caught:
        stream.wait()
    assert caught.value.code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("seed", [SLOW, STUCK], ids=["running", "queued"])
def test_a_deadline_frees_the_slot(client: Client, seed: int) -> None:
    began = time.monotonic()
    with pytest.raises(ServerError) as caught:
        client.generate([5, 6, 7], max_new_tokens=400, seed=seed, timeout=0.3).wait()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() - began < 1.5
    eventually(lambda: busy(client) == 0, seconds=1)


def test_abort_by_id(client: Client) -> None:
    assert not client.abort("nobody")
    stream = client.generate([5, 6, 7], max_new_tokens=400, seed=SLOW, request_id="mine")
    next(iter(stream))
    with pytest.raises(ServerError, match="already running"):
        client.generate([5], request_id="mine").wait()
    assert client.abort("mine")
    result = stream.wait()
    assert result.finish_reason == "abort" and result.token_ids
    eventually(lambda: busy(client) == 0 and not client.abort("mine"))


def test_a_full_queue_is_resource_exhausted_and_recovers(client: Client) -> None:
    streams = [client.generate([5], max_new_tokens=9, seed=STUCK) for _ in range(72)]  # 64 running and 8 queued
    eventually(lambda: busy(client) == 72)
    with pytest.raises(ServerError) as caught:
        client.generate([5], max_new_tokens=1).wait()
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for stream in streams:
        stream.cancel()
    eventually(lambda: busy(client) == 0)
    assert client.generate([5], max_new_tokens=1).wait().finish_reason == "length"


def test_many_at_once_each_gets_its_own(client: Client) -> None:
    def one(i: int) -> bool:
        ids = [5 + i, 6 + i, 7 + i]
        stream = client.generate(ids, max_new_tokens=10 + i % 7, output="token_ids")
        if i % 5 == 0:
            next(stream.events())
            stream.cancel()
            return True
        return stream.wait().token_ids == (ids * 9)[: 10 + i % 7]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert all(pool.map(one, range(200)))
    eventually(lambda: busy(client) == 0)


def test_model_and_server_info(client: Client) -> None:
    model = client.model_info()
    assert (model.served_model_name, model.architecture, model.vocab_size) == ("echo", "EchoForCausalLM", 4096)
    assert (model.modules[0].path, model.modules[0].bits, model.weight_bytes) == ("layers.0.attn.qkv", 4, 1000)
    assert (model.modules[0].n, model.modules[0].k, model.quantization) == (768, 256, "echo int4")
    assert model.kv_cache.pages == 100 and model.has_chat_template and model.eos_token_ids == [2]
    server = client.server_info()
    assert server.state == pb.SERVER_STATE_READY and server.frontend_pid and not server.engine_pid
    assert server.sampling_defaults.temperature == 0.5 and server.sampling_defaults.repetition_penalty == 1.25
    assert server.engine["device"] == "fake" and server.versions["grpcio"] and server.arguments["port"] == 0


def test_health_and_reflection(server: tuple[Running, Client]) -> None:
    with grpc.insecure_channel(server[0].target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            response = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]))
        names = {service.name for service in answer.list_services_response.service}
        assert names >= {SERVICE, "grpc.health.v1.Health"}


def test_detokenize_refuses_ids_beyond_the_vocabulary(client: Client) -> None:
    with pytest.raises(ServerError) as caught:
        client.detokenize([5, 2**31])
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT and caught.value.field == "token_ids"


def test_a_score_that_never_fits_is_told_so_and_not_to_try_again() -> None:
    config = ServerConfig(str(DEMO), port=0, engine={"info": {"max_running_requests": 2, "max_queued": 1}})
    inputs = [pb.ScoreInput(token_ids=pb.TokenIds(ids=[5, 6]))] * 4
    with running_server(config) as (_, client), pytest.raises(grpc.RpcError, match=r"inputs.*holds 3") as caught:
        client.stub.Score(pb.ScoreRequest(inputs=inputs))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_score_of_the_whole_context_needs_no_room_for_an_answer(client: Client) -> None:
    context = fake_engine.INFO["context_length"]
    (scored,) = client.score([[5] * context])
    assert len(scored.logprobs) == context - 1
    with pytest.raises(ServerError, match=f"inputs.1.: has {context + 1} tokens; the context length is {context}$"):
        client.score([[5, 6], [5] * (context + 1)])
    with pytest.raises(ServerError, match=r"inputs\[2\]: token_ids: holds 4096") as caught:
        client.score([[5, 6], [7, 8], [5, 4096], [5, 6]])
    assert caught.value.field == "inputs[2]"
    with pytest.raises(ServerError, match="the answer needs at least one"):
        client.generate([5] * context).wait()
