"""Round-to-nearest quantizers: [N, K] of a float dtype -> (qvalue, scale, zero_point or None), canonical.

Pure array code for numpy and, under jit, for the device. The scales of our own rules are the same bits on both; a
compiler that makes w * (1 / scale) of w / scale, as XLA's for CPUs does, puts a few codes in 10,000 on the other side
of a tie. torchao's rules round to the weight's dtype on the way: for bfloat16 the scales are torchao's on both, for
float16 and float32 they are on the host, and XLA's divisions may be a bit off on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jqserve.checkpoint.scheme import namespace
from jqserve.quant.codebook import encode
from jqserve.quant.packing import pack_uint4

Quantized = tuple[Any, Any, Any]
FP8_MAX = 448.0
#: Values that the host quantizes at a time: bounds the float32 temporaries, and keeps them in the cache.
_VALUES = 1 << 16


def fp8_channel(weight: Any) -> Quantized:
    """float8_e4m3fn, scale float32 [N, 1] = absmax / 448 of a row (torchao computes it in the weight's dtype; we do
    not). A row of zeros gets scale 1."""
    return _by_rows(lambda w: _fp8(w, _absmax(w, 1)), weight)


def fp8_tensor(weight: Any) -> Quantized:
    """float8_e4m3fn with one scale, float32 [1, 1] = absmax / 448 in the weight's own dtype: torchao's per tensor."""
    whole = _absmax(weight, None).reshape(1, 1)
    scale = _own(_divided(whole, FP8_MAX), weight.dtype)
    scale = namespace(weight).where(scale == 0, namespace(weight).float32(1), scale)
    qvalue, _, _ = _by_rows(lambda w: (_to_fp8(w, scale), scale, None), weight, scales=False)
    return qvalue, scale, None


def fp8_row(weight: Any) -> Quantized:
    """float8_e4m3fn, scale [N, 1] = absmax / 448, rounded to the weight's own dtype as torchao's PerRow does."""

    def rows(w: Any) -> Quantized:
        xp = namespace(w)
        scale = _own(_divided(_absmax(w, 1), FP8_MAX), w.dtype)
        scale = xp.where(scale == 0, xp.float32(1), scale)
        return _to_fp8(w, scale), scale, None

    return _by_rows(rows, weight)


def fp8_block(weight: Any, block: int = 128) -> Quantized:
    """float8_e4m3fn, scale float32 [ceil(N/128), ceil(K/128)] = absmax / 448 of a block (DeepSeek-V3); the last row
    and column of blocks may be partial."""

    def rows(w: Any) -> Quantized:
        xp = namespace(w)
        n, k = w.shape
        value = xp.pad(w.astype(xp.float32), ((0, -n % block), (0, -k % block)))
        tiles = value.reshape(value.shape[0] // block, block, value.shape[1] // block, block)
        absmax = xp.abs(tiles).max(axis=(1, 3))
        scale = xp.where(absmax == 0, xp.float32(1), _times_inverse(absmax, FP8_MAX))
        spread = xp.repeat(xp.repeat(scale, block, axis=0)[:n], block, axis=1)[:, :k]
        return _to_fp8(w, spread), scale, None

    return _by_rows(rows, weight, multiple=block)


def int8_channel(weight: Any) -> Quantized:
    """int8, scale float32 [N, 1] = absmax / 127 of a row; q = round half to even, in [-127, 127]."""

    def rows(w: Any) -> Quantized:
        xp = namespace(w)
        absmax = _absmax(w, 1)
        scale = xp.where(absmax == 0, xp.float32(1), _times_inverse(absmax, 127.0))
        return xp.clip(xp.round(w.astype(xp.float32) / scale), -127, 127).astype(xp.int8), scale, None

    return _by_rows(rows, weight)


def int8_torchao(weight: Any) -> Quantized:
    """torchao's symmetric int8 a row: scale = absmax / 127.5 in the weight's own dtype, at least float32's epsilon,
    q = clamp(round(w * (1 / scale)), -128, 127). Source: torchao 0.18, Int8Tensor.from_hp."""

    def rows(w: Any) -> Quantized:
        xp = namespace(w)
        least = _own(xp.full((1, 1), np.finfo(np.float32).eps, xp.float32), w.dtype)
        scale = xp.maximum(_own(_divided(_absmax(w, 1), 127.5), w.dtype), least)
        inverse = xp.float32(1) / _kept(scale)
        return xp.clip(xp.round(w.astype(xp.float32) * inverse), -128, 127).astype(xp.int8), scale, None

    return _by_rows(rows, weight)


def int4_group(weight: Any, group: int) -> Quantized:
    """uint4 around 8, groups of K: scale [N, ceil(K/group)] = absmax / 7.5 in the weight's dtype (float32 stays
    float32), q = clamp(round(w / scale), -8, 7) + 8: llm-compressor's symmetric W4A16 (FORMATS.md 1.4)."""

    def rows(w: Any) -> Quantized:
        xp = namespace(w)
        value = _grouped(w, group)
        absmax = xp.abs(value).max(axis=2)
        scale = _own(_times_inverse(absmax, 7.5), w.dtype)
        scale = xp.where(scale == 0, xp.float32(1), scale)
        q = xp.clip(xp.round(value / scale[:, :, None]), -8, 7) + 8
        return pack_uint4(q.reshape(w.shape[0], -1)[:, : w.shape[1]].astype(xp.uint8)), scale.astype(w.dtype), None

    return _by_rows(rows, weight)


