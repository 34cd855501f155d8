"""The demo model behind a real smg, over each protocol that it drives: what comes through the gateway is what the
native service gives for the same request and seed. What smg does not send over a protocol is named in `NOT_SENT`."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from jqserve.client import Client
from tests.gateway.smg import Gateway, gateway
from tests.server.program import Program, compilation_cache, eventually, idle

pytestmark = pytest.mark.slow

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
OPEN = "Tell me about the sea"
STORY = "Short story about Nina the horse, the garden and a stone."
PERSON = "Make JSON from this: Bob is 90 years old."
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "name": {"type": "string", "maxLength": 20}},
    "required": ["age", "name"],
    "additionalProperties": False,
}
RANDOM_SEED = 17  # of the seeds that the server draws where a request brings none
#: Seen with smg 1.13.0: fields of a chat that it takes from the client and leaves out of the Generate that the worker
#: gets. `stop`: it cuts the text itself, and the worker computes on (it does send a string of one token, as its id).
NOT_SENT = {"vllm": ("logit_bias",), "sglang": ("logit_bias", "seed", "stop")}


class Served:
    """A server and the gateway in front of it."""

    def __init__(self, protocol: str, program: Program, smg: Gateway) -> None:
        self.protocol, self.program, self.smg = protocol, program, smg

    def sends(self, field: str) -> bool:
        return field not in NOT_SENT[self.protocol]

    def seed(self, asked: int) -> int:
        """With which the next request that asks for `asked` through the gateway is drawn."""
        if self.sends("seed"):
            return asked
        drawn = self.program.client.generate([5], max_new_tokens=1).wait().choices[0].seed
        seeds = random.Random(RANDOM_SEED)
        assert any(seeds.getrandbits(31) == drawn for _ in range(1000))
        return seeds.getrandbits(31)

    def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.program.facts['metrics_port']}/metrics"
        return urllib.request.urlopen(url, timeout=10).read().decode()


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--metrics-port", "0", "--random-seed", str(RANDOM_SEED)]
    flags += ["--grpc-compat", request.param] if request.param != "vllm" else []  # which is the default
    program = Program(folder, *flags, cache=compilation_cache(tmp_path_factory))
    try:
        program.wait_until_ready()
        smg_flags = ("--policy", "round_robin", "--tool-call-parser", "qwen")
        with gateway(folder, [f"grpc://{program.target}"], "demo", *smg_flags) as smg:
            yield Served(request.param, program, smg)
        program.client.close()
    finally:
        program.end()


@pytest.fixture(scope="module")
def native(served: Served) -> Client:
    return served.program.client


@pytest.fixture(scope="module")
def smg(served: Served) -> Gateway:
    return served.smg


@pytest.fixture(scope="module")
def client(smg: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{smg.url}/v1", api_key="none", max_retries=0, timeout=120)


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_smg_finds_out_what_the_worker_speaks(served: Served) -> None:
    (worker,) = served.smg.get("/workers")["workers"]
    assert (worker["runtime_type"], worker["is_healthy"], worker["model_id"]) == (served.protocol, True, "demo")
    assert worker["labels"]["max_context_length"] == "384" and worker["labels"]["eos_token_ids"] == "[2]"
    assert urllib.request.urlopen(f"{served.smg.url}/health", timeout=10).status == 200


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.5, "seed": 7},
    "truncated": {"temperature": 1.2, "seed": 8, "top_p": 0.8},
    "present": {"temperature": 0, "presence_penalty": 2},
    "frequent": {"temperature": 0, "frequency_penalty": -2},
    "biased": {"temperature": 0, "logit_bias": {274: -100}},  # the answer's first token else
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_chat_gives_what_the_native_service_gives(
    served: Served, client: openai.OpenAI, native: Client, case: str, stream: bool
) -> None:
    options = OPTIONS[case]
    ours: dict[str, Any] = {name: value for name, value in options.items() if served.sends(name)}
    if "seed" in options:
        ours["seed"] = served.seed(options["seed"])
    answer: Any = client.chat.completions.create(
        model="demo", messages=messages(OPEN), max_tokens=24, stream=stream, **options
    )
    chunks = [chunk.choices[0] for chunk in answer if chunk.choices] if stream else []
    expected = native.generate(messages(OPEN), max_new_tokens=24, **ours).wait()
    if stream:
        text = "".join(choice.delta.content or "" for choice in chunks)
        finish = [choice.finish_reason for choice in chunks if choice.finish_reason]
        assert finish == [expected.finish_reason]
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == expected.finish_reason
        assert answer.usage.completion_tokens == expected.completion_tokens
        assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert text == expected.text


def test_a_stream_comes_in_pieces(client: openai.OpenAI) -> None:
    """How many depends on how fast they are read: on a busy machine 13 tokens have come as one. 200 take longer to
    compute than any reader waits."""
    ask: dict[str, Any] = {"model": "demo", "messages": messages(STORY), "max_tokens": 200, "temperature": 0}
    chunks = client.chat.completions.create(**ask, stream=True, extra_body={"ignore_eos": True})
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len([text for text in texts if text]) >= 5


def test_each_of_these_options_makes_a_difference(native: Client) -> None:
    """Else an answer without it would pass for one with it."""
    texts = {
        case: native.generate(messages(OPEN), max_new_tokens=24, **options).wait().text
        for case, options in OPTIONS.items()
    }
    assert len(set(texts.values())) == len(OPTIONS), texts


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 9}], ids=["greedy", "seeded"])
def test_plain_completions(served: Served, client: openai.OpenAI, native: Client, options: dict[str, Any]) -> None:
    ids = native.tokenize("Once upon a", add_special_tokens=False)  # smg adds no bos to a plain prompt
    ask: dict[str, Any] = {"model": "demo", "prompt": "Once upon a", "max_tokens": 12, **options}

    def expected(seed: int) -> str:
        return native.generate(ids, max_new_tokens=12, **options | {"seed": seed}).wait().text

    seed = served.seed(9)
    assert client.completions.create(**ask).choices[0].text == expected(seed)
    seed = served.seed(9)
    pieces = client.completions.create(**ask, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected(seed)


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_n_answers_each_with_its_seed(served: Served, client: openai.OpenAI, native: Client, stream: bool) -> None:
    seed = served.seed(11)
    answer: Any = client.chat.completions.create(
        model="demo", messages=messages(OPEN), n=2, seed=11, temperature=1.5, max_tokens=16, stream=stream
    )
    texts = {0: "", 1: ""}
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta.content or "") if stream else choice.message.content
    expected = native.generate(messages(OPEN), n=2, seed=seed, temperature=1.5, max_new_tokens=16).wait()
    assert texts == {choice.index: choice.text for choice in expected.choices} and texts[0] != texts[1]


@pytest.mark.parametrize("stop", ["the garden", "."])
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_stop_strings_end_the_answer(
    served: Served, client: openai.OpenAI, native: Client, stop: str, stream: bool
) -> None:
    expected = native.generate(messages(STORY), max_new_tokens=300, temperature=0, stop=[stop]).wait()
    ask: dict[str, Any] = {"model": "demo", "messages": messages(STORY), "max_tokens": 300, "temperature": 0}
    if stream:
        chunks = [c.choices[0] for c in client.chat.completions.create(**ask, stop=[stop], stream=True) if c.choices]
        assert "".join(choice.delta.content or "" for choice in chunks) == expected.text
        assert [choice.finish_reason for choice in chunks if choice.finish_reason] == ["stop"]
        return
    answer = client.chat.completions.create(**ask, stop=[stop])
    assert answer.choices[0].message.content == expected.text and answer.choices[0].finish_reason == "stop"
    one_token = len(native.tokenize(stop, add_special_tokens=False)) == 1
    assert one_token == (stop == ".")
    spared = answer.usage is not None and answer.usage.completion_tokens == expected.completion_tokens
    assert spared == (served.sends("stop") or one_token)  # the worker has matched it itself, or computed on


def test_logprobs(client: openai.OpenAI, native: Client) -> None:
    expected = native.generate(messages(STORY), temperature=0, max_new_tokens=6, logprobs=3).wait().choices[0]
    ask: dict[str, Any] = {"model": "demo", "messages": messages(STORY), "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    stream = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in stream if chunk.choices and chunk.choices[0].logprobs]
    for content in (answer.logprobs.content, [entry for part in streamed for entry in part.content or ()]):
        for theirs, ours in zip(content, expected.logprobs, strict=True):
            assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-5)
            assert [t.logprob for t in theirs.top_logprobs] == pytest.approx([t.logprob for t in ours.top], abs=1e-5)


def test_json_schema_through_the_gateway(served: Served, client: openai.OpenAI, native: Client) -> None:
    seed = served.seed(1)
    answer = client.chat.completions.create(
        model="demo",
        messages=messages(STORY),  # nothing that would make the model write JSON by itself
        max_tokens=200,
        temperature=0.7,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
    )
    text = answer.choices[0].message.content or ""
    jsonschema.validate(json.loads(text), SCHEMA)
    sampling: dict[str, Any] = {"temperature": 0.7, "seed": seed, "max_new_tokens": 200}
    assert text == native.generate(messages(STORY), json_schema=SCHEMA, **sampling).wait().text
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


def test_a_forced_tool_call(client: openai.OpenAI, native: Client) -> None:
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
    expected = native.generate(messages(PERSON), json_schema=SCHEMA, temperature=0, max_new_tokens=200).wait()
    assert json.loads(call.function.arguments) == json.loads(expected.text)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_a_tool_call_in_the_answer_is_parsed(served: Served, smg: Gateway) -> None:
    """The model is held to the text of a call, for it would not write one by itself."""
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    request: dict[str, Any] = {"model": "demo", "messages": messages(STORY), "max_tokens": 100, "temperature": 0}
    request |= {"tools": [{"type": "function", "function": function}], "regex": re.escape(CALL)}
    status, answer = smg.post(CHAT, request)
    assert status == 200, answer
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"]) == {"a": 1}
    assert choice["finish_reason"] == "tool_calls"


def test_prompt_logprobs_through_generate(served: Served, smg: Gateway, native: Client) -> None:
    """smg 1.13.0 asks the worker for a prompt's over sglang's protocol alone."""
    sampling = {"temperature": 0, "max_new_tokens": 4}
    ask = {"model": "demo", "text": STORY, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    status, answer = smg.post("/generate", ask)
    assert status == 200, answer
    info = answer[0]["meta_info"]
    ids = native.tokenize(STORY, add_special_tokens=False)
    expected = native.generate(ids, temperature=0, max_new_tokens=4, logprobs=0).wait()
    assert answer[0]["output_ids"] == expected.token_ids
    if served.protocol == "vllm":
        assert not info.get("input_token_logprobs")
        return
    (scored,) = native.score([ids])
    first, *others = info["input_token_logprobs"]
    assert first[0] is None and [token for _, token in others] == ids[1:]
    assert [value for value, _ in others] == pytest.approx([entry.logprob for entry in scored.logprobs], abs=1e-4)
    ours = [entry.logprob for entry in expected.choices[0].logprobs]
    assert [value for value, _ in info["output_token_logprobs"]] == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_a_client_that_hangs_up_frees_its_slots(served: Served, native: Client, stream: bool) -> None:
    before, n, limit = native.server_info().load.generated_tokens, 8, 350
    connection = http.client.HTTPConnection(served.smg.url.removeprefix("http://"), timeout=60)
    ask = {"model": "demo", "messages": messages(STORY), "n": n, "max_tokens": limit, "ignore_eos": True}
    connection.request("POST", CHAT, json.dumps({**ask, "stream": stream}), {"content-type": "application/json"})
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    eventually(lambda: native.server_info().load.running > 0, 30)
    connection.close()
    eventually(lambda: idle(native), 60)
    assert native.server_info().load.generated_tokens - before < n * limit


def test_nothing_was_compiled_while_serving(served: Served) -> None:
    text = served.metrics()
    assert 'jqserve:recompilations_total{model_name="demo"} 0.0' in text
    spent = re.search(r'jqserve:host_seconds_total\{model_name="demo",phase="mask"\} (\S+)', text)
    assert spent is not None and float(spent[1]) > 0


def test_a_worker_that_is_told_to_go_finishes_and_gets_nothing_new(served: Served) -> None:
    """The last test of each protocol: there is no worker after it."""
    ask = {"model": "demo", "messages": messages(STORY), "max_tokens": 300, "ignore_eos": True}
    events = served.smg.stream(CHAT, ask)
    next(events)
    served.program.process.send_signal(signal.SIGTERM)
    finish = [event["choices"][0]["finish_reason"] for event in events if event["choices"]]
    assert finish[-1] == "length", finish
    assert served.program.process.wait(60) == 0
    with contextlib.suppress(KeyError):
        eventually(lambda: served.smg.ready_workers() == 0, 30)
    assert served.smg.post(CHAT, ask)[0] == 503
