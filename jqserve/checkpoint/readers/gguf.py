"""ggml's block types as canonical tensors: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and the K-quants Q2_K to Q6_K.

Layouts: ggml-common.h and dequantize_row_* in https://github.com/ggml-org/ggml (checked against the gguf package's
`dequantize`, tests/data/gguf_blocks). Nested scales are folded into float32 group scales; types with minima,
d * q - m, get a float zero point. 2- and 3-bit values are widened to 4 bits, 5- and 6-bit values to 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.gguf_file import TYPES
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.scheme import Arrays, Need, Prepared, Scheme, namespace
from jqserve.quant import QuantSpec
from jqserve.quant.packing import pack_uint4
from jqserve.quant.spec import QType, ZeroKind

#: type -> (stored as, values that share a scale, zero)
STORED: dict[str, tuple[QType, int, ZeroKind]] = {
    "Q4_0": ("uint4", 32, "none"),
    "Q4_1": ("uint4", 32, "offset"),
    "Q5_0": ("int8", 32, "none"),
    "Q5_1": ("uint8", 32, "offset"),
    "Q8_0": ("int8", 32, "none"),
    "Q2_K": ("uint4", 16, "offset"),
    "Q3_K": ("uint4", 16, "none"),
    "Q4_K": ("uint4", 32, "offset"),
    "Q5_K": ("uint8", 32, "offset"),
    "Q6_K": ("int8", 16, "none"),
}
BLOCK_BYTES = {name: (block, width) for name, block, width in TYPES.values()}
FLOATS = ("F32", "F16", "BF16")
DEQUANTIZED_AT_ONCE = 1 << 20
Decoded = tuple[Any, Any, Any]  # values [.., block], scales [.., groups], minima or None: w = v * s + m


@dataclasses.dataclass(frozen=True)
class Gguf(Scheme):
    """A matrix of one ggml type; `weight` is read as bytes, uint8 [N, bytes of a row]."""

    kind: str

    @property
    def method(self) -> str:
        return f"gguf {self.kind}"

    @property
    def narrow_bits(self) -> int | None:
        bits = int(self.kind[1])  # Q6_K
        return bits if bits not in (4, 8) else None

    def spec(self, n: int, k: int) -> QuantSpec:
        qtype, group, zero = STORED[self.kind]
        return QuantSpec(qtype, (n, k), (1, group), zero)

    def needs(self, n: int, k: int) -> dict[str, Need]:
        return {"weight": Need((self.kind,), ((n, k),))}

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        return Prepared({"blocks": raw["weight"]})

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        block, width = BLOCK_BYTES[self.kind]
        xp, spec = namespace(arrays["blocks"]), self.spec(n, k)
        values, scale, minimum = DECODERS[self.kind](arrays["blocks"].reshape(n, k // block, width))
        scale = scale.reshape(spec.grid)
        # The canonical zero of unsigned types is 8 or 128: values come centred there, offsets say what that means.
        middle = {"uint4": 8, "uint8": 128, "int8": 0}[spec.qtype]
        shift = CENTRE.get(self.kind, 0)
        stored = (values.astype(xp.int16) - shift + middle).astype(spec.qtype if spec.bits == 8 else "uint8")
        stored = stored.reshape(n, k)
        zero = None
        if spec.zero == "offset":
            zero = minimum.reshape(spec.grid) + xp.float32(shift) * scale
        return pack_uint4(stored) if spec.bits == 4 else stored, scale, zero

    def scale_dtype(self, stored: Mapping[str, str]) -> str:
        return "float16" if self.kind in ("Q4_0", "Q5_0", "Q8_0") else "float32"


#: The value of a code that becomes 0: w = (v - centre) * s + (m + centre * s).
CENTRE = {"Q4_1": 8, "Q5_1": 16, "Q4_K": 8, "Q5_K": 16, "Q2_K": 8}


def _half(pair: Any) -> Any:
    """uint8 [..., 2] -> float16 [...]"""
    if namespace(pair) is np:
        return np.ascontiguousarray(pair).view(np.float16)[..., 0]
    import jax

    return jax.lax.bitcast_convert_type(pair, np.float16)


def _halves(qs: Any) -> Any:
    """uint8 [..., 16] -> [..., 32]: low nibbles are values 0..15, high ones 16..31."""
    return namespace(qs).concatenate([qs & 15, qs >> 4], axis=-1)


def _bits(word: Any) -> Any:
    """uint8 [..., B] -> uint8 [..., 8 B], the lowest bit of the first byte first."""
    xp = namespace(word)
    return xp.stack([(word >> np.uint8(i)) & np.uint8(1) for i in range(8)], axis=-1).reshape(*word.shape[:-1], -1)


def _q4_0(b: Any) -> Decoded:
    return _halves(b[..., 2:18]).astype(namespace(b).int16) - 8, _half(b[..., 0:2]), None


def _q4_1(b: Any) -> Decoded:
    f32 = namespace(b).float32
    return _halves(b[..., 4:20]), _half(b[..., 0:2]).astype(f32), _half(b[..., 2:4]).astype(f32)


def _q5_0(b: Any) -> Decoded:
    q = _halves(b[..., 6:22]) | (_bits(b[..., 2:6]) << np.uint8(4))
    return q.astype(namespace(b).int16) - 16, _half(b[..., 0:2]), None


def _q5_1(b: Any) -> Decoded:
    f32 = namespace(b).float32
    q = _halves(b[..., 8:24]) | (_bits(b[..., 4:8]) << np.uint8(4))
    return q, _half(b[..., 0:2]).astype(f32), _half(b[..., 2:4]).astype(f32)


def _q8_0(b: Any) -> Decoded:
    return b[..., 2:34].view(np.int8), _half(b[..., 0:2]), None


def _six_bit_pairs(s: Any) -> tuple[Any, Any]:
    """The 12 bytes of Q4_K and Q5_K -> eight 6-bit scales and eight 6-bit minima."""
    xp = namespace(s)
    first, second, third = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    high = lambda x: (x >> np.uint8(6)) << np.uint8(4)  # noqa: E731
    scale = xp.concatenate([first & 63, (third & 15) | high(first)], axis=-1)
    minimum = xp.concatenate([second & 63, (third >> np.uint8(4)) | high(second)], axis=-1)
    return scale, minimum


def _chunks(qs: Any) -> Any:
    """uint8 [..., 128] -> [..., 256]: each 32 bytes hold 32 values in low nibbles, then 32 in high ones."""
    xp, runs = namespace(qs), qs.reshape(*qs.shape[:-1], 4, 32)
    return xp.concatenate([runs & 15, runs >> 4], axis=-1).reshape(*qs.shape[:-1], 256)


def _q4_k(b: Any) -> Decoded:
    return _with_minima(b, _chunks(b[..., 16:144]))


def _q5_k(b: Any) -> Decoded:
    xp = namespace(b)
    high = b[..., 16:48]
    bits = xp.stack([(high >> np.uint8(i)) & np.uint8(1) for i in range(8)], axis=-2).reshape(*b.shape[:-1], 256)
    return _with_minima(b, _chunks(b[..., 48:176]) | (bits << np.uint8(4)))


def _with_minima(b: Any, q: Any) -> Decoded:
    f32 = namespace(b).float32
    d, dmin = _half(b[..., 0:2]).astype(f32)[..., None], _half(b[..., 2:4]).astype(f32)[..., None]
    scale, minimum = _six_bit_pairs(b[..., 4:16])
    return q, d * scale.astype(f32), -dmin * minimum.astype(f32)


def _two_bits(qs: Any) -> Any:
    """uint8 [..., 64] -> [..., 256]: each 32 bytes hold four runs of 32 values, two bits each, the low ones first."""
    xp, halves = namespace(qs), qs.reshape(*qs.shape[:-1], 2, 32)
    runs = [(halves >> np.uint8(2 * i)) & np.uint8(3) for i in range(4)]
    return xp.stack(runs, axis=-2).reshape(*qs.shape[:-1], 256)


def _q2_k(b: Any) -> Decoded:
    f32 = namespace(b).float32
    d, dmin = _half(b[..., 80:82]).astype(f32)[..., None], _half(b[..., 82:84]).astype(f32)[..., None]
    s = b[..., 0:16]
    return _two_bits(b[..., 16:80]), d * (s & 15).astype(f32), -dmin * (s >> np.uint8(4)).astype(f32)


def _q3_k(b: Any) -> Decoded:
    """A set bit of hmask means: do not subtract 4."""
    xp = namespace(b)
    mask = xp.stack([(b[..., 0:32] >> np.uint8(i)) & np.uint8(1) for i in range(8)], axis=-2).reshape(
        *b.shape[:-1], 256
    )
    q = _two_bits(b[..., 32:96]).astype(xp.int16) + 4 * mask.astype(xp.int16) - 4
    s, top = b[..., 96:104], b[..., 104:108]
    low = xp.concatenate([s & 15, s >> np.uint8(4)], axis=-1)
    high = xp.concatenate([(top >> np.uint8(2 * i)) & np.uint8(3) for i in range(4)], axis=-1)
    scale = (low | (high << np.uint8(4))).astype(xp.float32) - xp.float32(32)
    return q, _half(b[..., 108:110]).astype(xp.float32)[..., None] * scale, None


def _q6_k(b: Any) -> Decoded:
    xp = namespace(b)
    ql, qh = b[..., 0:128].reshape(*b.shape[:-1], 2, 64), b[..., 128:192].reshape(*b.shape[:-1], 2, 32)
    low = xp.concatenate([ql & 15, ql >> np.uint8(4)], axis=-1)
    high = xp.concatenate([(qh >> np.uint8(2 * i)) & np.uint8(3) for i in range(4)], axis=-1)
    q = (low | (high << np.uint8(4))).reshape(*b.shape[:-1], 256).astype(xp.int16) - 32
    scale = b[..., 192:208].view(np.int8).astype(xp.float32)
    return q, _half(b[..., 208:210]).astype(xp.float32)[..., None] * scale, None


DECODERS: dict[str, Callable[[Any], Decoded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def dequantized(kind: str, blocks: np.ndarray, n: int, k: int) -> np.ndarray:
    """float32 [N, K] on the host: for embeddings, which are looked up and not multiplied. Some rows at a time: what
    decoding takes on the way is several times the result, gigabytes for the embedding of an 8B model."""
    found, rows = np.empty((n, k), np.float32), max(1, DEQUANTIZED_AT_ONCE // k)
    blocks = blocks.reshape(n, -1)
    for start in range(0, n, rows):
        part = found[start : start + rows]
        part[:] = _dequantized(kind, blocks[start : start + rows], *part.shape)
    return found


def _dequantized(kind: str, blocks: np.ndarray, n: int, k: int) -> np.ndarray:
    block, width = BLOCK_BYTES[kind]
    values, scale, minimum = DECODERS[kind](blocks.reshape(n, k // block, width))
    groups = values.astype(np.float32).reshape(*scale.reshape(n, -1).shape, -1)
    found = groups * scale.astype(np.float32).reshape(n, -1, 1)
    return (found if minimum is None else found + minimum.reshape(n, -1, 1)).reshape(n, k)


class GgufPlan:
    """Each matrix is what its ggml type says."""

    method = "gguf"

    def __init__(self, kinds: Mapping[str, str]) -> None:
        """kinds: module (Hugging Face's name) -> the type of its weight."""
        self._kinds = kinds

    def why_dense(self, module: str) -> str:
        kind = self._kinds.get(module, "F32")
        return f"the file stores it as {kind}" if kind in FLOATS else ""

    def scheme(self, module: str) -> Scheme:
        kind = self._kinds.get(module, "F32")
        return DENSE if kind in FLOATS else Gguf(kind)
