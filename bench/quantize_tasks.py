"""Timing tasks of activation quantization, alone and fused with what comes before it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bench.tasks import Task
from bench.timing import abstract, chain, replicas, time_chain
from pallas_kernels.dispatch import current_device, hopper_only
from pallas_kernels.quantize import mosaic_sm90, reference
from pallas_kernels.quantize.mosaic_sm90 import Split

HIDDEN, FFN = 4096, 14336  # Llama-3.1-8B
F8 = ml_dtypes.float8_e4m3fn

# Their share of memory traffic per element of the output, in bytes read and written.
_OPS: dict[str, tuple[int, int]] = {"quantize_rows": (1, 0), "residual_rms_norm": (2, 1), "silu_mul": (2, 0)}


def call(name: str, block: int | None, config: Split | None = None) -> Callable[..., Any]:
    """The op as `chain(after=True)` calls it: what dispatch chooses, or the Hopper kernel with `config`."""
    options: dict[str, Any] = dict(qdtype=jnp.float8_e4m3fn, block=block, divisor=448.0)

    def run(*arrays: Any, after: Any = None) -> Any:
        module: Any = mosaic_sm90
        more = {**options, "config": config, "after": after}
        if hopper_only(current_device()) or arrays[-1].shape[1] % 512:
            module, more = reference, options
            arrays, _ = jax.lax.optimization_barrier((arrays, after))
        if name == "quantize_rows":
            return module.quantize_rows(*arrays, **more)
        if name == "silu_mul":
            return module.silu_mul_quantize(*arrays, **more)
        weight, x, residual = arrays
        return module.rms_norm_quantize(x, weight, residual, eps=1e-5, **more)

    return run


def _want(name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """What is quantized, in float32."""
    values = [a.astype(np.float32) for a in arrays]
    if name == "quantize_rows":
        return values[0]
    if name == "silu_mul":
        gate, up = np.split(values[0], 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    weight, x, residual = values
    r = (x + residual).astype(ml_dtypes.bfloat16).astype(np.float32)
    return r / np.sqrt((r**2).mean(1, keepdims=True) + 1e-5) * weight


def quantize_tasks(ms: Sequence[int], hidden: int = HIDDEN, ffn: int = FFN) -> list[Task]:
    """Fused operations first. fp8 output; per token, and per 1x128 block. ms: at most 256, or multiples of it."""
    cases = [("residual_rms_norm", None), ("silu_mul", None), ("quantize_rows", None), ("residual_rms_norm", 128)]
    return [_task(name, m, ffn if name == "silu_mul" else hidden, block) for name, block in cases for m in ms]


def quantize_alternatives(ms: Sequence[int]) -> list[Task]:
    """Other ways to hold a row than the op's own choice, what the bars lack first: fp8, per token.

    Few rows: one of 14,336 costs a multiprocessor 2,900 issue slots and 1,300 of its special functions' (1.6 us with
    `lean` at 288 instructions instead of 408: 1.1), which a cluster shares. Many rows: a block of 896 threads is alone
    on its multiprocessor, its loads and its arithmetic take turns; two blocks of 256, seven small ones, the next row's
    loads in flight or a ring of rows let them overlap.
    """
    few, many = [m for m in ms if m <= 64], [m for m in ms if m > 64]
    L = functools.partial(Split, lean=True)
    configs: list[tuple[str, int, list[int], list[Split]]] = [
        ("silu_mul", FFN, few, [L(7, 2, 2)]),
        ("silu_mul", FFN, many, [L(7, 2, 2), L(2, 2, 7), L(7, 2, 2, persistent=True)]),
        ("silu_mul", FFN, few, [L(2, 2, 1, 7), L(7, 2, 1, 2), L(7, 1, 1, 4), L(1, 2, 2, 7)]),
        ("silu_mul", FFN, many[:1], [L(1, 2, 2, 7), L(2, 2, 1, 7)]),
        ("quantize_rows", HIDDEN, few, [L(4, 2, 1), L(2, 2, 1, 2), L(1, 2, 1, 4)]),
        ("residual_rms_norm", HIDDEN, few, [L(4, 2, 1)]),
        ("quantize_rows", HIDDEN, many, [L(1, 2, 4), L(2, 2, 2)]),
        ("residual_rms_norm", HIDDEN, many, [L(1, 2, 4), L(2, 2, 2)]),
    ]
    return [_task(name, m, k, None, config) for name, k, some, splits in configs for m in some for config in splits]


def _host(name: str, m: int, k: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Inputs shared by all calls of a chain, and those of each; of more than 256 rows the first 256."""
    rng = np.random.default_rng(m)
    rows = rng.standard_normal((min(m, 256), 2 * k)).astype(ml_dtypes.bfloat16)
    fixed: tuple[np.ndarray, ...] = ()
    rotated: tuple[np.ndarray, ...] = (rows[:, :k],)
    if name == "silu_mul":
        rotated = (rows,)
    elif name == "residual_rms_norm":
        fixed, rotated = ((1 + rng.standard_normal(k) / 8).astype(ml_dtypes.bfloat16),), (rows[:, :k], rows[:, k:])
    return fixed, tuple(np.ascontiguousarray(a) for a in rotated)


