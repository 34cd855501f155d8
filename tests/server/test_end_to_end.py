"""`jqserve-server` itself, on the demo model, as users meet it: answers, crowds, cancellation, drain, both deaths."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from jqserve.client import AsyncClient, Result, ServerError
from tests.server.program import Program, alive, compilation_cache, eventually, idle

pytestmark = pytest.mark.slow

ASKED = {
    "What is 463 + 88?": "551",
    "Which is larger, 679 or 26?": "679",
    "What is the month before December?": "November",
    "Make JSON from this: Bob is 90 years old.": '{"name": "Bob", "age": 90}',
    "Copy this sentence: My friend found the red clock after lunch.": "My friend found the red clock after lunch.",
}
STORY = "Short story about Nina the horse, the garden and a stone."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compilation_cache(tmp_path_factory)


@pytest.fixture(scope="module")
def served(folder: Path, cache: Path) -> Iterator[Program]:
    program = Program(folder, cache=cache)
    program.wait_until_ready()
    yield program
    program.client.close()
    program.end()


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_it_prints_the_plan_and_where_it_listens(served: Program) -> None:
    assert "load plan: gptq" in served.output() and f"listening on {served.target}" in served.output()
    model = served.client.model_info()
    assert model.architecture == "LlamaForCausalLM" and model.served_model_name == "demo"
    assert {m.bits for m in model.modules if "attn" in m.path} == {4} and model.kv_cache.pages == 32


@pytest.mark.parametrize("question", ASKED)
def test_it_answers(served: Program, question: str) -> None:
    result = served.client.generate(chat(question), temperature=0, max_new_tokens=64).wait()
    assert (result.text, result.finish_reason) == (ASKED[question], "stop")


def test_a_text_prompt_goes_on_with_its_own_spaces(served: Program) -> None:
    whole = served.client.tokenize(chat(STORY))
    ids = served.client.generate(whole, temperature=0, max_new_tokens=12).wait().token_ids
    cut = served.client.generate([*whole, *ids[:4]], temperature=0, max_new_tokens=8).wait()
    assert served.client.detokenize(ids[:4]) + cut.text == served.client.detokenize(ids)


def test_stop_strings_logprobs_and_n(served: Program) -> None:
    client = served.client
    stopped = client.generate(chat(STORY), temperature=0, stop=["the garden"], max_new_tokens=64).wait()
    assert stopped.text.endswith("in ") and stopped.choices[0].matched_stop == "the garden"
    scored = client.generate(chat(STORY), temperature=0, logprobs=3, max_new_tokens=5).wait()
    for token, entry in zip(scored.token_ids, scored.choices[0].logprobs, strict=True):
        assert entry.token_id == token == entry.top[0].token_id and len(entry.top) == 3
        assert entry.logprob == pytest.approx(entry.top[0].logprob, abs=1e-5) and entry.logprob <= 0
    several = client.generate(chat(STORY), n=3, seed=11, temperature=1.5, max_new_tokens=24).wait()
    assert len({choice.text for choice in several.choices}) == 3
    alone = client.generate(chat(STORY), seed=several.choices[2].seed, temperature=1.5, max_new_tokens=24).wait()
    assert alone.text == several.choices[2].text


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
        ({"logprobs": 1000}, "sampling.logprobs"),
        ({"stop_token_ids": [4096]}, "sampling.stop_token_ids"),
        ({"logit_bias": {4096: 1.0}}, "sampling.logit_bias"),
    ],
)
def test_what_the_engine_refuses(served: Program, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ServerError) as caught:
        served.client.generate(chat("hi"), **options).wait()  # type: ignore[typeddict-item]
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_too_long_prompts_are_refused(served: Program) -> None:
    with pytest.raises(ServerError, match="384"):
        served.client.generate([5] * 384).wait()
    assert served.client.generate([5] * 383, temperature=0, ignore_eos=True).wait().completion_tokens == 1


def test_cancellation_and_deadlines_free_slots_and_pages(served: Program) -> None:
    client = served.client
    streams = [client.generate(chat(STORY), ignore_eos=True, n=4, temperature=0) for _ in range(3)]
    for stream in streams:
        next(stream.events())
    eventually(lambda: client.server_info().load.running > 0)  # the engine tells its load four times a second
    for stream in streams:
        stream.cancel()
    eventually(lambda: idle(client), 2)
    with pytest.raises(ServerError) as caught:
        client.generate(chat(STORY), ignore_eos=True, n=2, timeout=0.3).wait()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: idle(client), 2)


def requests_of_a_crowd(seed: int, count: int) -> list[dict[str, Any]]:
    """Mixed lengths, greedy and seeded."""
    rng = random.Random(seed)
    questions = [*ASKED, STORY]
    requests: list[dict[str, Any]] = []
    for i in range(count):
        options: dict[str, Any] = {"max_new_tokens": rng.randint(10, 85), "ignore_eos": True, "logprobs": 2}
        options |= {"temperature": 0} if i % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": i}
        requests.append({"prompt": chat(rng.choice(questions)), **options})
    return requests


def agree(crowd: Result, alone: Result, greedy: bool) -> bool:
    """Equal up to the first position whose top-1 margin is below 1e-3 (greedy), or everywhere (seeded)."""
    for i, (ours, theirs) in enumerate(zip(crowd.token_ids, alone.token_ids)):
        top = alone.choices[0].logprobs[i].top
        if greedy and top[0].logprob - top[1].logprob < 1e-3:
            return True
        if ours != theirs:
            return False
    return len(crowd.token_ids) == len(alone.token_ids)


def test_64_clients_with_cancellations_get_what_each_gets_alone(served: Program) -> None:
    crowd_equals_alone(served)


def test_64_clients_on_an_unquantized_model(fixtures_dir: Path, tmp_path: Path, cache: Path) -> None:
    program = Program(tmp_path, "--model-path", str(fixtures_dir / "base-bf16"), "--dtype", "float32", cache=cache)
    try:
        program.wait_until_ready()
        crowd_equals_alone(program)
    finally:
        program.end()


def crowd_equals_alone(served: Program) -> None:
    """64 clients, a quarter of which leave early, on so few pages that sequences are preempted; then each alone."""
    requests = requests_of_a_crowd(seed=1, count=64)
    before = served.client.server_info().load

    async def one(client: AsyncClient, request: dict[str, Any], cancel_after: float | None) -> Result | None:
        stream = client.generate(**request)
        try:
            await asyncio.wait_for(stream.wait(), cancel_after)
        except TimeoutError:
            return None  # wait_for cancelled the reader, and with it the call
        return stream.result

    async def crowd() -> list[Result | None]:
        rng = random.Random(2)
        clients = [AsyncClient(served.target) for _ in range(4)]
        tasks = [
            one(clients[i % 4], request, rng.uniform(0.05, 3) if i % 4 == 3 else None)
            for i, request in enumerate(requests)
        ]
        results = await asyncio.gather(*tasks)
        for client in clients:
            await client.close()
        return results

    results = asyncio.run(asyncio.wait_for(crowd(), 240))
    load = served.client.server_info().load
    finished = [i for i, result in enumerate(results) if result is not None]
    assert len(finished) >= 48
    steps = load.steps - before.steps
    rows = load.mean_batch * load.steps - before.mean_batch * before.steps
    assert rows / steps >= 8, (rows, steps)
    assert load.preemptions - before.preemptions >= 10, load  # 18 to 39: a busy machine sees more of them leave early
    assert load.compilations_after_warmup == 0
    eventually(lambda: idle(served.client), 3)
    for i in finished:
        alone = served.client.generate(**requests[i]).wait()
        got = results[i]
        assert got is not None and agree(got, alone, greedy=i % 2 == 1), i


def test_sigterm_drains_and_exits_with_0(served: Program) -> None:
    stream = served.client.generate(chat(STORY), temperature=0, ignore_eos=True, max_new_tokens=150)
    next(stream.events())
    served.process.send_signal(signal.SIGTERM)
    result = stream.wait()
    assert (result.finish_reason, result.completion_tokens) == ("length", 150)
    assert served.process.wait(20) == 0, served.output()
    assert not alive(served.facts["engine_pid"])
    assert "Traceback" not in served.output()


def test_killing_the_engine_gives_every_stream_a_status(folder: Path, cache: Path) -> None:
    program = Program(folder, "--disable-warmup", cache=cache)
    try:
        program.wait_until_ready()
        streams = [program.client.generate(chat(STORY), temperature=0, ignore_eos=True) for _ in range(6)]
        next(streams[0].events())
        os.kill(program.facts["engine_pid"], signal.SIGKILL)
        codes = []
        for stream in streams:
            with pytest.raises(ServerError) as caught:
                stream.wait()
            codes.append(caught.value.code)
        assert codes[0] is grpc.StatusCode.INTERNAL
        assert set(codes) <= {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
        assert program.process.wait(10) == 1
    finally:
        program.end()


def test_killing_the_front_end_ends_the_engine_while_it_loads(folder: Path) -> None:
    program = Program(folder)
    try:
        children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
        eventually(lambda: bool(children.read_text().split()), 60)
        engine = int(children.read_text().split()[0])
        eventually(lambda: "compile" in program.output() or "load:" in program.output(), 60)
        program.process.kill()
        eventually(lambda: not alive(engine), 5)
    finally:
        program.end()


def test_a_model_path_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    for path in (str(tmp_path), str(tmp_path / "absent")):
        command = [sys.executable, "-m", "jqserve.cli.server", "--port", "0", "--model-path", path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
