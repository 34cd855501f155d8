"""Timing tasks of activation quantization, alone and fused with what comes before it."""

from __future__ import annotations

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

HIDDEN, FFN = 4096, 14336  # Llama-3.1-8B
F8 = ml_dtypes.float8_e4m3fn

# Their share of memory traffic per element of the output, in bytes read and written.
_OPS: dict[str, tuple[int, int]] = {"quantize_rows": (1, 0), "residual_rms_norm": (2, 1), "silu_mul": (2, 0)}


def _call(name: str, block: int | None) -> Callable[..., Any]:
    options: dict[str, Any] = dict(qdtype=jnp.float8_e4m3fn, block=block, divisor=448.0)
    if name == "quantize_rows":
        return lambda x: pallas_kernels.quantize_rows(x, **options)
    if name == "silu_mul":
        return lambda gate_up: pallas_kernels.silu_mul_quantize(gate_up, **options)
    return lambda weight, x, residual: pallas_kernels.rms_norm_quantize(x, weight, residual, eps=1e-5, **options)


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
    """Fused operations first. fp8 output; per token, and per 1x128 block."""
    cases = [("residual_rms_norm", None), ("silu_mul", None), ("quantize_rows", None), ("residual_rms_norm", 128)]
    return [_task(name, m, ffn if name == "silu_mul" else hidden, block) for name, block in cases for m in ms]


def _host(name: str, m: int, k: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Inputs shared by all calls of a chain, and those of each."""
    rng = np.random.default_rng(m)
    tile = rng.standard_normal((min(m, 256), 2 * k)).astype(ml_dtypes.bfloat16)
    rows = np.tile(tile, (-(-m // len(tile)), 1))[:m]
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


def once(name: str, m: int, k: int, block: int | None) -> float:
    """The error of one call, relative to the Frobenius norm."""
    fixed, rotated = _host(name, m, k)
    q, scale = (np.asarray(a) for a in jax.jit(_call(name, block))(*fixed, *rotated)[:2])
    return _error(name, q, scale, (*fixed, *rotated))


def _task(name: str, m: int, k: int, block: int | None) -> Task:
    reads, writes = _OPS[name]
    moved = m * k * (2 * reads + 2 * writes + 1) + 4 * m * (k // block if block else 1)
    count = replicas(moved, 2) if m > 256 else 16 if k >= 1024 else 2

    rounds = 1 if m > 256 or k < 1024 else 6
    host = functools.cache(functools.partial(_host, name, m, k))

    def compile() -> Any:
        fixed, rotated = abstract(host())
        return chain(_call(name, block), rounds=rounds).lower(fixed, (rotated,) * count).compile()

    def run(compiled: Any) -> dict[str, Any]:
        fixed = tuple(jnp.asarray(a) for a in host()[0])
        first = tuple(jnp.asarray(a) for a in host()[1])
        rotated = (first, *(tuple(jnp.copy(a) for a in first) for _ in range(count - 1)))
        q, scale = (np.asarray(a[: min(m, 32)]) for a in compiled(fixed, rotated)[0][:2])
        few = (*host()[0], *(a[: min(m, 32)] for a in host()[1]))
        error = _error(name, q, scale, few)
        timing = time_chain(lambda: compiled(fixed, rotated), rounds * count)
        return {
            "op": name + ("_block" if block else ""),
            "m": m,
            "k": k,
            **timing.row(),
            "bytes": moved,
            "gb_per_second": round(moved / timing.us / 1e3, 1),
            "error": round(error, 5),
            "ok": error < 0.04,  # e4m3: 3 bits of mantissa, 2^-4 at most, 0.026 rms
        }

    return Task(f"{name}{'_block' if block else ''} {m}", compile, run)
