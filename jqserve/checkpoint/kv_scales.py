"""FP8 scales of the KV cache: one number for the keys and one for the values of a layer, where the checkpoint has them.

A cached key is stored as clamp(k / k_scale) in float8 and read as k_scale * stored, after the rotary embedding
(FORMATS.md 1.6). Names: self_attn.k_scale (compressed-tensors, vLLM), k_proj.output_scale, self_attn.kv_scale (old).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jqserve.checkpoint.open import AnyCheckpoint
from jqserve.errors import CheckpointError

#: Where the scale of the keys, and of the values, of a layer may stand, behind "model.layers.<i>.self_attn.".
NAMES = {
    "k": ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    "v": ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale"),
}


@dataclasses.dataclass(frozen=True)
class KvScales:
    """tensors: (k's, v's) full name of every layer."""

    tensors: tuple[tuple[str, str], ...]

    def claimed(self) -> set[str]:
        return {name for pair in self.tensors for name in pair}

    def note(self) -> str:
        suffixes = sorted({name.partition(".self_attn.")[2] for name in self.claimed()})
        return f"KV cache scales of {len(self.tensors)} layers from the checkpoint ({', '.join(suffixes)})"


def find(checkpoint: AnyCheckpoint, layers: int) -> KvScales | None:
    """None when there are none. Raises CheckpointError where some layers, or keys alone, have them and others do not,
    or for a shape or dtype that no tool writes."""
    pairs = [(_one(checkpoint, layer, "k"), _one(checkpoint, layer, "v")) for layer in range(layers)]
    found = [name for pair in pairs for name in pair if name is not None]
    if not found:
        return None
    without = [
        f"model.layers.{layer}.self_attn.{kind}_scale"
        for layer, pair in enumerate(pairs)
        for kind, name in zip("kv", pair)
        if name is None
    ]
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.path}: {found[0]} is there, {', '.join(without[:3])}{more} missing: every layer's "
            "keys and values have a scale, or none"
        )
    return KvScales(tuple((str(k), str(v)) for k, v in pairs))


def _one(checkpoint: AnyCheckpoint, layer: int, kind: str) -> str | None:
    names = [f"model.layers.{layer}.self_attn.{name}" for name in NAMES[kind]]
    present = [name for name in names if name in checkpoint]
    if len(present) > 1:
        raise CheckpointError(f"{checkpoint.path}: {' and '.join(present)}: which of them is the scale?")
    if present:
        dtype, shape = checkpoint.dtype(present[0]), checkpoint.shape(present[0])
        if dtype not in ("BF16", "F16", "F32") or shape not in ((), (1,)):
            raise CheckpointError(f"{present[0]}: {dtype} {list(shape)} found, one BF16, F16 or F32 number expected")
    return present[0] if present else None


def read(checkpoint: AnyCheckpoint, scales: KvScales) -> list[tuple[str, np.ndarray]]:
    """[("layers.0.attn.k_scale", float32 []), ...]. Raises CheckpointError for a scale that is not positive."""
    leaves = []
    for layer, names in enumerate(scales.tensors):
        for kind, name in zip("kv", names):
            value = checkpoint.read(name).astype(np.float32).reshape(())
            if not np.isfinite(value) or value <= 0:
                raise CheckpointError(f"{name}: a KV cache scale must be positive and finite, found {value}")
            leaves.append((f"layers.{layer}.attn.{kind}_scale", np.array(value)))
    return leaves
