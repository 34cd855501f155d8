"""Public ops: quantize_rows, rms_norm_quantize, silu_mul_quantize."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.ahead import Ahead
from pallas_kernels.quantize import mosaic_sm90, reference

_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
_QDTYPES = (jnp.int8, jnp.float8_e4m3fn)


def quantize_rows(
    x: jax.Array,
    qdtype: jax.typing.DTypeLike,
    *,
    block: int | None = None,
    divisor: float,
    static_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes each row (or each 1x`block` run of a row) of x symmetrically by its largest magnitude.

    scale = max|x| / divisor (1 where that is 0), xq = clamp(round_half_even(x / scale)) to [-128, 127] for int8;
    for fp8 clamp(x / scale) to +-448, then a cast (round half even).

    Args:
      x: [M, K] bfloat16, float16 or float32; M may be 0.
      qdtype: int8 or float8_e4m3fn.
      block: None for one scale a row, or the run length along K (128); the last run may be shorter.
      divisor: what the largest magnitude maps to: 448 for fp8, 127 or 127.5 for int8.
      static_scale: float32 scalar or [1, 1]: use this scale (calibrated offline) instead of measuring; no block then.
      implementation: name of one implementation, None chooses.

    Returns: xq [M, K] in qdtype and the float32 scale: [M, 1], or [M, ceil(K/block)], or [1, 1] with static_scale.
      A NaN or infinity in x makes the scale of its own row (run) NaN or infinite and leaves the others alone.

    Raises ValueError for shapes, dtypes or options outside the above.
    """
    _check("quantize_rows", x, qdtype, block, divisor)
    if static_scale is not None:
        if block is not None:
            raise ValueError("quantize_rows: static_scale is one scale per tensor; it takes no block")
        if jnp.size(static_scale) != 1:
            raise ValueError(f"quantize_rows: static_scale must be a scalar or [1, 1], got {jnp.shape(static_scale)}")
        static_scale = jnp.asarray(static_scale, jnp.float32).reshape(1, 1)
    return dispatch.call(
        "quantize_rows", implementation, x, qdtype, block=block, divisor=divisor, static_scale=static_scale
    )


def rms_norm_quantize(
    x: jax.Array,
    weight: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float,
    qdtype: jax.typing.DTypeLike,
    block: int | None = None,
    divisor: float,
    ahead: Ahead | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Residual add, RMSNorm and quantization in one pass over memory.

    r = x + residual (rounded to x.dtype), y = r / sqrt(mean(r^2) + eps) * weight in float32 (not rounded to x.dtype
    on the way), then as in `quantize_rows`.

    Args:
      x: [M, K] bfloat16, float16 or float32. residual: the same shape and dtype, or None.
      weight: [K], any float dtype (Gemma's 1 + w is the caller's affair). eps: > 0.
      qdtype, block, divisor, implementation: as in `quantize_rows`.
      ahead: weights of the next kernel to bring into L2 meanwhile (`pallas_kernels.ahead`); changes no result.

    Returns: (xq [M, K] qdtype, scale float32 [M, 1] or [M, ceil(K/block)], r [M, K] in x.dtype; x without residual).
    Raises ValueError for other shapes, dtypes or options.
    """
    _check("rms_norm_quantize", x, qdtype, block, divisor)
    if weight.shape != (x.shape[1],):
        raise ValueError(f"rms_norm_quantize: weight must be {(x.shape[1],)}, got {weight.shape}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm_quantize: residual must be {x.dtype}{x.shape} like x, got {residual.dtype}{residual.shape}"
        )
    return dispatch.call(
        "rms_norm_quantize",
        implementation,
        x,
        weight,
        residual,
        eps=eps,
        qdtype=qdtype,
        block=block,
        divisor=divisor,
        ahead=ahead,
    )


def silu_mul_quantize(
    gate_up: jax.Array,
    *,
    qdtype: jax.typing.DTypeLike,
    block: int | None = None,
    divisor: float,
    ahead: Ahead | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """SwiGLU's product and its quantization in one pass: y = silu(gate) * up in float32, then as in `quantize_rows`.

    Args:
      gate_up: [M, 2F] bfloat16, float16 or float32; gate is the first half of each row, up the second.
      qdtype, block, divisor, implementation: as in `quantize_rows`. ahead: as in `rms_norm_quantize`.

    Returns: (xq [M, F] qdtype, scale float32 [M, 1] or [M, ceil(F/block)]).
    Raises ValueError for other shapes, dtypes or options.
    """
    _check("silu_mul_quantize", gate_up, qdtype, block, divisor)
    if gate_up.shape[1] % 2:
        raise ValueError(f"silu_mul_quantize: gate_up must be [M, 2F], got {gate_up.shape}")
    return dispatch.call(
        "silu_mul_quantize", implementation, gate_up, qdtype=qdtype, block=block, divisor=divisor, ahead=ahead
    )


def _check(op: str, x: jax.Array, qdtype: jax.typing.DTypeLike, block: int | None, divisor: float) -> None:
    if x.ndim != 2 or x.dtype not in _FLOATS:
        raise ValueError(f"{op}: want a 2-d bfloat16, float16 or float32 array, got {x.dtype}{x.shape}")
    if jnp.dtype(qdtype) not in _QDTYPES:
        raise ValueError(f"{op}: qdtype must be int8 or float8_e4m3fn, got {qdtype}")
    if block is not None and block <= 0:
        raise ValueError(f"{op}: block must be None or positive, got {block}")
    if not divisor > 0:
        raise ValueError(f"{op}: divisor must be positive, got {divisor}")


for _op in ("quantize_rows", "rms_norm_quantize", "silu_mul_quantize"):
    dispatch.register(
        _op,
        [
            dispatch.Implementation("mosaic_sm90", getattr(mosaic_sm90, _op), dispatch.hopper_only),
            dispatch.Implementation("xla", getattr(reference, _op)),
        ],
    )
