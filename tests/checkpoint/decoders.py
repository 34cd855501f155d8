"""Independent decoders of every format, from FORMATS.md: one element at a time in spirit, float32, no product code.

`decode(tensors, config, module)` gives W float32 [N, K] in the checkpoint's own column order.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np


def bits_at(words: np.ndarray, index: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Field `index` along `axis` of int32 words that hold 32 / bits fields each, the low bits first; of 3 bits, 32 in
    three words: 10, one across, 10, one across, 10."""
    if bits == 3:
        bit = 3 * (index % 32)
        low = np.take(words.astype(np.int64) & 0xFFFFFFFF, index // 32 * 3 + bit // 32, axis=axis)
        high = np.take(words.astype(np.int64) & 0xFFFFFFFF, index // 32 * 3 + np.minimum(bit // 32 + 1, 2), axis=axis)
        shape = [1] * words.ndim
        shape[axis] = -1
        return ((low | high << 32) >> (bit % 32).reshape(shape)) & 7
    per = 32 // bits
    word = np.take(words.astype(np.int64) & 0xFFFFFFFF, index // per, axis=axis)
    shape = [1] * words.ndim
    shape[axis] = -1
    return (word >> (bits * (index % per)).reshape(shape)) & ((1 << bits) - 1)


def awq(t: dict[str, np.ndarray], group: int) -> np.ndarray:
    k, n = t["qweight"].shape[0], t["qweight"].shape[1] * 8
    column = np.arange(n)
    nibble = np.array([0, 4, 1, 5, 2, 6, 3, 7])[column % 8]  # column 8j + c sits in this nibble of word j
    at = column // 8 * 8 + nibble
    q, z = bits_at(t["qweight"], at, 4, 1), bits_at(t["qzeros"], at, 4, 1)
    g = np.arange(k) // (k if group == -1 else group)
    return ((q - z[g]).astype(np.float32) * t["scales"].astype(np.float32)[g]).T


def gptq(t: dict[str, np.ndarray], bits: int, v2: bool) -> np.ndarray:
    n = t["qweight"].shape[1]
    k = t["qweight"].shape[0] * 32 // bits
    q = bits_at(t["qweight"], np.arange(k), bits, 0)
    words = t["qzeros"].astype(np.int64) & 0xFFFFFFFF
    if not v2:
        words = (words + sum(1 << (bits * i) for i in range(32 // bits))) % (1 << 32)
    z = bits_at(words, np.arange(n), bits, 1)
    if bits == 3 and not v2:
        z = (bits_at(t["qzeros"], np.arange(n), bits, 1) + 1) % 8
    g = t["g_idx"].astype(np.int64)
    return ((q - z[g]).astype(np.float32) * t["scales"].astype(np.float32)[g]).T


def packed(t: dict[str, np.ndarray], bits: int, group: int | None) -> np.ndarray:
    n, k = (int(s) for s in t["weight_shape"])
    q = bits_at(t["weight_packed"], np.arange(k), bits, 1) - (1 << (bits - 1))
    g = t["weight_g_idx"] if "weight_g_idx" in t else np.arange(k) // (group or k)
    scale = t["weight_scale"].astype(np.float32)[:, g]
    zero = np.zeros((n, k), np.int64)
    if "weight_zero_point" in t:
        zero = bits_at(t["weight_zero_point"], np.arange(n), bits, 0)[:, g] - (1 << (bits - 1))
    return (q - zero).astype(np.float32) * scale


def eight_bit(t: dict[str, np.ndarray], group: int | None) -> np.ndarray:
    """float8 or int8 with scales of one value, a column, or groups."""
    w = t["weight"].astype(np.float32)
    scale = t["weight_scale" if "weight_scale" in t else "weight_scale_inv"].astype(np.float32)
    zero = t.get("weight_zero_point", np.zeros(1, np.int8)).astype(np.float32)
    if group:
        index = np.arange(w.shape[1]) // group
        return (w - zero[:, index] if zero.ndim == 2 else w) * scale[:, index]
    if scale.size == w.shape[0]:
        scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
    return (w - zero) * scale


def decode(tensors: dict[str, np.ndarray], config: dict[str, Any], module: str) -> np.ndarray:
    t = {name.removeprefix(module + "."): a for name, a in tensors.items() if name.startswith(module + ".")}
    quant = config.get("quantization_config") or config.get("compression_config") or {}
    if "weight" in t and t["weight"].dtype.itemsize > 1:
        return t["weight"].astype(np.float32)
    if "qweight" in t and quant["quant_method"] == "awq":
        return awq(t, quant["group_size"])
    if "qweight" in t:
        bits = quant["bits"]
        for pattern, change in (quant.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:"), module):
                bits = change.get("bits", bits)
                break
        return gptq(t, bits, quant.get("checkpoint_format") == "gptq_v2")
    if "weight_packed" in t:
        weights = quant["config_groups"]["group_0"]["weights"]
        return packed(t, weights["num_bits"], weights["group_size"])
    weights = quant.get("config_groups", {}).get("group_0", {}).get("weights", {})
    return eight_bit(t, weights.get("group_size"))
