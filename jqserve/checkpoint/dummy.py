"""`--load-format dummy`: random weights in the scheme that config.json describes, made on the device.

No weight file is needed. Every Linear is generated in its canonical form by a jitted program, one for each spec, with
scales such that W has standard deviation 1 / sqrt(K): activations neither die nor explode over the layers.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.loaded import Activations, LoadedCheckpoint, Place, Progress, set_path
from jqserve.checkpoint.names import LinearGroup, Vector, modules
from jqserve.checkpoint.online import OnlineFp8, online_scheme
from jqserve.checkpoint.opening import WithoutActivations, read_configs
from jqserve.checkpoint.plan import LoadPlan, PlanRow, matrix_row, source_text
from jqserve.checkpoint.quant_config import QuantPlan, quant_plan
from jqserve.checkpoint.recipe import fused_spec
from jqserve.quant import QuantizedTensor, QuantSpec

#: Standard deviation of the stored values, before the scale, by type (uniform over the integers).
_DEVIATION = {"uint4": 4.6, "uint8": 73.9, "int8": 73.9, "float8_e4m3fn": 112.0}


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
    with Checkpoint(path, weights=False) as checkpoint:
        config, generation = read_configs(checkpoint, dtype)
        plan: QuantPlan = quant_plan(checkpoint)
    online = online_scheme(quantization, plan.method, activations)
    if activations == "none":
        plan = WithoutActivations(plan)
    place = device_put or jax.device_put
    params: dict[str, Any] = {}
    rows: list[PlanRow] = []
    everything = list(modules(config))
    keys = jax.random.split(jax.random.key(seed or 0), len(everything))
    for done, (module, key) in enumerate(zip(everything, keys), 1):
        if isinstance(module, Vector):
            value = _vector(key, module.shape, config.dtype)
            if len(module.shape) == 2:
                origin = module.name.removesuffix(".weight")
                rows.append(matrix_row(module.path.removesuffix(".weight"), origin, "dense", value))
            set_path(params, module.path, place(value))
        else:
            rows += _group(params, place, key, module, plan, config.dtype, None if not module.parent else online)
        if progress:
            progress(done, len(everything), module.path)
    notes = ("random weights: --load-format dummy",)
    return LoadedCheckpoint(config, params, LoadPlan(plan.method, tuple(rows), notes), generation)


def _group(
    params: dict[str, Any],
    place: Place,
    key: jax.Array,
    group: LinearGroup,
    plan: QuantPlan,
    dtype: str,
    online: OnlineFp8 | None,
) -> list[PlanRow]:
    schemes = [plan.scheme(slot.name) for _, slot in group.parts]
    for scheme, (_, slot) in zip(schemes, group.parts):
        scheme.check(slot.name, slot.n, slot.k)
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
        part_key, shape = jax.random.fold_in(key, i), (sum(s.n for s in own), own[0].k)
        spec = online.spec(*shape) if spec is None and online is not None else spec
        weight = _dense(part_key, shape, dtype) if spec is None else _quantized(part_key, spec, _permuted(schemes[i]))
        rows.append(matrix_row(path, source_text([s.name for s in own]), schemes[i].method, weight, note))
        set_path(params, f"{path}.weight", place(weight))
        if own[0].bias:
            set_path(params, f"{path}.bias", place(jnp.zeros(shape[0], dtype)))
    return rows


def _permuted(scheme: Any) -> bool:
    """Whether such a checkpoint comes with a permutation of its columns."""
    return bool(getattr(scheme, "desc_act", False) or getattr(scheme, "act_order", False)) and scheme.group_size != -1


@functools.partial(jax.jit, static_argnums=(1, 2))
def _vector(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Norms are ones, the embedding is normal."""
    return jnp.ones(shape, dtype) if len(shape) == 1 else jax.random.normal(key, shape, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dense(key: jax.Array, shape: tuple[int, int], dtype: str) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[1] ** -0.5, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(key: jax.Array, spec: QuantSpec, permuted: bool) -> QuantizedTensor:
    n, k = spec.shape
    values, scales, zeros, order = jax.random.split(key, 4)
    width = -(-k // 2) if spec.qtype == "uint4" else k
    qvalue: Any = jax.random.bits(values, (n, width), jnp.uint8)
    if spec.qtype == "int8":
        qvalue = qvalue.view(jnp.int8)
    elif spec.qtype == "float8_e4m3fn":
        qvalue = jax.random.normal(values, (n, k), jnp.bfloat16) * jnp.bfloat16(_DEVIATION[spec.qtype])
        qvalue = jnp.clip(qvalue, -448, 448).astype(jnp.float8_e4m3fn)
    grouped = spec.group_shape[0] == 1 and spec.group_size < k
    scale = jax.random.uniform(scales, spec.grid, jnp.float32, 0.8, 1.2) / (_DEVIATION[spec.qtype] * k**0.5)
    middle = {"uint4": 8, "uint8": 128}.get(spec.qtype, 0)
    zero = (
        jax.random.randint(zeros, spec.grid, middle - 2, middle + 3).astype(jnp.uint8) if spec.zero == "int" else None
    )
    return QuantizedTensor(
        qvalue,
        scale.astype(jnp.float16 if grouped else jnp.float32),
        zero,
        jax.random.permutation(order, k).astype(jnp.int32) if permuted else None,
        jnp.full((1, 1), 0.05, jnp.float32) if spec.activation.kind == "static_tensor" else None,
        spec,
    )
