"""The demo: starts `jqserve-server` on the shipped 4-bit model, asks it several things at once, and stops it again.

The model is tiny (5.8 million parameters, trained on short checkable tasks): it shows the path, not what models can do.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jqserve.client import AsyncClient, AsyncStream, ServerError

QUESTIONS = (
    "Short story about Nina the horse, the garden and a stone.",
    "What is 463 + 88?",
    "Sort in descending order: 79, 39, 9",
    "Spell the word signal.",
    "Which is larger, 679 or 26?",
    "Make JSON from this: Bob is 90 years old.",
    "What is the month before December?",
    "Copy this sentence: My friend found the red clock after lunch.",
)
START_TIMEOUT = 600.0  # seconds; compiling takes most of it on a slow machine
#: few shapes to compile, so that it starts soon on two cores
SERVER_FLAGS = ("--port", "0", "--max-running-requests", str(len(QUESTIONS)), "--chunked-prefill-size", "64")


def start_server(ready_file: Path) -> subprocess.Popen[bytes]:
    """Its standard output (the load plan, the address) goes to ours."""
    command = [sys.executable, "-m", "jqserve.cli.server", *SERVER_FLAGS, "--ready-file", str(ready_file)]
    command += ["--log-level", os.environ.get("JQSERVE_DEMO_LOG_LEVEL", "warning")]
    print("$ jqserve-server", *SERVER_FLAGS, flush=True)
    return subprocess.Popen(command)


def wait_until_ready(server: subprocess.Popen[bytes], ready_file: Path) -> str:
    """The address. Raises RuntimeError when the server ends or takes too long."""
    began = time.monotonic()
    while not ready_file.exists():
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode} before it was ready")
        if time.monotonic() - began > START_TIMEOUT:
            raise RuntimeError(f"the server was not ready after {START_TIMEOUT:.0f} s")
        time.sleep(0.05)
    facts = json.loads(ready_file.read_text())
    print(f"ready after {time.monotonic() - began:.1f} s\n", flush=True)
    return f"{facts['host']}:{facts['port']}"


class Answer:
    """One request; its text is collected as it comes, so that it can be shown in turn while all run at once."""

    def __init__(self, question: str, stream: AsyncStream) -> None:
        self.question = question
        self.stream = stream
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()

    async def collect(self) -> None:
        try:
            async for text in self.stream:
                self.pieces.put_nowait(text)
        finally:
            self.pieces.put_nowait(None)

    async def show(self) -> None:
        print(f"\033[1m{self.question}\033[0m" if sys.stdout.isatty() else f"> {self.question}")
        while (piece := await self.pieces.get()) is not None:
            print(piece, end="", flush=True)
        print("\n", flush=True)


async def ask(target: str) -> None:
    """All questions at once; prints the answers, streaming, in the questions' order, then the rate."""
    async with AsyncClient(target) as client:
        info = await client.model_info()
        print(f"{info.architecture}, {info.quantization}; {len(QUESTIONS)} chat requests at once\n", flush=True)
        began = time.monotonic()
        answers = [
            Answer(
                question,
                client.generate(
                    [{"role": "user", "content": question}],
                    temperature=0,
                    max_new_tokens=96,
                    flush_tokens=1,
                    timeout=300,
                ),
            )
            for question in QUESTIONS
        ]
        tasks = [asyncio.create_task(answer.collect()) for answer in answers]
        finished = asyncio.gather(*tasks)
        ended = asyncio.create_task(clock(finished))
        for answer in answers:
            await answer.show()
        seconds = await ended - began
        results = [answer.stream.result for answer in answers]
        tokens = sum(result.completion_tokens for result in results)
        first = sorted(result.choices[0].first_token_seconds for result in results)
        load = (await client.server_info()).load
    print(
        f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s over {len(results)} streams; "
        f"first token after {first[len(first) // 2] * 1000:.0f} ms (median); "
        f"{load.mean_batch:.1f} sequences in a step on average",
        flush=True,
    )


async def clock(finished: asyncio.Future[list[None]]) -> float:
    """When everything has come."""
    await finished
    return time.monotonic()


def stop_server(server: subprocess.Popen[bytes]) -> int:
    """SIGTERM: the server finishes what runs and exits with 0."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        return server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        return 1


def main() -> int:
    """Returns 0 when everything worked, the drain included."""
    with tempfile.TemporaryDirectory() as folder:
        ready_file = Path(folder) / "ready.json"
        server = start_server(ready_file)
        try:
            asyncio.run(ask(wait_until_ready(server, ready_file)))
        except (RuntimeError, ServerError) as error:
            print(f"demo: {error}", file=sys.stderr)
            stop_server(server)
            return 1
        except BaseException:
            stop_server(server)
            raise
        code = stop_server(server)
        print(f"the server drained and exited with status {code}", flush=True)
        return code


if __name__ == "__main__":
    sys.exit(main())
