"""Fixtures shared by all tests. JAX runs on the CPU here unless JAX_PLATFORMS says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network
# Two test workers share two cores: one intra-op thread each keeps timings and memory predictable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

for name in ("http_proxy", "https_proxy", "grpc_proxy"):  # a bare gRPC channel would go through it to this very machine
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)

REPOSITORY = Path(__file__).resolve().parent.parent

#: whole commands, gateways, crashes, small benches: `make integration`, so that `make test` stays under ten minutes
INTEGRATION = (
    "tests/bench/test_kernels_bench.py",
    "tests/bench/test_sanitize.py",
    "tests/bench/test_serve_bench.py",
    "tests/bench/test_soak.py",
    "tests/engine/test_budget.py",
    "tests/engine/test_compile_cache.py",
    "tests/engine/test_split.py",
    "tests/engine/test_step_kernels.py",
    "tests/evaluate/",
    "tests/gateway/",
    "tests/quantize/",
    "tests/server/test_hostile.py",
)
#: files of minutes: they come first, or one worker ends long after the other
LONGEST = ("tests/server/test_end_to_end.py", "tests/evaluate/test_flow.py", "tests/e2e/", "tests/gateway/test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def path(item: pytest.Item) -> str:
        return item.path.relative_to(REPOSITORY).as_posix()

    for item in items:
        if path(item).startswith(INTEGRATION):
            item.add_marker(pytest.mark.integration)
    items.sort(key=lambda item: not path(item).startswith(LONGEST))


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """../shared/fixtures: checkpoints made by the peers' own tools, with reference logits."""
    path = REPOSITORY.parent / "shared" / "fixtures"
    if not path.is_dir():
        pytest.skip(f"{path} is absent: the peers' checkpoints are not part of this repository")
    return path


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The GPTQ 4-bit model that ships with the package."""
    return REPOSITORY / "jqserve" / "demo" / "model"
