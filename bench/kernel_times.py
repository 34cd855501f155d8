"""Durations of GPU kernels by CUPTI, through the binding that JAX's CUDA plugin ships for Mosaic GPU."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any


def kernel_times(call: Callable[[], Any]) -> list[tuple[str, float]] | None:
    """(kernel, microseconds) of everything that ran on the GPU within `call`, which must wait for it; None on a CPU.

    Works with command buffers on, unlike jax.profiler, which turns them off. Durations only: there are no timestamps.
    """
    import jax

    if jax.default_backend() == "cpu":
        return None
    from jax._src.lib import mosaic_gpu

    binding = mosaic_gpu._mosaic_gpu_ext  # type: ignore[attr-defined]
    binding._cupti_init()
    try:
        call()
    finally:
        timings = binding._cupti_get_timings(True)
    return [(name, milliseconds * 1e3) for name, milliseconds in timings]


def by_kernel(timings: list[tuple[str, float]], calls: int) -> list[dict[str, Any]]:
    """One row a kernel, the costliest first: calls and microseconds per one of `calls` repetitions."""
    counts: collections.Counter[str] = collections.Counter()
    total: collections.defaultdict[str, float] = collections.defaultdict(float)
    for name, microseconds in timings:
        counts[name] += 1
        total[name] += microseconds
    return [
        {"kernel": name, "launches": round(counts[name] / calls, 2), "us": round(total[name] / calls, 2)}
        for name in sorted(total, key=total.__getitem__, reverse=True)
    ]
