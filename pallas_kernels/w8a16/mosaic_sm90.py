"""w8a16_matmul on Hopper: the two kernels of `pallas_kernels.a16` behind the op's own arguments."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.a16 import run


@functools.partial(jax.jit, static_argnames=("group_size", "layout"))
def decode(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
) -> jax.Array:
    """See `api.w8a16_matmul`; small M, weights streamed once. Raises NotImplementedError for what it cannot take."""
    return run.decode(
        run.prepare("w8a16_matmul", x, qweight, scale, zero, None, perm, group_size, layout, four_bit=False)
    )


@functools.partial(jax.jit, static_argnames=("group_size", "layout"))
def wgmma(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
) -> jax.Array:
    """See `api.w8a16_matmul`; any M, dequantized in registers. Raises NotImplementedError for what it cannot take."""
    return run.wgmma(
        run.prepare("w8a16_matmul", x, qweight, scale, zero, None, perm, group_size, layout, four_bit=False)
    )
