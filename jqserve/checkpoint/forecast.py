"""The load plan from headers and configs alone: what `load` will print, and the memory it will need on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by its name then
import numpy as np

from jqserve.checkpoint.audit import GroupSource, Part, tensor_names
from jqserve.checkpoint.fusing import fused_spec
from jqserve.checkpoint.names import Vector, module_and_suffix
from jqserve.checkpoint.open import AnyCheckpoint
from jqserve.checkpoint.opening import OpenModel
from jqserve.checkpoint.plan import LoadPlan, PlanRow, input_text, joined_notes, scheme_text, source_text
from jqserve.models.config import ModelConfig
from jqserve.quant import QuantSpec


@dataclasses.dataclass(frozen=True)
class Forecast:
    """plan: rows as after loading (permutations and input scales of parts are taken to agree; loading checks).

    vectors       bytes of norms and biases, which have no rows
    largest       bytes in the file of the two largest modules: what loading holds beside the finished weights
    working       (device, host) bytes that calibrating takes at most: on the device before anything is loaded
    kv_scaled     whether there are scales for an fp8 KV cache; kv_missing: whether there are none, though promised
    unquantized   module -> why it stays as it is
    """

    plan: LoadPlan
    vectors: int
    largest: int
    unquantized: dict[str, str]
    kv_scaled: bool = False
    kv_missing: bool = False
    working: tuple[int, int] = (0, 0)

    def peak_bytes(self, weights: int) -> tuple[int, int]:
        """(device, host) while loading, where `weights` bytes stay on the device."""
        return max(weights + self.largest, self.working[0]), 2 * self.largest + self.working[1]


#: Told before any tensor is read: the config with its dtype, and what will become of every module.
Foretell = Callable[[ModelConfig, Forecast], None]


def forecast(opened: OpenModel) -> Forecast:
    """Raises nothing that `open_model` has not raised."""
    checkpoint, width = opened.checkpoint, np.dtype(opened.config.dtype).itemsize
    rows: list[PlanRow] = []
    vectors, sizes, unquantized = 0, [], {}
    for module in opened.audited.modules:
        sizes.append(sum(checkpoint.entry(name).nbytes for name in tensor_names(module)))
        if isinstance(module, Vector):
            nbytes = math.prod(module.shape) * width
            if len(module.shape) == 1:
                vectors += nbytes
                continue
            path, name = module.path.removesuffix(".weight"), module.name.removesuffix(".weight")
            shape = (module.shape[0], module.shape[1])
            rows.append(PlanRow(path, name, shape, "dense", 8 * width, None, "none", opened.config.dtype, nbytes))
            head = " and serves as head" if opened.config.tied_embeddings else ""
            unquantized[name] = f"the embedding is looked up{head}"
            continue
        vectors += sum(part.slot.n * width for part in module.parts if part.bias)
        rows += _rows(checkpoint, module, opened.config.dtype)
        for part in module.parts:
            if part.scheme.spec(part.slot.n, part.slot.k) is None:
                unquantized[part.slot.name] = part.why_dense or part.scheme.misfit(part.slot.n, part.slot.k)
    largest = sum(sorted(sizes)[-2:])
    kv = opened.audited.kv is not None
    return Forecast(opened.plan(rows), vectors, largest, unquantized, kv, opened.kv_missing, checkpoint.working_bytes)


def _rows(checkpoint: AnyCheckpoint, source: GroupSource, dtype: str) -> list[PlanRow]:
    group, parts = source.group, source.parts
    specs = [part.scheme.spec(part.slot.n, part.slot.k) for part in parts]
    apart = _why_apart(checkpoint, parts, specs)
    if apart is None:
        fused = specs[0] if len(specs) == 1 else fused_spec(specs, sum(part.slot.n for part in parts))
        return [_row(checkpoint, group.path, parts, fused, dtype, "")]
    paths = [f"{group.parent}.{part.key}" for part in parts]
    note = f"kept apart: {apart}"
    return [_row(checkpoint, path, (part,), spec, dtype, note) for path, part, spec in zip(paths, parts, specs)]


def _why_apart(checkpoint: AnyCheckpoint, parts: tuple[Part, ...], specs: list[QuantSpec | None]) -> str | None:
    if len(parts) == 1:
        return None
    try:
        fused_spec(specs, sum(part.slot.n for part in parts))
    except ValueError as error:
        return str(error)
    if len({part.bias is None for part in parts}) > 1:
        return "only some have a bias"
    return "scale dtypes differ" if len({_scale_dtype(checkpoint, part) for part in parts}) > 1 else None


def _scale_dtype(checkpoint: AnyCheckpoint, part: Part) -> str:
    return part.scheme.scale_dtype({suffix: checkpoint.dtype(name) for suffix, name in part.tensors.items()})


def _row(
    checkpoint: AnyCheckpoint, path: str, parts: tuple[Part, ...], spec: QuantSpec | None, dtype: str, note: str
) -> PlanRow:
    n, k = sum(part.slot.n for part in parts), parts[0].slot.k
    source, method = source_text([part.slot.name for part in parts]), parts[0].scheme.method
    if spec is None:
        note = joined_notes(note, parts[0].scheme.misfit(parts[0].slot.n, k))
        return dense_row(path, source, (n, k), dtype, note)
    names = {module_and_suffix(name)[1] for part in parts for name in part.tensors.values()}
    ordered = bool({"g_idx", "weight_g_idx"} & names) and _act_order(parts[0])
    return quantized_row(path, source, method, spec, _scale_dtype(checkpoint, parts[0]), ordered, note)


def dense_row(path: str, source: str, shape: tuple[int, int], dtype: str, note: str = "") -> PlanRow:
    width = np.dtype(dtype).itemsize
    return PlanRow(path, source, shape, "dense", 8 * width, None, "none", dtype, math.prod(shape) * width, note)


def quantized_row(
    path: str, source: str, method: str, spec: QuantSpec, scale: str, ordered: bool, note: str = ""
) -> PlanRow:
    """scale: the dtype of the scales; ordered: whether there is a permutation."""
    n, k = spec.shape
    nbytes = n * spec.row_bytes + math.prod(spec.grid) * np.dtype(scale).itemsize
    if spec.zero != "none":
        nbytes += math.prod(spec.grid) * (1 if spec.zero == "int" else np.dtype(scale).itemsize)
    nbytes += 4 * k if ordered else 0
    nbytes += 4 if spec.activation.kind == "static_tensor" else 0
    group = spec.group_size if spec.group_size < k else None
    text = scheme_text(method, spec, ordered)
    return PlanRow(path, source, (n, k), text, spec.bits, group, input_text(method, spec), scale, nbytes, note, spec)


def _act_order(part: Part) -> bool:
    scheme = part.scheme
    flagged = getattr(scheme, "desc_act", False) or getattr(scheme, "act_order", False)
    return bool(flagged) and getattr(scheme, "group_size", -1) not in (-1, part.slot.k)
