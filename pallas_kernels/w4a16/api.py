"""Public op: y = x @ W^T for W packed in 4 bits with group scales."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.a16 import layout as layouts
from pallas_kernels.a16 import run
from pallas_kernels.w4a16 import choice, mosaic_sm90, reference

X_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def w4a16_matmul(
    x: jax.Array,
    qweight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    offset: jax.Array | None = None,
    perm: jax.Array | None = None,
    group_size: int,
    layout: str = "canonical",
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies float activations by a 4-bit weight: y[m,n] = sum_k x[m,k] * W[n,k].

    W[n,k] = (u - zero) * scale, where u = 0..15 is the stored nibble; without `zero` and `offset` the zero is 8
    (symmetric, q + 8); with `offset`, W = (u - 8) * scale + offset (torchao's int4wo).

    Args:
      x: [M, K] bfloat16, float16 or float32. M may be 0.
      qweight: canonical: uint8 [N, K/2], the low nibble is the even k.
      scale: [N, G] float, G = ceil(K / group_size); [1, 1] also serves a single scale for all.
      zero: uint8 [N, G], or None.
      offset: float [N, G], or None. Not together with `zero`.
      perm: int32 [K]; the product takes x[:, perm] (act-order: rows of W sorted by group).
      group_size: elements of K that share a scale; -1 is K.
      layout: the name given to `layout.to_layout`; in another layout than "canonical" the four arrays are as it
        returned them.
      implementation: name of one implementation (see `pallas_kernels.explain`), None chooses.

    Returns: [M, N] in x's dtype; sums are in float32. W is rounded to x's dtype at most once, except that the wgmma
      kernel rounds scales of another dtype than x's to it first.

    Raises ValueError for shapes or dtypes outside the above.
    """
    _check(x, qweight, scale, zero, offset, perm, group_size, layout)
    return dispatch.call(
        "w4a16_matmul",
        implementation,
        x,
        qweight,
        scale,
        zero,
        offset=offset,
        perm=perm,
        group_size=group_size,
        layout=layout,
    )


def _check(x, qweight, scale, zero, offset, perm, group_size, layout) -> None:
    if x.ndim != 2 or x.dtype not in X_DTYPES:
        raise ValueError(f"w4a16_matmul: x must be [M, K] bfloat16, float16 or float32, got {x.dtype} {x.shape}")
    k = x.shape[1]
    if group_size != -1 and group_size < 1:
        raise ValueError(f"w4a16_matmul: group_size must be positive, or -1 for K, got {group_size}")
    if zero is not None and offset is not None:
        raise ValueError("w4a16_matmul: give zero or offset, not both")
    if perm is not None and (perm.shape != (k,) or perm.dtype != jnp.int32):
        raise ValueError(f"w4a16_matmul: perm must be int32 {(k,)}, got {perm.dtype} {perm.shape}")
    if choice.parse(layout) is not None:
        layouts.check_packed("w4a16_matmul", qweight.shape, k, group_size, 8)
        return
    if qweight.ndim != 2 or qweight.dtype != jnp.uint8 or 2 * qweight.shape[1] != k:
        raise ValueError(f"w4a16_matmul: qweight must be uint8 [N, {k / 2:g}], got {qweight.dtype} {qweight.shape}")
    n, groups = qweight.shape[0], 1 if group_size == -1 else -(-k // group_size)
    wanted = ((n, groups), (1, 1)) if groups == 1 else ((n, groups),)
    for name, a in (("scale", scale), ("zero", zero), ("offset", offset)):
        if a is None:
            continue
        if a.shape not in wanted:
            raise ValueError(f"w4a16_matmul: {name} must be {(n, groups)}, got {a.shape}")
        if name == "zero" and a.dtype != jnp.uint8:
            raise ValueError(f"w4a16_matmul: zero must be uint8, got {a.dtype}")
        if name != "zero" and not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"w4a16_matmul: {name} must be a float dtype, got {a.dtype}")


_CODE: tuple[Callable[..., Any], ...] = (
    *(functools.partial(mosaic_sm90.matmul, kernel) for kernel in run.KERNELS),
    reference.w4a16_matmul,
)
dispatch.register(choice.OP, [candidate.run_by(fn) for candidate, fn in zip(choice.CANDIDATES, _CODE, strict=True)])
