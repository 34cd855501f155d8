"""How fast this device reads its memory: the denominator of every "share of the bound"."""

from __future__ import annotations

import time


def read_bandwidth() -> float | None:
    """Bytes per second of a sum over 2 GiB on the GPU, the best of ten; None on a CPU."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return None
    x = jnp.ones((2**29,), jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    times = []
    for _ in range(10):
        began = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return x.nbytes / min(times)