def _error(name: str, q: np.ndarray, scale: np.ndarray, arrays: Sequence[np.ndarray]) -> float:
    want = _want(name, arrays)
    got = q.astype(np.float32) * np.repeat(scale, q.shape[1] // scale.shape[1], axis=1)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@jax.jit
def _repeats(x: jax.Array) -> jax.Array:
    """Whether all rows are those of the first 256 once more, as their inputs are."""
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).reshape(-1, 256, x.shape[1])
    return (words == words[:1]).all()


def once(name: str, m: int, k: int, block: int | None) -> float:
    """The error of one call, relative to the Frobenius norm."""
    fixed, rotated = _host(name, min(m, 256), k)
    q, scale = (np.asarray(a) for a in jax.jit(call(name, block))(*fixed, *rotated)[:2])
    return _error(name, q, scale, (*fixed, *rotated))


def _task(name: str, m: int, k: int, block: int | None, config: Split | None = None) -> Task:
    reads, writes = _OPS[name]
    moved = m * k * (2 * reads + 2 * writes + 1) + 4 * m * (k // block if block else 1)
    # Few rows come from the L2, where the kernel before has left them. A chain of 96 calls outlasts its launch.
    count = replicas(moved, 2) if m > 256 else 8 if k >= 1024 else 2
    rounds = 1 if m > 256 or k < 1024 else 12
    host = functools.cache(functools.partial(_host, name, m, k))

    def compile() -> Any:
        fixed, few = abstract(host())
        rotated = tuple(jax.ShapeDtypeStruct((m, a.shape[1]), a.dtype) for a in few)
        return chain(call(name, block, config), after=True, rounds=rounds).lower(fixed, (rotated,) * count).compile()

    def run(compiled: Any) -> dict[str, Any]:
        fixed = tuple(jnp.asarray(a) for a in host()[0])
        if m <= 256:  # no program but the chain: each takes a second to compile
            rotated = tuple(tuple(jnp.asarray(a) for a in host()[1]) for _ in range(count))
        else:
            first = tuple(jnp.tile(a, (m // a.shape[0], 1)) for a in host()[1])
            rotated = (first, *(tuple(jnp.copy(a) for a in first) for _ in range(count - 1)))
        results = compiled(fixed, rotated)[:2]
        q, scale = (np.asarray(a if m <= 256 else a[:32])[:32] for a in results)
        few = (*host()[0], *(a[: min(m, 32)] for a in host()[1]))
        error = _error(name, q, scale, few)
        alike = m <= 256 or all(bool(_repeats(a)) for a in results)
        timing = time_chain(lambda: compiled(fixed, rotated), rounds * count)
        return {
            "op": name + ("_block" if block else ""),
            "m": m,
            "k": k,
            **({"config": str(config)} if config else {}),
            **timing.row(),
            "bytes": moved,
            "gb_per_second": round(moved / timing.us / 1e3, 1),
            "error": round(error, 5),
            "ok": error < 0.04 and alike,  # e4m3: 3 bits of mantissa, 2^-4 at most, 0.026 rms
        }

    key = f"{name}{'_block' if block else ''} {m}" + (f" {config}" if config else "")
    return Task(key, compile, run, limit=8.0 if config else 30.0)
