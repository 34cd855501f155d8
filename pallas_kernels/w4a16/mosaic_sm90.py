"""w4a16_matmul on Hopper: the three kernels of `pallas_kernels.a16` behind the op's own arguments.

Not jitted here: the choice of a config must be made anew each time the op is traced (`tuning`). The kernels are.
"""

from __future__ import annotations

import jax

from pallas_kernels.a16 import run


def held(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    offset: jax.Array | None = None,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
) -> jax.Array:
    """See `api.w4a16_matmul`; small M, many rows of W. Raises NotImplementedError for what it cannot take."""
    return run.held(
        run.prepare("w4a16_matmul", x, qweight, scale, zero, offset, perm, group_size, layout, four_bit=True)
    )


def decode(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    offset: jax.Array | None = None,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
) -> jax.Array:
    """See `api.w4a16_matmul`; small M, weights streamed once. Raises NotImplementedError for what it cannot take."""
    return run.decode(
        run.prepare("w4a16_matmul", x, qweight, scale, zero, offset, perm, group_size, layout, four_bit=True)
    )


def wgmma(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    offset: jax.Array | None = None,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
) -> jax.Array:
    """See `api.w4a16_matmul`; any M, dequantized in registers. Raises NotImplementedError for what it cannot take."""
    return run.wgmma(
        run.prepare("w4a16_matmul", x, qweight, scale, zero, offset, perm, group_size, layout, four_bit=True)
    )
