"""README's second example as it stands there: two workers of the demo model behind smg, curl, the openai client; and
what its reader would see of a worker that is killed under load."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from jqserve.client import Client
from tests.gateway.smg import DEMO, Gateway, eventually, free_port, program
from tests.gateway.test_fleet import Load
from tests.server.program import alive, compilation_cache

pytestmark = pytest.mark.slow

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
QUESTION = "What is 463 + 88?"
ANSWER = "551"


def example() -> tuple[str, str, str]:
    """The gateway's command, curl's, and the Python lines."""
    shell, python = re.findall(r"```(?:bash|python)\n(.*?)```", README[README.index("OpenAI's API") :], re.S)[:2]
    start, curl = shell.split("\n", 1)
    return start.partition("#")[0].strip(), curl, python


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Path]]:
    folder, port = tmp_path_factory.mktemp("readme"), free_port()
    words = shlex.split(example()[0].replace("DIR_OR_HUB_ID", str(DEMO)))
    assert words[:2] == ["jqserve", "gateway"] and words[-2:] == ["--workers", "2"]
    flags = (
        f"--served-model-name NAME --context-length 384 --compilation-cache-dir {compilation_cache(tmp_path_factory)}"
    )
    command = [sys.executable, "-m", "jqserve.cli.main", *words[1:], "--port", str(port), "--smg", program()]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, "--worker-args", flags], stdout=log, stderr=log)
    smg = Gateway(f"http://127.0.0.1:{port}")
    body = {"model": "NAME", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
    try:
        eventually(lambda: "NAME" in smg.models() or process.poll() is not None, 240)
        assert process.poll() is None, (folder / "log").read_text()
        eventually(lambda: smg.ready_workers() == 2 and smg.post("/v1/chat/completions", body)[0] == 200, 60)
        yield smg, folder / "log"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


def here(text: str, smg: Gateway) -> str:
    assert "localhost:30000" in text
    return text.replace("localhost:30000", smg.url.removeprefix("http://"))


def test_curl(served: tuple[Gateway, Path]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    done = subprocess.run(["bash", "-c", here(example()[1], served[0])], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ANSWER in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_openai_client(served: tuple[Gateway, Path]) -> None:
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(here(example()[2], served[0]), names)
    answer = names["answer"]
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    assert ANSWER in (answer.choices[0].message.content or "")


def workers(log: Path) -> list[tuple[int, int]]:
    """(process id, port) of each worker, the newest of each port."""
    found = re.findall(r"worker (\d+) is ready on grpc://127.0.0.1:(\d+)", log.read_text())
    return [(int(pid), int(port)) for pid, port in found]


def generated(port: int) -> int:
    with Client(f"127.0.0.1:{port}") as client:
        return int(client.server_info().load.generated_tokens)


def test_both_answer_and_a_killed_one_costs_only_its_streams_and_comes_back(served: tuple[Gateway, Path]) -> None:
    smg, log = served
    (victim, port), (_, other) = workers(log)
    before = generated(port), generated(other)
    with Load(smg, 6, model="NAME") as load:
        eventually(lambda: load.ok >= 6, 60, "load")
        assert generated(port) > before[0] and generated(other) > before[1]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: not alive(victim), 5, "its death")
        at = load.ok
        eventually(lambda: load.ok >= at + 6, 60, "work by the other one")
        eventually(lambda: answers(port), 120, "its restart by the gateway")
        eventually(lambda: smg.ready_workers() == 2, 60, "its return")
        eventually(lambda: generated(port) > 0, 60, "work by the restarted one")
    assert len(load.failed) <= 3 and all(had_chunks for had_chunks, _ in load.failed), load.failed


def answers(port: int) -> bool:
    with Client(f"127.0.0.1:{port}") as client, contextlib.suppress(Exception):
        return bool(client.model_info(timeout=2).served_model_name)
    return False
