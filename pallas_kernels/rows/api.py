"""Public ops: rms_norm and silu_mul, for models whose activations stay 16-bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.ahead import Ahead
from pallas_kernels.quantize import mosaic_sm90
from pallas_kernels.rows import reference

_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float,
    ahead: Ahead | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Residual add and RMSNorm in one pass over memory.

    r = x + residual (rounded to x.dtype), u = r / sqrt(mean(r^2) + eps) in float32, rounded to x.dtype, y = u * weight,
    as Hugging Face's Llama does it.

    Args:
      x: [M, K] bfloat16, float16 or float32. residual: the same shape and dtype, or None.
      weight: [K], any float dtype, rounded to x.dtype. eps: > 0, in the units of x squared.
      ahead: weights of the next kernel to bring into L2 meanwhile (`pallas_kernels.ahead`); changes no result.
      implementation: name of one implementation (see `pallas_kernels.explain`), None chooses.

    Returns: (y, r), [M, K] in x.dtype each; without residual r is x. Raises ValueError for other shapes or dtypes.
    """
    if x.ndim != 2 or x.dtype not in _FLOATS:
        raise ValueError(f"rms_norm: want a 2-d bfloat16, float16 or float32 array, got {x.dtype}{x.shape}")
    if weight.shape != (x.shape[1],):
        raise ValueError(f"rms_norm: weight must be {(x.shape[1],)}, got {weight.shape}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"rms_norm: residual must be {x.dtype}{x.shape} like x, got {residual.dtype}{residual.shape}")
    return dispatch.call("rms_norm", implementation, x, weight, residual, eps=eps, ahead=ahead)


def silu_mul(gate_up: jax.Array, *, ahead: Ahead | None = None, implementation: str | None = None) -> jax.Array:
    """SwiGLU's product: silu(gate), in float32 and rounded to the dtype, times up.

    Args:
      gate_up: [M, 2F] bfloat16, float16 or float32; gate is the first half of each row, up the second.
      ahead, implementation: as in `rms_norm`.

    Returns: [M, F] in the same dtype. Raises ValueError for other shapes or dtypes.
    """
    if gate_up.ndim != 2 or gate_up.dtype not in _FLOATS or gate_up.shape[1] % 2:
        raise ValueError(
            f"silu_mul: gate_up must be [M, 2F] of 16- or 32-bit floats, got {gate_up.dtype}{gate_up.shape}"
        )
    return dispatch.call("silu_mul", implementation, gate_up, ahead=ahead)


for _op in ("rms_norm", "silu_mul"):
    dispatch.register(
        _op,
        [
            dispatch.Implementation("mosaic_sm90", getattr(mosaic_sm90, _op), dispatch.hopper_only),
            dispatch.Implementation("xla", getattr(reference, _op)),
        ],
    )
