"""Two workers with the echoing engine behind a real smg: balance, errors, tool calls, kill -9, drain, restart."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jqserve.client import Client
from tests.gateway.smg import Gateway, Worker, eventually, gateway

pytestmark = pytest.mark.slow

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
PROMPT = {"model": "echo", "prompt": "one two three", "max_tokens": 60}  # no token in it ends the echo


class Fleet:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers = [self.worker(f"w{i}") for i in range(2)]

    def worker(self, name: str, port: int = 0) -> Worker:
        return Worker(self.folder, name, port=port, token_seconds=0.01)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Gateway]]:
    folder = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(folder)
    try:
        for worker in fleet.workers:
            worker.wait_until_ready()
        urls = [worker.url for worker in fleet.workers]
        flags = ("--policy", "round_robin", "--tool-call-parser", "qwen")
        with gateway(folder, urls, "echo", *flags) as running:
            yield fleet, running
    finally:
        for worker in fleet.workers:
            worker.end()


def body(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "max_tokens": 20, **fields}


def served(worker: Worker) -> int:
    with Client(f"127.0.0.1:{worker.port}") as client:
        return int(client.server_info().load.steps)


def test_requests_are_balanced(fleet: tuple[Fleet, Gateway]) -> None:
    workers, smg = fleet
    before = [served(w) for w in workers.workers]
    answers = [smg.post(CHAT, body(max_tokens=4)) for _ in range(8)]
    assert {status for status, _ in answers} == {200}
    assert all(answer["usage"]["completion_tokens"] == 4 for _, answer in answers)
    each = [served(w) - b for w, b in zip(workers.workers, before)]
    assert min(each) >= 3 * 4, each  # steps; the four requests of each have four tokens apiece


def test_errors_reach_the_client_once_and_as_what_they_are(fleet: tuple[Fleet, Gateway]) -> None:
    _, smg = fleet
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    status, answer = smg.post(CHAT, body(response_format=schema))  # this engine has no grammars
    assert status == 400 and "grammar" in str(answer)
    status, answer = smg.post(CHAT, body("word " * 600))
    assert status == 400 and "512" in str(answer)


def test_tool_calls_are_parsed(fleet: tuple[Fleet, Gateway]) -> None:
    """The engine echoes the prompt, and so the call that is written in it."""
    _, smg = fleet
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    request = body(call, max_tokens=400, tools=[{"type": "function", "function": function}])
    status, answer = smg.post(CHAT, request)
    assert status == 200, answer
    choice = answer["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add", answer


class Load:
    """Closed loops of requests, streamed and not; what became of each."""

    def __init__(self, smg: Gateway, threads: int, model: str = "echo") -> None:
        self.ok = 0
        self.failed: list[tuple[bool, str]] = []  # (had it chunks in flight, what)
        self._smg = smg
        self._body = {**PROMPT, "model": model, "ignore_eos": True}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._loop, args=(i,), daemon=True) for i in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a request hangs"

    def _loop(self, index: int) -> None:
        while not self._stop.is_set():
            chunks, error = 0, ""
            try:
                if index % 2:
                    status, answer = self._smg.post(PLAIN, self._body)
                    if status != 200 or answer["usage"]["completion_tokens"] != 60:
                        error = f"{status} {answer}"
                else:
                    finish = None
                    for event in self._smg.stream(PLAIN, self._body):
                        if "error" in event:
                            error = str(event)
                            break
                        chunks += 1
                        finish = event["choices"][0]["finish_reason"] or finish
                    error = error or ("" if finish == "length" else f"ended with {finish}")
            except OSError as failure:
                error = repr(failure)
            with self._lock:
                if error:
                    self.failed.append((chunks > 0, error))
                else:
                    self.ok += 1


def test_a_killed_worker_costs_only_its_streams_and_comes_back(fleet: tuple[Fleet, Gateway]) -> None:
    workers, smg = fleet
    victim = workers.workers[0]
    with Load(smg, 6) as load:
        eventually(lambda: load.ok >= 6, 30, "load")
        victim.process.kill()
        victim.process.wait()
        at = load.ok
        eventually(lambda: load.ok >= at + 12, 60, "work by the other one")
        workers.workers[0] = again = workers.worker("w0", victim.port)
        again.wait_until_ready()
        eventually(lambda: smg.ready_workers() == 2, 30, "the restarted worker's return")
        before = served(again)
        eventually(lambda: served(again) > before + 60, 60, "work by the restarted worker")
    # At most the three streaming loops had chunks in flight; nobody else may notice.
    assert load.ok >= 18 and len(load.failed) <= 3 and all(had_chunks for had_chunks, _ in load.failed), load.failed


def test_sigterm_drains_without_a_failure(fleet: tuple[Fleet, Gateway]) -> None:
    workers, smg = fleet
    leaving = workers.workers[1]
    with Load(smg, 6) as load:
        eventually(lambda: load.ok >= 6, 30, "load")
        leaving.process.send_signal(signal.SIGTERM)
        assert leaving.process.wait(20) == 0
        at = load.ok
        eventually(lambda: load.ok >= at + 6, 60, "work by the other one")
        time.sleep(0.2)
    assert load.failed == []
