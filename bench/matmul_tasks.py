"""Timing tasks of the quantized matmuls, and of XLA's own bf16, fp8 and int8 products at the same shapes.

Only public ops of pallas_kernels run here, with weights in the layout that they prefer. Each result is compared, before
it is timed, with float32 numpy on 32 rows and 256 columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import pallas_kernels
from bench.tasks import Task
from bench.timing import abstract, chain, replicas, time_chain
from pallas_kernels.w4a16 import layout as w4_layout
from pallas_kernels.w8a16 import layout as w8_layout

GROUP = 128
F8 = ml_dtypes.float8_e4m3fn
# Of the Frobenius norm. bf16 rounds the output by 2^-9 at most, 0.0017 rms; fp8 sums add Hopper's 14-bit accumulation.
ERROR_LIMIT = {"fp8_row": 0.01, "fp8_block": 0.01, "xla_fp8": 0.01}
ERROR_LIMIT_ELSE = 0.006


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to multiply. Host arrays are canonical numpy; `layout` turns the weight into device arrays."""

    name: str
    weight: Callable[[np.random.Generator, int, int], dict[str, np.ndarray]]
    layout: Callable[[dict[str, Any], int, int], tuple]  # traceable
    inputs: Callable[[np.random.Generator, int, int], tuple[np.ndarray, ...]]
    op: Callable[..., jax.Array]  # op(*inputs, *weight)
    x_value: Callable[..., np.ndarray]  # inputs of some rows -> float32 [m, K]
    w_value: Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]  # some rows of the weight -> float32 [n, K]


def _bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


