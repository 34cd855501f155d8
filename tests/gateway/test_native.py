"""What a gateway cannot give, of the demo model: other constraints than schemas, scores, operations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest

from jqserve.client import Client, ServerError
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc, vllm_engine_pb2_grpc
from jqserve.server.pb import vllm_engine_pb2 as vll
from tests.data.schemas import cases
from tests.gateway.test_demo import PERSON, STORY, messages
from tests.server.program import Program, compilation_cache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("native")
    flags = ("--admin", "--profile-dir", str(folder / "profiles"))
    program = Program(folder, *flags, cache=compilation_cache(tmp_path_factory))
    try:
        program.wait_until_ready()
        yield program
        program.client.close()
    finally:
        program.end()


@pytest.fixture(scope="module")
def native(program: Program) -> Client:
    return program.client


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


def test_prompt_logprobs_over_the_gateways_protocol(program: Program, native: Client) -> None:
    ids = native.tokenize(STORY)
    (expected,) = native.score([ids], top_logprobs=2)
    request = vll.GenerateRequest(tokenized=vll.TokenizedInput(input_ids=ids), stream=True)
    request.sampling_params.CopyFrom(vll.SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2, n=2))
    with grpc.insecure_channel(program.target) as channel:
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
        ([[5, 4096]], 1, "inputs[0]"),
        ([[5] * 400], 1, "inputs[0]"),
    ],
)
def test_what_cannot_be_scored(native: Client, inputs: Any, context: Any, field: str) -> None:
    with pytest.raises(ServerError) as caught:
        native.score(inputs, context=context)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_an_operator_flushes_the_cache_and_profiles(program: Program) -> None:
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
