"""Places for small buffers (`engine/places`): how large they are, and that nobody fails for want of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jqserve.engine import places as module
from jqserve.engine.places import LARGEST, SHARE, hold_places, places


class Gpu:
    platform = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 2**36}


@pytest.mark.parametrize("memory", [0, 2**20, 22 * 2**30, 140 * 10**9])
def test_places_take_a_hundredth_at_most_in_whole_sizes(memory: int) -> None:
    sizes = places(memory)
    assert sum(sizes) <= memory // SHARE
    assert sizes == sorted(sizes)
    assert all(sizes.count(size) >= 2 and size & (size - 1) == 0 for size in sizes)


def test_a_large_device_has_places_for_the_logits_of_256_rows() -> None:
    assert max(places(140 * 10**9)) == 1 << LARGEST >= 256 * 128256 * 4


def test_every_place_lies_between_buffers_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def put(x: np.ndarray, device: Any) -> np.ndarray:
        made.append(x.nbytes)
        return x

    monkeypatch.setattr(jax, "device_put", put)
    kept = hold_places(Gpu())
    assert made[1::2] == places(2**36)
    assert made[::2] == [1] * len(kept)
    assert len(kept) == len(places(2**36)) + 1


def test_a_cpu_and_a_full_device_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hold_places(jax.devices("cpu")[0]) == []

    def full(x: np.ndarray, device: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(module.jax, "device_put", full)
    assert hold_places(Gpu()) == []
