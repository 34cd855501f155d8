"""`--load-format dummy`: random weights in the scheme that config.json describes, made on the device.

No weight file is needed. Every Linear is generated in its canonical form by a jitted program, one for each spec, with
scales such that W has standard deviation 1 / sqrt(K): activations neither die nor explode over the layers.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.checkpoint.fusing import fused_spec
from jqserve.checkpoint.loaded import Activations, LoadedCheckpoint, Place, Progress, set_path
from jqserve.checkpoint.matrix_row import matrix_row
from jqserve.checkpoint.names import LinearGroup, Vector, modules
from jqserve.checkpoint.open import open_checkpoint
from jqserve.checkpoint.opening import read_plan
from jqserve.checkpoint.plan import LoadPlan, PlanRow, joined_notes, source_text
from jqserve.checkpoint.quant_config import QuantPlan
from jqserve.checkpoint.scheme import Scheme
from jqserve.quant import QuantizedTensor, QuantSpec

#: Standard deviation of the stored values, before the scale, by type (uniform over the integers).
_DEVIATION = {"uint4": 4.6, "nf4": 0.55, "fp4": 0.5, "uint8": 73.9, "int8": 73.9, "float8_e4m3fn": 112.0}


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    activations: Activations = "config",
    quantization: str | None = None,
    device_put: Place | None = None,
    seed: int | None = 0,
    progress: Progress | None = None,
) -> LoadedCheckpoint:
    """What `convert.load` would give for the directory's config.json, with random values that depend on `seed` alone.

    `device_put` is called with arrays that are on the default device already. Raises as `convert.load` does.
    """
    with open_checkpoint(path, weights=False) as checkpoint:
        config, generation, plan, note = read_plan(checkpoint, dtype, activations, quantization)
    place = device_put or jax.device_put
    params: dict[str, Any] = {}
    rows: list[PlanRow] = []
    everything = list(modules(config))
    for module in everything:  # before any memory is taken
        for _, slot in module.parts if isinstance(module, LinearGroup) else ():
            plan.scheme(slot.name).check(slot.name, slot.n, slot.k)
    seeds = np.random.default_rng((seed or 0) % 2**64).integers(0, 1 << 32, len(everything), dtype=np.uint32)
    for done, (module, own) in enumerate(zip(everything, seeds), 1):
        if isinstance(module, Vector):
            value = _vector(own, module.shape, config.dtype)
            if len(module.shape) == 2:
                origin = module.name.removesuffix(".weight")
                rows.append(matrix_row(module.path.removesuffix(".weight"), origin, "dense", value))
            set_path(params, module.path, place(value))
        else:
            rows += _group(params, place, own, module, plan, config.dtype)
        if progress:
            progress(done, len(everything), module.path)
    notes = ("random weights: --load-format dummy", *((note,) if note else ()))
    return LoadedCheckpoint(config, params, LoadPlan(plan.method, tuple(rows), notes), generation)


def _group(
    params: dict[str, Any],
    place: Place,
    seed: np.uint32,
    group: LinearGroup,
    plan: QuantPlan,
    dtype: str,
) -> list[PlanRow]:
    schemes = [plan.scheme(slot.name) for _, slot in group.parts]
    specs = [scheme.spec(slot.n, slot.k) for scheme, (_, slot) in zip(schemes, group.parts)]
    slots = [[slot for _, slot in group.parts]]
    paths, note = [group.path], ""
    try:
        specs = [specs[0] if len(specs) == 1 else fused_spec(specs, sum(slot.n for _, slot in group.parts))]
    except ValueError:
        slots = [[slot] for _, slot in group.parts]
        paths, note = [f"{group.parent}.{part}" for part, _ in group.parts], "kept apart: schemes differ"
    rows = []
    for i, (path, spec, own) in enumerate(zip(paths, specs, slots)):
        part, shape = np.uint32((int(seed) + 7 * i) % (1 << 32)), (sum(s.n for s in own), own[0].k)
        weight = (
            _dense(part, shape, dtype) if spec is None else _quantized(part, spec, _perm(schemes[i], seed, shape[1]))
        )
        told = joined_notes(note, schemes[i].misfit(own[0].n, own[0].k))
        rows.append(matrix_row(path, source_text([s.name for s in own]), schemes[i].method, weight, told))
        set_path(params, f"{path}.weight", place(weight))
        if own[0].bias:
            set_path(params, f"{path}.bias", place(jnp.zeros(shape[0], dtype)))
    return rows


def _perm(scheme: Scheme, seed: np.uint32, k: int) -> np.ndarray | None:
    """A permutation int32 [K] where such a checkpoint comes with one."""
    ordered = getattr(scheme, "desc_act", False) or getattr(scheme, "act_order", False)
    if not ordered or getattr(scheme, "group_size", -1) == -1:
        return None
    return np.random.default_rng(seed).permutation(k).astype(np.int32)


def _bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: MurmurHash3's finalizer over a counter. Compiles to one fused loop; jax.random takes seconds
    to compile for each shape, and nobody needs its quality here."""
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B9) + seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).reshape(shape)


def _normal(seed: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    """float32, nearly normal, within 3.5 deviations: the sum of a word's four bytes has deviation 147.8."""
    word = _bits(seed, shape)
    total = (word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + (word >> 24)
    return (total.astype(jnp.float32) - 510.0) * (deviation / 147.8)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _vector(seed: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Norms are ones, the embedding is normal."""
    return jnp.ones(shape, dtype) if len(shape) == 1 else _normal(seed, shape, 1.0).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dense(seed: jax.Array, shape: tuple[int, int], dtype: str) -> jax.Array:
    return _normal(seed, shape, shape[1] ** -0.5).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _quantized(seed: jax.Array, spec: QuantSpec, perm: Any) -> QuantizedTensor:
    n, k = spec.shape
    deviation = _DEVIATION[spec.qtype]
    if spec.qtype == "float8_e4m3fn":
        qvalue = _normal(seed, (n, k), deviation).astype(jnp.float8_e4m3fn)  # 3.5 deviations are below 448
    else:
        qvalue = (_bits(seed, (n, spec.row_bytes)) >> 24).astype(jnp.uint8)
        qvalue = qvalue.view(jnp.int8) if spec.qtype == "int8" else qvalue
    grouped = spec.group_shape[0] == 1 and spec.group_size < k
    scale = (1.0 + _normal(seed + jnp.uint32(1), spec.grid, 0.1)) / (deviation * k**0.5)
    zero = None
    if spec.zero == "int":
        middle = {"uint4": 8, "uint8": 128}[spec.qtype]
        zero = (middle - 2 + _bits(seed + jnp.uint32(2), spec.grid) % 5).astype(jnp.uint8)
    if spec.zero == "offset":  # the values are centred already
        zero = jnp.zeros(spec.grid, jnp.float16 if grouped else jnp.float32)
    static = jnp.full((1, 1), 0.05, jnp.float32) if spec.activation.kind == "static_tensor" else None
    return QuantizedTensor(qvalue, scale.astype(jnp.float16 if grouped else jnp.float32), zero, perm, static, spec)
