"""`load`: a checkpoint directory becomes the canonical parameter tree, one module at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.checkpoint.audit import Audit, GroupSource, audit
from jqserve.checkpoint.extras import verify
from jqserve.checkpoint.finite import all_finite
from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.model_config import DTYPES, model_config
from jqserve.checkpoint.names import LinearGroup, Vector
from jqserve.checkpoint.online import OnlineFp8, online_scheme
from jqserve.checkpoint.plan import LoadPlan, PlanRow, activation_text, scheme_text
from jqserve.checkpoint.quant_config import QuantPlan, quant_plan
from jqserve.checkpoint.recipe import Linear, Recipe, why_apart
from jqserve.checkpoint.scheme import Prepared, Scheme
from jqserve.errors import CheckpointError, UnsupportedError
from jqserve.models.config import ModelConfig
from jqserve.quant import NO_ACTIVATION, QuantizedTensor

Weight = Any  # jax.Array | np.ndarray | QuantizedTensor of them
Place = Callable[[Weight], Weight]
Progress = Callable[[int, int, str], None]  # modules done, modules in all, the path just done
Activations = Literal["config", "none"]

SAFETENSORS_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
#: Modules whose transfer and decoding may be under way on the device at a time.
IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """A model in memory. `params` is the canonical tree of MAINLINE: nested dicts, str keys, QuantizedTensor leaves."""

    config: ModelConfig  # dtype resolved
    params: dict[str, Any]
    plan: LoadPlan
    generation_config: dict[str, Any]


def read_configs(checkpoint: Checkpoint, dtype: str | None) -> tuple[ModelConfig, dict[str, Any]]:
    """(model config with its dtype resolved, generation_config.json or {}). dtype: None or "auto", or one of DTYPES."""
    generation = checkpoint.optional_json("generation_config.json") or {}
    config = model_config(checkpoint.config, generation, str(checkpoint.path / "config.json"))
    if dtype is None or dtype == "auto":
        embedding = "model.embed_tokens.weight"
        stored = SAFETENSORS_DTYPE.get(checkpoint.dtype(embedding), "") if embedding in checkpoint else ""
        dtype = config.dtype or stored or "bfloat16"
    if dtype not in DTYPES:
        raise UnsupportedError(f"--dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    return dataclasses.replace(config, dtype=dtype), generation


@dataclasses.dataclass(frozen=True)
class WithoutActivations:
    """A plan whose schemes leave the input of every matmul as it is."""

    plan: QuantPlan

    @property
    def method(self) -> str:
        return self.plan.method

    def scheme(self, module: str) -> Scheme:
        return self.plan.scheme(module).without_activation()


def load(
    path: str,
    *,
    dtype: str | None = None,
    activations: Activations = "config",
    quantization: str | None = None,
    device_put: Place | None = None,
    decode: Literal["auto", "host", "device"] = "auto",
    progress: Progress | None = None,
) -> LoadedCheckpoint:
    """Loads the checkpoint directory `path`; its headers are checked as a whole before any tensor is read.

    dtype         of dense weights, norms, biases and the embedding: "bfloat16", "float16", "float32"; None or "auto":
                  the checkpoint's own. Scales keep their stored dtype, or are widened to float32
    activations   "none" leaves the input of activation-quantized Linears as it is, to look at the weights alone
    quantization  "fp8" quantizes the Linears (not the head) of an unquantized checkpoint while they stream in
    device_put    called with each weight (array or QuantizedTensor), bias and norm as soon as it is built; what it
                  returns stands in the tree. None: `jax.device_put` to the default device. `keep_on_host` for numpy
    decode        "host": numpy; "device": raw tensors are sent as they are and repacked there; "auto": on the device
                  unless it is a CPU
    progress      called after each module

    Host memory at its highest is about three times the largest module: one read ahead, one raw, one built.
    Raises CheckpointError or UnsupportedError, before any device memory is taken for all that headers can show.
    """
    with Checkpoint(path) as checkpoint:
        config, generation = read_configs(checkpoint, dtype)
        plan: QuantPlan = quant_plan(checkpoint)
        online = online_scheme(quantization, plan.method, activations == "config")
        if activations == "none":
            plan = WithoutActivations(plan)
        audited = audit(checkpoint, config, plan)
        verify(checkpoint, audited.extras)
        if decode == "auto":
            decode = "host" if device_put is keep_on_host or jax.default_backend() == "cpu" else "device"
        loader = _Loader(checkpoint, config.dtype, online, device_put or jax.device_put, decode == "device")
        params, rows = loader.run(audited, progress)
        notes = [f"--quantization {quantization}"] * (online is not None) + extra_notes(audited)
        return LoadedCheckpoint(config, params, LoadPlan(plan.method, tuple(rows), tuple(notes)), generation)


def keep_on_host(weight: Weight) -> Weight:
    """A `device_put` that leaves numpy arrays where they are."""
    return weight


def extra_notes(audited: Audit) -> list[str]:
    """One line a kind of extra tensor."""
    reasons = dict.fromkeys(e.reason for e in audited.extras)
    return [f"left out: {sum(e.reason == r for e in audited.extras)} x {r}" for r in reasons]


@functools.partial(jax.jit, static_argnums=0)
def _build_on_device(recipe: Recipe, arrays: tuple[dict[str, Any], ...]) -> tuple[tuple[Linear, ...], Any]:
    return recipe.build(arrays)


class _Loader:
    """The loop: prefetch the next module, prepare, build, place, and check what came of the one before."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, online: OnlineFp8 | None, place: Place, on_device: bool
    ) -> None:
        self._checkpoint, self._dtype, self._online = checkpoint, dtype, online
        self._place, self._on_device = place, on_device
        self._rows: list[PlanRow] = []
        self._params: dict[str, Any] = {}
        self._flying: deque[tuple[str, Any, Any]] = deque()  # path, what must be finite, arrays to wait for

    def run(self, audited: Audit, progress: Progress | None) -> tuple[dict[str, Any], list[PlanRow]]:
        names = [tensor_names(m) for m in audited.modules]
        for i, module in enumerate(audited.modules):
            self._checkpoint.prefetch(names[i] + (names[i + 1] if i + 1 < len(names) else []))
            if isinstance(module, Vector):
                path = module.path
                self._vector(module)
            else:
                path = module.group.path
                self._group(module)
            self._settle(IN_FLIGHT)
            if progress:
                progress(i + 1, len(names), path)
        self._settle(0)
        return self._params, self._rows

    def _vector(self, vector: Vector) -> None:
        raw: Any = self._checkpoint.read(vector.name)
        value = (jax.device_put(raw) if self._on_device else raw).astype(self._dtype)
        self._flying.append((vector.name, all_finite(value), value if self._on_device else None))
        set_path(self._params, vector.path, self._place(value))
        if len(vector.shape) == 2:
            shape = vector.shape[0], vector.shape[1]
            source, size = vector.name.removesuffix(".weight"), int(value.nbytes)
            row = PlanRow("embed", source, shape, "dense", value.dtype.itemsize * 8, None, "none", self._dtype, size)
            self._rows.append(row)

    def _group(self, source: GroupSource) -> None:
        shapes = tuple((p.scheme, p.slot.n, p.slot.k) for p in source.parts)
        prepared = [self._prepare(p.slot.name, s, n, k, p.tensors) for p, (s, n, k) in zip(source.parts, shapes)]
        biases = [self._checkpoint.read(p.bias) if p.bias else None for p in source.parts]
        apart = why_apart(shapes, prepared, [b is not None for b in biases])
        online = None if source.group.path == "lm_head" else self._online
        recipe = Recipe(shapes, apart is None, self._dtype, online)
        arrays = tuple(_with_options(p, bias) for p, bias in zip(prepared, biases))
        build = _build_on_device if self._on_device else Recipe.build
        linears, finite = build(recipe, arrays)
        keys = [source.group.key] if apart is None else [p.key for p in source.parts]
        placed = [{name: self._place(leaf) for name, leaf in linear.items()} for linear in linears]
        self._flying.append((source.group.path, finite, finite if self._on_device else None))
        for key, linear, raw in zip(keys, placed, linears):
            path = f"{source.group.parent}.{key}".lstrip(".")
            set_path(self._params, path, linear)
            parts = source.parts if apart is None else tuple(p for p in source.parts if p.key == key)
            note = "" if apart is None else f"kept apart: {apart}"
            names = [p.slot.name for p in parts]
            self._rows.append(plan_row(path, names, parts[0].scheme, raw["weight"], self._dtype, note))

    def _prepare(self, where: str, scheme: Scheme, n: int, k: int, tensors: dict[str, str]) -> Prepared:
        return scheme.prepare(where, {suffix: self._checkpoint.read(name) for suffix, name in tensors.items()}, n, k)

    def _settle(self, at_most: int) -> None:
        """Waits until `at_most` modules are under way, and checks the values of those that arrived."""
        while len(self._flying) > at_most:
            path, finite, _ = self._flying.popleft()
            if not bool(finite):
                raise CheckpointError(
                    f"{self._checkpoint.path}: {path}: has values that are not finite in {self._dtype}: the file is "
                    "damaged, or dtype float16 is too narrow for it (try --dtype bfloat16)"
                )


