"""The header phase: every tensor is claimed by a module, is a harmless extra, or is an error, before any is read."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from jqserve.checkpoint.extras import Extra, classify
from jqserve.checkpoint.kv_scales import KvScales, find
from jqserve.checkpoint.names import LinearGroup, LinearSlot, Vector, module_and_suffix, modules
from jqserve.checkpoint.open import AnyCheckpoint
from jqserve.checkpoint.quant_config import QuantPlan
from jqserve.checkpoint.scheme import FLOATS, SCALES, Need, Scheme
from jqserve.errors import CheckpointError
from jqserve.models.config import ModelConfig

#: Suffixes of tensors that hold scales.
ALL_SCALES = (*SCALES, "input_scale", "activation_scale")


@dataclasses.dataclass(frozen=True)
class Part:
    """One Linear with the tensors it is read from: suffix -> full name, and the bias's full name. why_dense: the reason
    that its scheme is to leave it as it is, where that is so."""

    key: str
    slot: LinearSlot
    scheme: Scheme
    tensors: dict[str, str]
    bias: str | None = None
    why_dense: str = ""


@dataclasses.dataclass(frozen=True)
class GroupSource:
    """A LinearGroup whose parts are found and checked."""

    group: LinearGroup
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Audit:
    """All modules in loading order, and the tensors that are left out for a known reason."""

    modules: tuple[Vector | GroupSource, ...]
    extras: tuple[Extra, ...]
    kv: KvScales | None = None


def tensor_names(module: Vector | GroupSource) -> list[str]:
    """The tensors that a module is read from."""
    if isinstance(module, Vector):
        return [module.name]
    return [name for p in module.parts for name in (*p.tensors.values(), *((p.bias,) if p.bias else ()))]


def audit(checkpoint: AnyCheckpoint, config: ModelConfig, plan: QuantPlan, *, kv: bool = True) -> Audit:
    """Compares config, plan and headers. kv=False: the KV cache's scales are left out.

    Raises CheckpointError for a missing tensor, a wrong shape or dtype, a module that is quantized in the file and
    not in the config or the other way round, and for tensors that nobody uses.
    """
    of_module: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.names():
        of_module[module_and_suffix(name)[0]].append(name)
    claimed: set[str] = set()
    found: list[Vector | GroupSource] = []
    for module in modules(config):
        if isinstance(module, Vector):
            _check(checkpoint, module.name, Need(FLOATS, (module.shape,)))
            claimed.add(module.name)
            found.append(module)
            continue
        parts = tuple(_part(checkpoint, key, slot, plan, of_module[slot.name]) for key, slot in module.parts)
        for part in parts:
            claimed.update(part.tensors.values())
            claimed.update({part.bias} if part.bias else ())
        found.append(GroupSource(module, parts))
    vectors = {module.name for module in found if isinstance(module, Vector)}
    _one_half_type(checkpoint, list(vectors))
    _one_half_type(checkpoint, [n for n in claimed - vectors if n.endswith(".weight")])
    _one_half_type(checkpoint, [n for n in claimed if n.rpartition(".")[2] in ALL_SCALES])
    scales = find(checkpoint, config.layers) if kv else None
    claimed |= scales.claimed() if scales else set()
    left = [name for name in checkpoint.names() if name not in claimed]
    return Audit(tuple(found), classify(checkpoint, config, left), scales)


def _one_half_type(checkpoint: AnyCheckpoint, names: list[str]) -> None:
    """Tensors of one kind never mix F16 and BF16 in a real file: the same bits would mean something else."""
    kinds = {checkpoint.dtype(name): name for name in sorted(names, reverse=True)}
    if {"F16", "BF16"} <= kinds.keys():
        raise CheckpointError(
            f"{checkpoint.path}: {kinds['F16']} is F16, {kinds['BF16']} is BF16; tensors of one kind "
            "have one of the two: a dtype must be wrong"
        )


def _check(checkpoint: AnyCheckpoint, name: str, need: Need) -> None:
    if name not in checkpoint:
        raise CheckpointError(f"{checkpoint.path}: tensor {name!r} is missing; the model's config asks for it")
    dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
    if dtype not in need.dtypes:
        raise CheckpointError(
            f"{checkpoint.file_of(name)}: {name}: dtype {dtype} found, {' or '.join(need.dtypes)} expected"
        )
    if shape not in need.shapes:
        expected = " or ".join(str(list(s)) for s in need.shapes)
        raise CheckpointError(f"{checkpoint.file_of(name)}: {name}: shape {list(shape)} found, {expected} expected")


def _part(checkpoint: AnyCheckpoint, key: str, slot: LinearSlot, plan: QuantPlan, present: list[str]) -> Part:
    scheme = plan.scheme(slot.name)
    needs = scheme.needs(slot.n, slot.k)
    suffixes = {module_and_suffix(name)[1] for name in present}
    missing = [s for s, need in needs.items() if need.required and s not in suffixes]
    dense = "weight" in suffixes and checkpoint.dtype(f"{slot.name}.weight") in FLOATS
    takes_dense = "weight" in needs and set(needs["weight"].dtypes) >= set(FLOATS)
    quantized = takes_dense and "weight" in suffixes and not dense
    if missing or quantized or (dense and not takes_dense):
        raise _disagree(checkpoint, slot, scheme, missing, present, plan.why_dense(slot.name))
    scheme.check(slot.name, slot.n, slot.k)
    tensors = {s: f"{slot.name}.{s}" for s in needs if s in suffixes}
    for suffix, name in tensors.items():
        _check(checkpoint, name, needs[suffix])
    why = plan.why_dense(slot.name)
    if not slot.bias:
        return Part(key, slot, scheme, tensors, None, why)
    bias = f"{slot.name}.bias"
    _check(checkpoint, bias, Need(FLOATS, ((slot.n,),)))
    return Part(key, slot, scheme, tensors, bias, why)


def _disagree(
    checkpoint: AnyCheckpoint, slot: LinearSlot, scheme: Scheme, missing: list[str], present: list[str], why_dense: str
) -> CheckpointError:
    if not present:
        return CheckpointError(f"{checkpoint.path}: no tensor of module {slot.name!r} is there; is a shard missing?")
    found = ", ".join(f"{module_and_suffix(name)[1]} {checkpoint.dtype(name)}" for name in present)
    a_weight = "has a float weight" if scheme.spec(slot.n, slot.k) is None else "has no dense weight"
    need = f"needs {', '.join(missing)}" if missing else a_weight
    method = f"{scheme.method} ({why_dense})" if why_dense else scheme.method
    return CheckpointError(
        f"{checkpoint.file_of(present[0])}: {slot.name}: config.json makes this module {method}, which {need}; "
        f"the file has {found}. Config and tensors must agree (ignore lists, dynamic, modules_to_not_convert)"
    )
