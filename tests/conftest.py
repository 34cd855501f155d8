"""Fixtures shared by all tests. JAX runs on the CPU here unless JAX_PLATFORMS says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network
# Two test workers share two cores: one intra-op thread each keeps timings and memory predictable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


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
