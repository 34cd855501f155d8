"""w4a16_matmul on Hopper: the kernels of `pallas_kernels.a16` behind the op's own arguments.

Not jitted here: the choice of a config must be made anew each time the op is traced (`tuning`). The kernels are.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.a16.run import Prepared, prepare


def matmul(
    kernel: Callable[[Prepared], jax.Array],
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
    """See `api.w4a16_matmul`. kernel: of `run.KERNELS`. Raises NotImplementedError for what it cannot take."""
    return kernel(prepare("w4a16_matmul", x, qweight, scale, zero, offset, perm, group_size, layout, four_bit=True))