def _fp8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random e4m3 of magnitude below 2 (the bit that would make NaN is clear)."""
    return (_bytes(rng, *shape) & 0xBF).view(F8)


def _int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return _bytes(rng, *shape).view(np.int8)


def _floats(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    block = rng.standard_normal((min(m, 256), k)).astype(ml_dtypes.bfloat16)
    return np.tile(block, (-(-m // block.shape[0]), 1))[:m]


def _scale(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32) / 64


def _per_group(scale: np.ndarray, k: int) -> np.ndarray:
    return np.repeat(scale.astype(np.float32), -(-k // scale.shape[1]), axis=1)[:, :k]


def _scaled_values(w: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    q = w["q"][rows].astype(np.float32)
    scale = w["scale"][rows // 128] if w["scale"].shape[1] > 1 else w["scale"][rows]
    return q * (np.repeat(scale, 128, 1)[:, : q.shape[1]] if scale.shape[1] > 1 else scale)


def _scaled_inputs(xq: np.ndarray, scale: np.ndarray) -> np.ndarray:
    values = xq.astype(np.float32)
    return values * (np.repeat(scale, 128, 1)[:, : values.shape[1]] if scale.shape[1] > 1 else scale)


def _w4a16(name: str = "w4a16", *, group: int = GROUP, kind: str = "none", act_order: bool = False) -> Kind:
    """`kind`: of zero points, as in the layouts: "none", "int" or (torchao's) "offset"."""
    extra = {"int": "zero", "offset": "offset"}.get(kind)

    def weight(rng: np.random.Generator, n: int, k: int) -> dict[str, np.ndarray]:
        groups = -(-k // group)
        found = {"q": _bytes(rng, n, k // 2), "scale": _scale(rng, n, groups).astype(ml_dtypes.bfloat16)}
        if kind == "int":
            found["zero"] = _bytes(rng, n, groups) & 15
        elif kind == "offset":
            found["offset"] = (8 * _scale(rng, n, groups)).astype(ml_dtypes.bfloat16)
        return found | ({"perm": rng.permutation(k).astype(np.int32)} if act_order else {})

    def to_layout(w: dict[str, Any], n: int, k: int) -> tuple:
        layout = w4_layout.preferred_layout(n, k, group, kind)
        arrays = w4_layout.to_layout(w["q"], w["scale"], w.get("zero"), w.get("offset"), layout, group)
        return (*(a for a in arrays if a is not None), *([w["perm"]] if act_order else []))

    def op(x: jax.Array, q: jax.Array, scale: jax.Array, *more: jax.Array, n: int) -> jax.Array:
        layout = w4_layout.preferred_layout(n, x.shape[1], group, kind)
        names = [name for name in (extra, "perm" if act_order else None) if name]
        options: dict[str, Any] = dict(zip(names, more, strict=True))
        return pallas_kernels.w4a16_matmul(x, q, scale, **options, group_size=group, layout=layout)[:, :n]

    def values(w: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        packed = w["q"][rows]
        nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(rows), -1).astype(np.float32)
        each = lambda name: _per_group(w[name][rows], nibbles.shape[1])  # noqa: E731
        found = (nibbles - (each("zero") if kind == "int" else 8)) * each("scale")
        found = found + each("offset") if kind == "offset" else found
        if act_order:  # column j of W meets column perm[j] of x
            found[:, w["perm"]] = found.copy()
        return found

    inputs = lambda rng, m, k: (_floats(rng, m, k),)  # noqa: E731
    return Kind(name, weight, to_layout, inputs, op, lambda x: x.astype(np.float32), values)


def _w8a16() -> Kind:
    def to_layout(w: dict[str, Any], n: int, k: int) -> tuple:
        layout = w8_layout.preferred_layout(n, k, GROUP, "none")
        return tuple(w8_layout.to_layout(w["q"], w["scale"], None, layout, GROUP)[:2])

    def op(x: jax.Array, q: jax.Array, scale: jax.Array, *, n: int) -> jax.Array:
        layout = w8_layout.preferred_layout(n, x.shape[1], GROUP, "none")
        return pallas_kernels.w8a16_matmul(x, q, scale, group_size=GROUP, layout=layout)[:, :n]

    return Kind(
        "w8a16",
        lambda rng, n, k: {"q": _int8(rng, n, k), "scale": _scale(rng, n, -(-k // GROUP)).astype(ml_dtypes.bfloat16)},
        to_layout,
        lambda rng, m, k: (_floats(rng, m, k),),
        op,
        lambda x: x.astype(np.float32),
        lambda w, rows: w["q"][rows].astype(np.float32) * _per_group(w["scale"][rows], w["q"].shape[1]),
    )


def _scaled(name: str, random: Callable[..., np.ndarray], block: bool, op: Callable[..., jax.Array]) -> Kind:
    def weight(rng: np.random.Generator, n: int, k: int) -> dict[str, np.ndarray]:
        shape = (-(-n // 128), -(-k // 128)) if block else (n, 1)
        return {"q": random(rng, n, k), "scale": _scale(rng, *shape)}

    def inputs(rng: np.random.Generator, m: int, k: int) -> tuple[np.ndarray, ...]:
        return random(rng, m, k), _scale(rng, m, -(-k // 128) if block else 1)

    layout = lambda w, n, k: (w["q"], w["scale"])  # noqa: E731
    return Kind(name, weight, layout, inputs, op, _scaled_inputs, _scaled_values)


def _ours(xq: jax.Array, x_scale: jax.Array, wq: jax.Array, w_scale: jax.Array, *, n: int) -> jax.Array:
    return pallas_kernels.scaled_matmul(xq, wq, x_scale, w_scale)


def _dot(x: jax.Array, w: jax.Array, out: Any) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _xla_scaled(xq: jax.Array, x_scale: jax.Array, wq: jax.Array, w_scale: jax.Array, *, n: int) -> jax.Array:
    sums = _dot(xq, wq, jnp.int32 if xq.dtype == jnp.int8 else jnp.float32)
    return (sums.astype(jnp.float32) * x_scale * w_scale.T).astype(jnp.bfloat16)


def _xla_bf16() -> Kind:
    return Kind(
        "xla_bf16",
        lambda rng, n, k: {"q": np.tile(_floats(rng, min(n, 512), k), (-(-n // 512), 1))[:n]},
        lambda w, n, k: (w["q"],),
        lambda rng, m, k: (_floats(rng, m, k),),
        lambda x, w, *, n: _dot(x, w, jnp.bfloat16),
        lambda x: x.astype(np.float32),
        lambda w, rows: w["q"][rows].astype(np.float32),
    )


KINDS: dict[str, Kind] = {
    k.name: k
    for k in (
        _w4a16(),
        _scaled("fp8_row", _fp8, False, _ours),
        _scaled("fp8_block", _fp8, True, _ours),
        _scaled("int8_row", _int8, False, _ours),
        _w8a16(),
        _xla_bf16(),
        _scaled("xla_fp8", _fp8, False, _xla_scaled),
        _scaled("xla_int8", _int8, False, _xla_scaled),
        _w4a16("w4a16_g32", group=32),
        _w4a16("w4a16_g64", group=64),
        _w4a16("w4a16_zero", kind="int"),
        _w4a16("w4a16_offset", kind="offset"),
        _w4a16("w4a16_act_order", act_order=True),
    )
}


class Weights:
    """Weights of one (kind, N, K): made on the host once, put on the device (`count` replicas) at first use."""

    def __init__(self, kind: Kind, n: int, k: int):
        self.kind, self.n, self.k = kind, n, k

    @functools.cached_property
    def host(self) -> dict[str, np.ndarray]:
        return self.kind.weight(np.random.default_rng(self.n * 7 + self.k), self.n, self.k)

    @functools.cached_property
    def shapes(self) -> tuple:
        host = abstract(self.host)
        return tuple(jax.eval_shape(lambda w: self.kind.layout(w, self.n, self.k), host))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.host.values())

    @functools.cached_property
    def device(self) -> list[tuple]:
        put = jax.jit(lambda w: self.kind.layout(w, self.n, self.k))
        first = jax.block_until_ready(put({name: jnp.asarray(a) for name, a in self.host.items()}))
        return [first, *(tuple(jnp.copy(a) for a in first) for _ in range(replicas(self.nbytes) - 1))]


def matmul_tasks(name: str, shapes: dict[str, tuple[int, int]], ms: Sequence[int]) -> list[Task]:
    """Tasks of one kind, M by M over all shapes, so that the sums over a layer come early."""
    kind = KINDS[name]
    weights = {shape: Weights(kind, n, k) for shape, (n, k) in shapes.items()}
    return [matmul_task(kind, shape, weights[shape], m) for m in ms for shape in shapes]


def matmul_task(kind: Kind, shape: str, weight: Weights, m: int) -> Task:
    """The task of one kind at one shape and M."""
    n, k = weight.n, weight.k

    def op(*arguments: jax.Array) -> jax.Array:
        return kind.op(*arguments, n=n)

    def count() -> int:
        return 2 if n < 1024 else replicas(weight.nbytes) if m <= 256 else min(3, replicas(weight.nbytes))

    rounds = 1 if m > 256 or n < 1024 else -(-64 // count())  # the device must take longer than the host

    @functools.cache
    def inputs() -> tuple[np.ndarray, ...]:
        return kind.inputs(np.random.default_rng(m), m, k)

    def compile() -> Any:
        fixed = tuple(abstract(inputs()))
        return chain(op, rounds=rounds).lower(fixed, (weight.shapes,) * count()).compile()

    def run(compiled: Any) -> dict[str, Any]:
        fixed = tuple(jnp.asarray(a) for a in inputs())
        rotated = tuple(weight.device[: count()])
        output, _ = compiled(fixed, rotated)
        rows = np.unique(np.r_[0 : min(m, 16), max(0, m - 16) : m])
        columns = np.sort(np.random.default_rng(1).permutation(n)[:256])
        got = np.asarray(output[jnp.asarray(rows)][:, jnp.asarray(columns)], np.float32)
        del output
        want = kind.x_value(*(a[rows] for a in inputs())) @ kind.w_value(weight.host, columns).T
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        right = error < ERROR_LIMIT.get(kind.name, ERROR_LIMIT_ELSE)
        timing = time_chain(lambda: compiled(fixed, rotated), rounds * count())
        moved = weight.nbytes + sum(a.nbytes for a in inputs()) + m * n * 2
        return {
            "op": kind.name,
            "shape": shape,
            "n": n,
            "k": k,
            "m": m,
            **timing.row(),
            "tflops": round(2 * m * n * k / timing.us / 1e6, 1),
            "bytes": moved,
            "error": round(error, 5),
            "ok": right,
        }

    exclusive = kind.name.startswith("xla")
    return Task(f"{kind.name} {shape} {m}", compile, run, exclusive_compile=exclusive)


def once(name: str, m: int, n: int, k: int) -> float:
    """The error of one call, relative to the Frobenius norm."""
    kind, rng = KINDS[name], np.random.default_rng(0)
    host, inputs = kind.weight(rng, n, k), kind.inputs(rng, m, k)
    weight = jax.jit(lambda w: kind.layout(w, n, k))({a: jnp.asarray(x) for a, x in host.items()})
    got = np.asarray(jax.jit(functools.partial(kind.op, n=n))(*inputs, *weight), np.float32)
    want = kind.x_value(*inputs) @ kind.w_value(host, np.arange(n)).T
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