def tensor_names(module: Vector | GroupSource) -> list[str]:
    """The tensors that a module is read from."""
    if isinstance(module, Vector):
        return [module.name]
    return [name for p in module.parts for name in (*p.tensors.values(), *((p.bias,) if p.bias else ()))]


def _with_options(prepared: Prepared, bias: np.ndarray | None) -> dict[str, Any]:
    optional = {"perm": prepared.perm, "input_scale": prepared.input_scale, "bias": bias}
    return {**prepared.arrays, **{k: v for k, v in optional.items() if v is not None}}


def set_path(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts `leaf` under the dotted `path` of nested dicts."""
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def plan_row(path: str, sources: list[str], scheme: Scheme, weight: Weight, dtype: str, note: str) -> PlanRow:
    """The row of one canonical Linear."""
    head = sources[0].rpartition(".")[0]
    source = sources[0] if len(sources) == 1 else f"{head}.{{{','.join(s.rpartition('.')[2] for s in sources)}}}"
    spec = weight.spec if isinstance(weight, QuantizedTensor) else None
    if spec is None:
        shape, bits = (int(weight.shape[0]), int(weight.shape[1])), jnp.dtype(dtype).itemsize * 8
        return PlanRow(path, source, shape, scheme.method, bits, None, "none", dtype, int(weight.nbytes), note)
    method = "online" if scheme.spec(1, 1) is None else scheme.method
    group = spec.group_size if spec.group_size < spec.shape[1] else None
    text = scheme_text(method, spec, weight.perm is not None)
    activation = activation_text(spec.activation)
    scales = jnp.dtype(weight.scale.dtype).name
    return PlanRow(path, source, spec.shape, text, spec.bits, group, activation, scales, weight.nbytes, note)


__all__ = ["NO_ACTIVATION", "LinearGroup", "LoadedCheckpoint", "keep_on_host", "load"]
