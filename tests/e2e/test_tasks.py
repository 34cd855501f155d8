"""The demo model answers its checkable tasks through gRPC as well as the peers' dequantization of it does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from jqserve.client import AsyncClient
from tests.e2e.server_process import server_process

#: task accuracy of the GPTQ 4-bit fixture, weights dequantized by GPTQModel, fp32 (shared/fixtures/README.md)
REFERENCE = 0.914


async def accuracy(target: str, tasks: list[dict[str, str]], concurrent: int = 48) -> float:
    gate = asyncio.Semaphore(concurrent)
    async with AsyncClient(target) as client:

        async def right(task: dict[str, str]) -> bool:
            async with gate:
                messages = [{"role": "user", "content": task["prompt"]}]
                result = await client.generate(messages, max_new_tokens=64, temperature=0.0, timeout=240).wait()
                return result.text.strip() == task["answer"]

        return sum(await asyncio.gather(*map(right, tasks))) / len(tasks)


@pytest.mark.slow
def test_the_demo_model_answers_its_tasks(demo_dir: Path, fixtures_dir: Path) -> None:
    tasks = [json.loads(line) for line in (fixtures_dir / "tasks_test.jsonl").read_text().splitlines()]
    assert len(tasks) == 1000
    flags = ("--context-length", "128", "--max-running-requests", "48", "--disable-warmup")
    with server_process(demo_dir, *flags) as server:
        measured = asyncio.run(accuracy(server.target, tasks))
    assert measured >= REFERENCE - 0.01, f"{measured:.1%} of the tasks, the reference gets {REFERENCE:.1%}"
