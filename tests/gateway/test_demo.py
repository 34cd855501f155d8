"""The demo model behind a real smg: what comes through the gateway is what the native service gives."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import openai
import pytest

from jqserve.client import Client, ServerError
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc, vllm_engine_pb2_grpc
from jqserve.server.pb import vllm_engine_pb2 as vll
from tests.data.schemas import cases
from tests.gateway.smg import Gateway, gateway
from tests.server.program import Program, compilation_cache, eventually, idle

pytestmark = pytest.mark.slow

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
STORY = "Short story about Nina the horse, the garden and a stone."
PERSON = "Make JSON from this: Bob is 90 years old."
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "name": {"type": "string", "maxLength": 20}},
    "required": ["age", "name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, Gateway]]:
    folder = tmp_path_factory.mktemp("demo")
    flags = ("--admin", "--metrics-port", "0", "--profile-dir", str(folder / "profiles"))
    program = Program(folder, *flags, cache=compilation_cache(tmp_path_factory))
    try:
        program.wait_until_ready()
        smg_flags = ("--policy", "round_robin", "--tool-call-parser", "qwen")
        with gateway(folder, [f"grpc://{program.target}"], "demo", *smg_flags) as smg:
            yield program, smg
        program.client.close()
    finally:
        program.end()


@pytest.fixture(scope="module")
def native(served: tuple[Program, Gateway]) -> Client:
    return served[0].client


@pytest.fixture(scope="module")
def smg(served: tuple[Program, Gateway]) -> Gateway:
    return served[1]


@pytest.fixture(scope="module")
def client(smg: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{smg.url}/v1", api_key="none", max_retries=0, timeout=120)


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.5, "seed": 7},
    "truncated": {"temperature": 1.2, "seed": 8, "top_p": 0.8},
    "penalised": {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    "biased": {"temperature": 0, "logit_bias": {"95": -100}},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_chat_gives_what_the_native_service_gives(
    client: openai.OpenAI, native: Client, case: str, stream: bool
) -> None:
    options = OPTIONS[case]
    ours: dict[str, Any] = dict(options)
    if "logit_bias" in ours:
        ours["logit_bias"] = {int(token): bias for token, bias in ours["logit_bias"].items()}
    expected = native.generate(messages(STORY), max_new_tokens=24, **ours).wait()
    answer: Any = client.chat.completions.create(
        model="demo", messages=messages(STORY), max_tokens=24, stream=stream, **options
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
        text = "".join(choice.delta.content or "" for choice in chunks)
        finish = [choice.finish_reason for choice in chunks if choice.finish_reason]
        assert len(chunks) > 5 and finish == [expected.finish_reason]
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == expected.finish_reason
        assert answer.usage.completion_tokens == expected.completion_tokens
        assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert text == expected.text


def test_plain_completions(client: openai.OpenAI, native: Client) -> None:
    ids = native.tokenize("Once upon a", add_special_tokens=False)  # smg adds no bos to a plain prompt
    expected = native.generate(ids, temperature=0, max_new_tokens=12).wait()
    answer = client.completions.create(model="demo", prompt="Once upon a", temperature=0, max_tokens=12)
    assert answer.choices[0].text == expected.text
    pieces = client.completions.create(model="demo", prompt="Once upon a", temperature=0, max_tokens=12, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected.text


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_n_answers_each_with_its_seed(client: openai.OpenAI, native: Client, stream: bool) -> None:
    expected = native.generate(messages(STORY), n=2, seed=11, temperature=1.5, max_new_tokens=16).wait()
    answer: Any = client.chat.completions.create(
        model="demo", messages=messages(STORY), n=2, seed=11, temperature=1.5, max_tokens=16, stream=stream
    )
    texts = {0: "", 1: ""}
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta.content or "") if stream else choice.message.content
    assert texts == {choice.index: choice.text for choice in expected.choices} and texts[0] != texts[1]


def test_stop_strings_end_the_answer_and_free_the_slot(client: openai.OpenAI, native: Client) -> None:
    options: dict[str, Any] = {"temperature": 0, "stop": ["the garden"]}
    expected = native.generate(messages(STORY), max_new_tokens=300, **options).wait()
    answer = client.chat.completions.create(model="demo", messages=messages(STORY), max_tokens=300, **options)
    assert answer.choices[0].message.content == expected.text and answer.choices[0].finish_reason == "stop"
    eventually(lambda: idle(native), 3)  # the worker has matched it itself: smg would have let it run on


def test_logprobs(client: openai.OpenAI, native: Client) -> None:
    expected = native.generate(messages(STORY), temperature=0, max_new_tokens=6, logprobs=3).wait().choices[0]
    answer = client.chat.completions.create(
        model="demo", messages=messages(STORY), temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    for theirs, ours in zip(logprobs.content, expected.logprobs, strict=True):
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-5)
        assert [t.logprob for t in theirs.top_logprobs] == pytest.approx([t.logprob for t in ours.top], abs=1e-5)


def test_json_schema_through_the_gateway(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=messages(STORY),  # nothing that would make the model write JSON by itself
        max_tokens=200,
        temperature=0.7,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
    answer = client.chat.completions.create(
        model="demo", messages=messages(PERSON), max_tokens=64, temperature=0, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_a_bad_schema_is_the_callers_fault(smg: Gateway) -> None:
    schema = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    request = {"model": "demo", "messages": messages("hi"), "max_tokens": 9, "response_format": form}
    status, answer = smg.post(CHAT, request)
    assert status == 400 and "uniqueItems" in str(answer)


def test_a_forced_tool_call(client: openai.OpenAI) -> None:
    function = {"name": "add_person", "description": "adds a person", "parameters": SCHEMA}
    answer: Any = client.chat.completions.create(
        model="demo",
        messages=messages(PERSON),
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "add_person"}},
        max_tokens=200,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "add_person"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"regex": "(red|blue){3} [0-9]+!"}, r"(red|blue){3} [0-9]+!"),
        ({"ebnf": 'start: "<" WORD ("," WORD)? ">"\nWORD: /[a-z]{1,5}/'}, r"<[a-z]{1,5}(,[a-z]{1,5})?>"),
        ({"choice": ["left", "right", "left turn"]}, r"left|right|left turn"),
    ],
    ids=["regex", "ebnf", "choice"],
)
def test_native_constraints(native: Client, options: dict[str, Any], fits: str) -> None:
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
        result = native.generate(messages(STORY), max_new_tokens=40, **sampling, **options).wait()  # type: ignore[typeddict-item]
        if result.finish_reason == "stop":
            assert re.fullmatch(fits, result.text), result.text


def test_schemas_through_the_model(native: Client) -> None:
    """A sample of the 200 (tests/engine/test_schemas.py has them all, without a model)."""
    sample = [case for i, case in enumerate(cases()) if i % 12 == 0]
    streams = [
        native.generate(messages(PERSON), json_schema=schema, temperature=0.7, seed=i, max_new_tokens=120)
        for i, (_, schema) in enumerate(sample)
    ]
    finished = 0
    for (name, schema), stream in zip(sample, streams):
        result = stream.wait()
        if result.finish_reason == "stop":  # a cut answer is only the beginning of one
            jsonschema.validate(json.loads(result.text), schema), name
            finished += 1
    assert finished >= len(sample) // 2, finished


def test_what_is_no_grammar_is_invalid(native: Client) -> None:
    for options in ({"regex": "(a"}, {"json_schema": "{"}, {"ebnf": "start: x"}, {"choice": []}):
        with pytest.raises(ServerError) as caught:
            native.generate("x", max_new_tokens=4, **options).wait()  # type: ignore[typeddict-item]
        assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "constraint")


def test_scores_agree_with_what_generation_says(native: Client) -> None:
    prompt = native.tokenize(messages(STORY))
    result = native.generate(prompt, temperature=0, max_new_tokens=20, logprobs=1).wait()
    whole = [*prompt, *result.token_ids]
    scored, again = native.score([whole, whole], context=[len(prompt), 1], top_logprobs=1)
    generated = [entry.logprob for entry in result.choices[0].logprobs]
    assert [entry.logprob for entry in scored.logprobs] == pytest.approx(generated, abs=1e-3)
    assert scored.greedy and scored.total == pytest.approx(sum(generated), abs=1e-2)
    assert not again.greedy and len(again.logprobs) == len(whole) - 1
    assert [entry.token_id for entry in again.logprobs] == whole[1:]
    (text,) = native.score(["The cat sat."])
    assert list(text.token_ids) == native.tokenize("The cat sat.") and text.total < 0


def test_prompt_logprobs_over_the_gateways_protocol(served: tuple[Program, Gateway], native: Client) -> None:
    ids = native.tokenize(STORY)
    (expected,) = native.score([ids], top_logprobs=2)
    request = vll.GenerateRequest(tokenized=vll.TokenizedInput(input_ids=ids), stream=True)
    request.sampling_params.CopyFrom(vll.SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2, n=2))
    with grpc.insecure_channel(served[0].target) as channel:
        answers = list(vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(request))
    chunks = [a.chunk for a in answers if a.HasField("chunk")]
    firsts = {chunk.index: chunk.input_logprobs for chunk in reversed(chunks)}
    assert not firsts[1].token_ids  # the prompt is scored once
    entries = firsts[0].token_logprobs
    assert list(firsts[0].token_ids) == ids and not entries[0].HasField("value")
    assert [e.value for e in entries[1:]] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
    assert [list(t.token_ids) for t in firsts[0].top_logprobs[1:]] == [
        [top.token_id for top in e.top] for e in expected.logprobs
    ]


@pytest.mark.parametrize(
    ("inputs", "context", "field"),
    [
        ([], 1, "inputs"),
        ([[5]], 1, "inputs[0]"),
        ([[5, 6], [5, 6]], [1, 2], "inputs[1].context"),
        ([[5, 4096]], 1, "token_ids"),
        ([[5] * 400], 1, "prompt"),
    ],
)
def test_what_cannot_be_scored(native: Client, inputs: Any, context: Any, field: str) -> None:
    with pytest.raises(ServerError) as caught:
        native.score(inputs, context=context)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_an_operator_flushes_the_cache_and_profiles(served: tuple[Program, Gateway]) -> None:
    program, _ = served
    with grpc.insecure_channel(program.target) as channel:
        admin = jqserve_pb2_grpc.AdminStub(channel)
        program.client.generate(messages(STORY), temperature=0, max_new_tokens=20).wait()
        assert admin.FlushCache(pb.FlushCacheRequest()).pages > 0
        assert admin.FlushCache(pb.FlushCacheRequest()).pages == 0
        with pytest.raises(grpc.RpcError) as caught:
            admin.StopProfile(pb.StopProfileRequest())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        directory = admin.StartProfile(pb.StartProfileRequest()).directory
        program.client.generate(messages(STORY), temperature=0, max_new_tokens=2).wait()
        assert admin.StopProfile(pb.StopProfileRequest()).directory == directory
        assert any(path.is_file() for path in Path(directory).rglob("*"))


def test_nothing_was_compiled_while_serving(served: tuple[Program, Gateway]) -> None:
    program, _ = served
    url = f"http://127.0.0.1:{program.facts['metrics_port']}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    assert 'jqserve:recompilations_total{model_name="demo"} 0.0' in text
    spent = re.search(r'jqserve:host_seconds_total\{model_name="demo",phase="mask"\} (\S+)', text)
    assert spent is not None and float(spent[1]) > 0
