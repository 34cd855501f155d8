"""A converted checkpoint by its manifest alone, without jax, and the checks: does it describe the model it says it is?

Every leaf is expected, whole, in its section, and of the sizes of the config.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jqserve.checkpoint import manifest
from jqserve.checkpoint.hf import read_json
from jqserve.checkpoint.manifest import LeafFacts
from jqserve.checkpoint.model_config import model_config
from jqserve.checkpoint.names import LinearSlot, Vector, modules
from jqserve.checkpoint.plan import LoadPlan
from jqserve.errors import CheckpointError
from jqserve.models.config import ModelConfig
from jqserve.quant import QuantSpec

_STORED = {
    "uint4": "uint8",
    "nf4": "uint8",
    "fp4": "uint8",
    "uint8": "uint8",
    "int8": "int8",
    "float8_e4m3fn": "float8_e4m3fn",
}


def described(path: Path) -> tuple[ModelConfig, dict[str, Any], LoadPlan, dict[str, dict[str, LeafFacts]]]:
    """What the manifest says, checked against itself: (config, generation_config, plan, leaves by section)."""
    where = str(path / manifest.NAME)
    body = manifest.read(path)
    try:
        config = ModelConfig.from_json(body["config"])
        plan, generation = LoadPlan.from_json(body["plan"]), dict(body["generation_config"])
        sections = {
            section: {name: LeafFacts.from_json(facts) for name, facts in leaves.items()}
            for section, leaves in body["sections"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: cannot be understood: {type(error).__name__} {error}") from error
    beside = model_config(read_json(path / "config.json"), generation, str(path / "config.json"))
    if dataclasses.replace(beside, dtype=config.dtype) != config:
        raise CheckpointError(
            f"{where}: describes another model than the config.json beside it; run `jqserve convert` again"
        )
    check_modules(where, config, {name: facts for leaves in sections.values() for name, facts in leaves.items()})
    for section, leaves in sections.items():
        if misplaced := [name for name in leaves if section_of(name) != section]:
            raise CheckpointError(f"{where}: section {section!r} holds {misplaced[0]}, which does not belong there")
    return config, generation, plan, sections


def section_of(path: str) -> str:
    """ "layers.3.attn.qkv" -> "layers.3"; "embed.weight" -> "embed"."""
    match = re.match(r"layers\.\d+", path)
    return match[0] if match else path.partition(".")[0]


def check_modules(where: str, config: ModelConfig, leaves: dict[str, LeafFacts]) -> None:
    """Raises CheckpointError naming the leaf that is missing, unexpected or of the wrong size."""
    left = dict(leaves)

    def take(path: str, shape: tuple[int, ...], *, quantized: bool = False) -> None:
        facts = left.pop(path, None)
        if facts is None:
            raise CheckpointError(f"{where}: {path} is missing; the model's config asks for it")
        if facts.spec is not None and quantized:
            _check_quantized(where, path, facts, facts.spec, shape)
        elif facts.spec is not None or set(facts.arrays) != {""} or facts.arrays[""].shape != shape:
            found = facts.spec or [list(a.shape) for a in facts.arrays.values()]
            raise CheckpointError(f"{where}: {path}: {found} found, an array of shape {list(shape)} expected")

    def linear(path: str, slots: list[LinearSlot]) -> None:
        n = sum(slot.n for slot in slots)
        take(f"{path}.weight", (n, slots[0].k), quantized=True)
        if slots[0].bias:
            take(f"{path}.bias", (n,))

    for i in range(config.layers):
        for path in (f"layers.{i}.attn.k_scale", f"layers.{i}.attn.v_scale"):
            if path in left:
                take(path, ())
    for module in modules(config):
        if isinstance(module, Vector):
            take(module.path, module.shape)
        elif f"{module.path}.weight" in left:
            linear(module.path, [slot for _, slot in module.parts])
        else:
            for key, slot in module.parts:
                linear(f"{module.parent}.{key}", [slot])
    if left:
        raise CheckpointError(f"{where}: {len(left)} leaves belong to no module: {', '.join(list(left)[:5])}")


def _check_quantized(where: str, path: str, facts: LeafFacts, spec: QuantSpec, shape: tuple[int, ...]) -> None:
    n, k = spec.shape
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "qvalue": ((n, spec.row_bytes), (_STORED[spec.qtype],)),
        "scale": (spec.grid, ("float16", "bfloat16", "float32")),
    }
    if spec.zero != "none":
        expected["zero_point"] = (spec.grid, ("uint8",) if spec.zero == "int" else ("float16", "bfloat16", "float32"))
    if "perm" in facts.arrays:
        expected["perm"] = ((k,), ("int32",))
    if spec.activation.kind == "static_tensor":
        expected["input_scale"] = ((1, 1), ("float32",))
    same = spec.shape == shape and spec.layout == "canonical" and set(facts.arrays) == set(expected)
    if not same or any(facts.arrays[x].shape != s or facts.arrays[x].dtype not in d for x, (s, d) in expected.items()):
        arrays = {name: (list(a.shape), a.dtype) for name, a in facts.arrays.items()}
        raise CheckpointError(f"{where}: {path}: {spec} with {arrays} does not make a canonical tensor {list(shape)}")
