"""The server's ablation switches, from the command line to the engine: each switches its one thing, and no token."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from jqserve.cli.server import parser, server_config
from jqserve.engine.assemble import assemble
from jqserve.engine.config import NO_COMMAND_BUFFERS, EngineConfig
from jqserve.engine.process import prepare_xla
from tests.engine.conftest import complete, prompt, request

SHARED = prompt(40, 7)
FLAGS = ("--max-running-requests", "3", "--context-length", "128", "--chunked-prefill-size", "64")


def config(*flags: str) -> EngineConfig:
    return EngineConfig.from_json(server_config(parser().parse_args([*FLAGS, *flags])).engine)


def switches(core: Any) -> dict[str, Any]:
    scheduler = core.scheduler
    return {"overlap": core.overlap, "mixed": scheduler.mixed, "prefix": scheduler.prefix_cache, "K": scheduler.steps}


def tokens(core: Any) -> tuple[dict[int, list[int]], dict[str, bool]]:
    """(the answers, what was seen to happen): prompts that begin alike, more of them than run at once."""
    seen = {"mixed": False, "K": False}
    schedule = core.scheduler.schedule

    def watched() -> Any:
        plan = schedule()
        seen["mixed"] |= bool(plan.decodes and plan.chunks)
        seen["K"] |= plan.steps > 1
        return plan

    core.scheduler.schedule = watched
    requests = [request(i, SHARED[: 40 - 4 * i] + prompt(3 + 5 * i, i), max_new_tokens=9 + 4 * i) for i in range(6)]
    found = {rid: outcome.tokens for rid, outcome in complete(core, requests).items()}
    return found, seen | {"prefix": core.scheduler.cached_tokens > 0}


@pytest.fixture(scope="module")
def make(model: Any, params: Any) -> Callable[..., Any]:
    return lambda *flags: assemble(config(*flags), model, params)


@pytest.fixture(scope="module")
def usual(make: Callable[..., Any]) -> dict[int, list[int]]:
    core = make()
    assert switches(core) == {"overlap": True, "mixed": True, "prefix": True, "K": 1}
    found, seen = tokens(core)
    assert seen == {"mixed": True, "K": False, "prefix": True}
    return found


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--disable-overlap-schedule",), {"overlap": False}),
        (("--disable-mixed-chunk",), {"mixed": False}),
        (("--disable-radix-cache",), {"prefix": False}),
        (("--num-continuous-decode-steps", "4"), {"K": 4}),
        (
            ("--disable-overlap-schedule", "--disable-mixed-chunk", "--disable-radix-cache"),
            {"overlap": False, "mixed": False, "prefix": False},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_switch_does_what_it_says_and_changes_no_token(
    make: Callable[..., Any], usual: dict[int, list[int]], flags: tuple[str, ...], changed: dict[str, Any]
) -> None:
    core = make(*flags)
    assert switches(core) == {"overlap": True, "mixed": True, "prefix": True, "K": 1} | changed
    found, seen = tokens(core)
    assert found == usual
    expected = {"mixed": True, "K": False, "prefix": True} | changed
    assert seen == {name: bool(expected[name]) for name in seen}


def test_cuda_graphs_are_switched_off_where_xla_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the engine's process uses jax; what the user has set stays."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    prepare_xla(config())
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/x"
    prepare_xla(config("--disable-cuda-graph"))
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=/x", NO_COMMAND_BUFFERS]
