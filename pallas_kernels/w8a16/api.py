"""Public op: y = x @ W^T for W in int8, uint8 or fp8 with scales."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.a16 import layout as layouts
from pallas_kernels.a16 import run
from pallas_kernels.w8a16 import choice, mosaic_sm90, reference

X_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
Q_DTYPES = (jnp.int8, jnp.uint8, jnp.float8_e4m3fn)


def w8a16_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies float activations by an 8-bit weight: y[m,n] = sum_k x[m,k] * W[n,k], W = (q - zero) * scale.

    Args:
      x: [M, K] bfloat16, float16 or float32. M may be 0.
      qweight: canonical: [N, K] int8, uint8 or float8_e4m3fn.
      scale: float [N, G] with G = ceil(K / group_size), [N, 1] per channel, or [1, 1] per tensor.
      zero: the same shape as `scale` (or [N, 1], [1, 1]), any integer dtype; None is 0 for int8 and fp8, 128 for uint8.
      perm: int32 [K]; the product takes x[:, perm] (act-order: rows of W sorted by group).
      group_size: elements of K that share a scale; -1 is K.
      layout: the name given to `layout.to_layout`; in another layout than "canonical" the three arrays are as it
        returned them.
      implementation: name of one implementation (see `pallas_kernels.explain`), None chooses.

    Returns: [M, N] in x's dtype; sums are in float32. W is rounded to x's dtype at most once, except that the wgmma
      kernel rounds scales of another dtype than x's to it first.

    Raises ValueError for shapes or dtypes outside the above.
    """
    _check(x, qweight, scale, zero, perm, group_size, layout)
    return dispatch.call(
        "w8a16_matmul", implementation, x, qweight, scale, zero, perm=perm, group_size=group_size, layout=layout
    )


def _check(x, qweight, scale, zero, perm, group_size, layout) -> None:
    if x.ndim != 2 or x.dtype not in X_DTYPES:
        raise ValueError(f"w8a16_matmul: x must be [M, K] bfloat16, float16 or float32, got {x.dtype} {x.shape}")
    k = x.shape[1]
    if group_size != -1 and group_size < 1:
        raise ValueError(f"w8a16_matmul: group_size must be positive, or -1 for K, got {group_size}")
    if perm is not None and (perm.shape != (k,) or perm.dtype != jnp.int32):
        raise ValueError(f"w8a16_matmul: perm must be int32 {(k,)}, got {perm.dtype} {perm.shape}")
    if choice.parse(layout) is not None:
        layouts.check_packed("w8a16_matmul", qweight.shape, k, group_size, 16)
        return
    if qweight.ndim != 2 or qweight.dtype not in Q_DTYPES or qweight.shape[1] != k:
        raise ValueError(
            f"w8a16_matmul: qweight must be int8, uint8 or float8_e4m3fn [N, {k}], got {qweight.dtype} {qweight.shape}"
        )
    n, groups = qweight.shape[0], 1 if group_size == -1 else -(-k // group_size)
    for name, a in (("scale", scale), ("zero", zero)):
        if a is not None and a.shape not in ((n, groups), (n, 1), (1, 1)):
            raise ValueError(f"w8a16_matmul: {name} must be {(n, groups)}, {(n, 1)} or (1, 1), got {a.shape}")
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"w8a16_matmul: scale must be a float dtype, got {scale.dtype}")
    if zero is not None and not jnp.issubdtype(zero.dtype, jnp.integer):
        raise ValueError(f"w8a16_matmul: zero must be an integer dtype, got {zero.dtype}")


_CODE: tuple[Callable[..., Any], ...] = (
    *(functools.partial(mosaic_sm90.matmul, kernel) for kernel in run.KERNELS),
    reference.w8a16_matmul,
)
dispatch.register(choice.OP, [candidate.run_by(fn) for candidate, fn in zip(choice.CANDIDATES, _CODE, strict=True)])
