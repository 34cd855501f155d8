"""What calibration sums up over the input of a Linear: second moments, absolute means, maxima."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.quantize.compiled import compiled

#: name -> array: "hessian" [K, K] and "carry" [K, K], "mean" and "mean_carry" [K], "largest" [K]
Moments = dict[str, jax.Array]


def start(k: int, *, hessian: bool) -> Moments:
    """Nothing seen yet. `hessian`: also the second moment, which takes two [K, K] float32 matrices."""
    vectors = {name: jnp.zeros(k, jnp.float32) for name in ("mean", "mean_carry", "largest")}
    square = {name: jnp.zeros((k, k), jnp.float32) for name in ("hessian", "carry")} if hessian else {}
    return {**vectors, **square}


@functools.partial(compiled, donate_argnums=0)
def add(moments: Moments, x: Any) -> Moments:
    """Adds the rows of x [..., K].

    Products of bfloat16 values are exact in float32; float32 inputs are multiplied in full precision. Sums over chunks
    are compensated (a carry holds what rounding lost), so that 512 chunks in whatever cut give the same to a few units
    in the last place, and in the same cut the same bits.
    """
    x = x.reshape(-1, x.shape[-1])
    size = jnp.abs(x.astype(jnp.float32))
    found = {"largest": jnp.maximum(moments["largest"], size.max(axis=0))}
    found["mean"], found["mean_carry"] = _two_sum(moments["mean"], moments["mean_carry"], size.sum(axis=0))
    if "hessian" in moments:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        own = lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        found["hessian"], found["carry"] = _two_sum(moments["hessian"], moments["carry"], own)
    return found


@compiled
def finish(moments: Moments, rows: float) -> Moments:
    """Sums over `rows` rows -> means: {"mean" [K], "largest" [K], "hessian" [K, K] (where it was asked for)}."""
    done = {"mean": (moments["mean"] + moments["mean_carry"]) / rows, "largest": moments["largest"]}
    if "hessian" in moments:
        done["hessian"] = (moments["hessian"] + moments["carry"]) / rows
    return done


@functools.partial(compiled, donate_argnums=0)
def rescaled(hessian: jax.Array, scale: jax.Array) -> jax.Array:
    """The second moment [K, K] of x / scale, from that of x."""
    return hessian / (scale[:, None] * scale[None, :])


def _two_sum(total: jax.Array, carry: jax.Array, more: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Knuth's exact sum: total + more = new + error."""
    new = total + more
    part = new - total
    return new, carry + ((total - (new - part)) + (more - part))
