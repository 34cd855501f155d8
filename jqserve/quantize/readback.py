"""The weights of a finished piece, read back through the readers that serving uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jqserve.checkpoint.names import LinearSlot
from jqserve.checkpoint.quant_config import QuantPlan, quant_plan
from jqserve.checkpoint.recipe import Recipe
from jqserve.checkpoint.safetensors_file import SafetensorsFile
from jqserve.quant import QuantizedTensor, dequantize
from jqserve.quantize.described import Described


def read_piece(path: Path, config: dict[str, Any], slots: list[LinearSlot]) -> dict[str, np.ndarray]:
    """Every tensor that is not a Linear's weight by its name, and float32 [N, K] of every Linear by the module's."""
    plan: QuantPlan = quant_plan(Described(config, path))  # type: ignore[arg-type]
    file = SafetensorsFile(path)
    try:
        found: dict[str, np.ndarray] = {}
        for slot in slots:
            found[slot.name] = _weight(file, plan, slot)
        modules = {slot.name for slot in slots}
        for name in file.tensors:
            module, _, suffix = name.rpartition(".")
            if module not in modules or suffix == "bias":
                found[name] = file.read(name)
        return found
    finally:
        file.close()


def _weight(file: SafetensorsFile, plan: QuantPlan, slot: LinearSlot) -> np.ndarray:
    scheme = plan.scheme(slot.name)
    needs = scheme.needs(slot.n, slot.k)
    raw = {suffix: file.read(f"{slot.name}.{suffix}") for suffix in needs if f"{slot.name}.{suffix}" in file.tensors}
    prepared = scheme.prepare(slot.name, raw, slot.n, slot.k)
    arrays = dict(prepared.arrays)
    for name in ("perm", "input_scale"):
        if getattr(prepared, name) is not None:
            arrays[name] = getattr(prepared, name)
    recipe = Recipe(((scheme, slot.n, slot.k),), True, "float32")
    (linear,), _ = recipe.build((arrays,))
    weight = linear["weight"]
    return np.asarray(dequantize(weight) if isinstance(weight, QuantizedTensor) else weight, np.float32)
