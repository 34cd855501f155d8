"""Keeping the host near the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax


class Pace:
    """Lets the host be one step ahead. What a program reads and makes stays in the device's memory until the program is
    done, and the host calls programs faster than they compute: 32 chunks could be there where one was needed."""

    def __init__(self) -> None:
        self._last: Any = None

    def step(self, result: Any) -> None:
        """result: what the step that was just called computes, and no one donates. Waits for the step before it."""
        jax.block_until_ready(self._last)
        self._last = result


def in_steps(function: Callable[[Any], jax.Array], items: Iterable[Any]) -> list[jax.Array]:
    """function of each item, at a `Pace`."""
    pace, results = Pace(), []
    for item in items:
        results.append(function(item))
        pace.step(results[-1])
    return results
