"""Problems shared by the tests, the bench and the tuner, with their float64 results."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}


@dataclasses.dataclass(frozen=True)
class Case:
    """qtype: "uint4" (w4a16), "int8", "uint8" or "float8_e4m3fn" (w8a16); scales: "group", "row" or "one" (that one
    replaces `group` by a single scale per row, or for all). zero: "none", "int" or "offset"."""

    qtype: str
    m: int
    n: int
    k: int
    group: int = 128
    zero: str = "none"
    scales: str = "group"
    x_dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    perm: bool = False
    span: float = 1.0  # decades over which scales spread
    poison: bool = False  # NaN and Inf in two rows of x

    @property
    def group_size(self) -> int:
        return self.group if self.scales == "group" else -1


def _cases() -> tuple[Case, ...]:
    cases = [
        Case("uint4", m, 256, 1024, group, zero)
        for m in (1, 16, 64, 200)
        for group in (32, 64, 128, 256, -1)
        for zero in ("none", "int", "offset")
        if group in (128, 32) or m in (1, 64)
    ]
    cases += [
        Case(qtype, m, 256, 1024, scales=scales, zero=zero)
        for m in (1, 16, 64, 200)
        for qtype in ("int8", "uint8", "float8_e4m3fn")
        for scales in ("group", "row", "one")
        for zero in (("none", "int") if qtype == "uint8" else ("none",))
    ]
    for m in (3, 40, 130):
        cases += [
            Case("uint4", m, 256, 1024, x_dtype="float16", scale_dtype="float16", zero="int"),
            Case("uint4", m, 256, 1024, scale_dtype="float16", zero="offset"),
            Case("uint4", m, 256, 1024, scale_dtype="float32"),
            Case("uint4", m, 256, 1024, x_dtype="float16", scale_dtype="bfloat16", group=-1),
            Case("uint4", m, 256, 1024, perm=True, group=64),
            Case("uint4", m, 256, 1024, scales="one"),
            Case("uint4", m, 256, 1024, span=12.0),
            Case("uint4", m, 256, 1024, poison=True),
            Case("uint4", m, 100, 200, group=64, zero="int"),  # tails in N, K and the last group
            Case("uint4", m, 320, 2880, group=32),
            Case("uint4", m, 192, 11008, zero="int"),
            Case("int8", m, 256, 1024, x_dtype="float16", scale_dtype="float16"),
            Case("int8", m, 100, 200, group=64),
            Case("int8", m, 256, 1024, scale_dtype="float32", scales="row", perm=True),
            Case("float8_e4m3fn", m, 256, 1024, x_dtype="float16", scale_dtype="float32", poison=True),
            Case("uint8", m, 100, 160, group=32, zero="int", x_dtype="float16", scale_dtype="float16"),
        ]
    cases += [Case("uint4", 0, 256, 1024), Case("int8", 0, 256, 1024), Case("uint4", 2, 256, 1024, x_dtype="float32")]
    return tuple(cases)


CASES = _cases()


@dataclasses.dataclass(frozen=True)
class Data:
    """Canonical arguments of the op (numpy), the exact product and sum |x| |w|, both float64 [M, N]."""

    x: np.ndarray
    qweight: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    offset: np.ndarray | None
    perm: np.ndarray | None
    want: np.ndarray
    magnitude: np.ndarray
    x_sum: np.ndarray  # sum |x|, [M, 1]


def make(case: Case, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    m, n, k = case.m, case.n, case.k
    group = k if case.group_size == -1 else case.group
    groups = -(-k // group)
    x = rng.standard_normal((m, k)).astype(case.x_dtype if case.x_dtype != "bfloat16" else ml_dtypes.bfloat16)
    if case.poison:
        x[0, 5] = np.nan
        x[m // 2, 7] = np.inf
    shape = (1, 1) if case.scales == "one" else (n, groups)
    dtype = jnp.dtype(case.scale_dtype)
    size = {"uint4": 0.01, "int8": 1e-3, "uint8": 1e-3, "float8_e4m3fn": 1e-3}[case.qtype]
    scale = (size * 10.0 ** rng.uniform(-case.span, 0, shape)).astype(dtype)
    offset = (0.05 * rng.standard_normal(shape)).astype(dtype) if case.zero == "offset" else None
    if case.qtype == "uint4":
        q = rng.integers(0, 16, (n, k))
        stored = (q[:, ::2] | q[:, 1::2] << 4).astype(np.uint8)
        zero = rng.integers(0, 16, shape).astype(np.uint8) if case.zero == "int" else None
        implied = 8
    elif case.qtype == "float8_e4m3fn":
        bits = rng.integers(0, 256, (n, k)).astype(np.uint8)
        bits = np.where(bits & 0x7F == 0x7F, 0, bits).astype(np.uint8)  # no NaN
        stored, zero, implied = bits.view(ml_dtypes.float8_e4m3fn), None, 0
        q = stored.astype(np.float64)
    else:
        low = -128 if case.qtype == "int8" else 0
        q = rng.integers(low, low + 256, (n, k))
        stored = q.astype(case.qtype)
        zero = rng.integers(0, 256, shape).astype(np.uint8) if case.zero == "int" else None
        implied = 128 if case.qtype == "uint8" else 0
    spread = lambda a: np.repeat(a.astype(np.float64), group, axis=1)[:, :k]  # noqa: E731
    w = (q - (implied if zero is None else spread(zero))) * spread(scale)
    if offset is not None:
        w = w + spread(offset)
    perm = rng.permutation(k).astype(np.int32) if case.perm else None
    wide = (x if perm is None else x[:, perm]).astype(np.float64)
    w = np.broadcast_to(w, (n, k))
    with np.errstate(invalid="ignore"):
        want, magnitude = wide @ w.T, np.abs(wide) @ np.abs(w).T
    return Data(x, stored, scale, zero, offset, perm, want, magnitude, np.abs(wide).sum(axis=1, keepdims=True))


def worst(case: Case, data: Data, got: np.ndarray) -> float:
    """Largest error over its bound; more than 1 is wrong, inf where NaN or Inf stands in other places than it should.

    The bound: one rounding to x's dtype; W and the scale rounded to it (2^-9 each for bf16), which random signs
    average out over K, so that 10 standard deviations of sum x w stand for the worst; float32 sums. In fp16 a W below
    2^-14 keeps 2^-25 of absolute error.
    """
    unit = 2.0**-8 if case.x_dtype == "bfloat16" else 2.0**-11 if case.x_dtype == "float16" else 2.0**-20
    got = np.asarray(got).astype(np.float64)
    finite = np.isfinite(data.want)
    if got.shape != data.want.shape or (np.isfinite(got) != finite).any():
        return float("inf")
    terms = max(1, case.k)
    bound = unit * np.abs(data.want) + (10 * unit / np.sqrt(terms) + 2e-5) * data.magnitude + 1e-30
    bound = bound + (2.0**-25 * data.x_sum if case.x_dtype == "float16" else 0.0)
    return float(np.max(np.where(finite, np.abs(got - data.want) / bound, 0), initial=0))