def int4_tinygemm(weight: Any, group: int) -> Quantized:
    """torchao's int4wo: uint4, w = (q - 8) * scale + zero_point with a float zero point, both [N, K/group] in the
    weight's dtype: scale = (max - min) / 15, zero_point = min + 8 * scale, q = round((w - (zero_point - 8 * scale)) /
    scale), every step rounded to that dtype. Source: torchao 0.18, _choose_qparams_affine_tinygemm."""

    def rows(w: Any) -> Quantized:
        xp, own = namespace(w), w.dtype
        value = _grouped(w, group)
        low, high = value.min(axis=2), value.max(axis=2)
        least = xp.float32(ml_dtypes.finfo(own).smallest_normal)
        scale = xp.maximum(_own(_divided(_own(high - low, own), 15.0), own), least)
        zero = _own(low + _own(scale * 8, own), own)
        start = _own(zero - _own(scale * 8, own), own)[:, :, None]
        q = _own(_own(value - start, own) / _kept(scale)[:, :, None], own)
        q = xp.clip(xp.round(q), 0, 15).reshape(w.shape[0], -1).astype(xp.uint8)
        return pack_uint4(q), scale.astype(own), zero.astype(own)

    return _by_rows(rows, weight)


def codebook(weight: Any, name: str, block: int = 64) -> Quantized:
    """bitsandbytes' nf4 or fp4 with float32 scales [N, K/block] = absmax: the code nearest to w / absmax. Blocks run
    over the flat matrix there; with K a multiple of the block that is the same."""

    def rows(w: Any) -> Quantized:
        xp = namespace(w)
        value = _grouped(w, block)
        absmax = xp.abs(value).max(axis=2)
        scale = xp.where(absmax == 0, xp.float32(1), absmax)
        q = encode(value * (xp.float32(1) / _kept(scale))[:, :, None], name)
        return pack_uint4(q.reshape(w.shape[0], -1)), absmax, None

    return _by_rows(rows, weight)


def _grouped(weight: Any, group: int) -> Any:
    """float32 [N, G, group]; a last group that is short is filled with zeros."""
    xp = namespace(weight)
    n, k = weight.shape
    value = weight.astype(xp.float32)
    if k % group:
        value = xp.pad(value, ((0, 0), (0, -k % group)))
    return value.reshape(n, -1, group)


def _absmax(weight: Any, axis: int | None) -> Any:
    xp = namespace(weight)
    return xp.abs(weight).max(axis=axis, keepdims=axis is not None).astype(xp.float32)


def _fp8(weight: Any, absmax: Any) -> Quantized:
    xp = namespace(weight)
    scale = xp.where(absmax == 0, xp.float32(1), _times_inverse(absmax, FP8_MAX))
    return _to_fp8(weight, scale), scale, None


def _to_fp8(weight: Any, scale: Any) -> Any:
    """float8_e4m3fn has no infinity: what rounds past 448 would become NaN."""
    xp = namespace(weight)
    return xp.clip(weight.astype(xp.float32) / scale, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)


def _kept(value: Any) -> Any:
    """`value` as XLA's algebraic simplifier may not see through it."""
    if namespace(value) is np:
        return value
    import jax

    return jax.lax.optimization_barrier(value)


def _divided(value: Any, divisor: float) -> Any:
    """A true division: XLA would multiply by the reciprocal, one bit off."""
    return value / _kept(namespace(value).float32(divisor))


def _times_inverse(value: Any, divisor: float) -> Any:
    """What XLA makes of a division by a constant; numpy does the same for equal bits."""
    return value * np.float32(1 / divisor)


def _own(value: Any, dtype: Any) -> Any:
    """float32 rounded to `dtype` and back; under jit XLA keeps excess precision unless told."""
    if dtype == np.float32:
        return value
    if namespace(value) is np or dtype == np.float16:  # reduce_precision would flush float16's subnormals
        return _kept(value.astype(dtype)).astype(np.float32)
    import jax

    info = ml_dtypes.finfo(dtype)
    return jax.lax.reduce_precision(value, info.nexp, info.nmant)


def _by_rows(rule: Callable[[Any], Quantized], weight: Any, multiple: int = 1, *, scales: bool = True) -> Quantized:
    """`rule` on some rows at a time on the host (a multiple of `multiple`), on all of them on the device."""
    if namespace(weight) is not np:
        return rule(weight)
    n, k = weight.shape
    rows = max(1, _VALUES // (k * multiple)) * multiple
    with np.errstate(invalid="ignore"):  # a NaN is found by its scale, once the module is built
        pieces = [rule(weight[i : i + rows]) for i in range(0, n, rows)]
    if len(pieces) == 1:
        return pieces[0]
    qvalue, scale, zero = ([piece[i] for piece in pieces] for i in range(3))
    joined = np.concatenate(scale) if scales else scale[0]
    return np.concatenate(qvalue), joined, None if zero[0] is None else np.concatenate(zero)
