"""The manifest beside Orbax's arrays: what each leaf is, checked against the arrays when they are restored.

Orbax keeps arrays; static fields (QuantSpec) are not among them, and a wrong one would be accepted in silence. So
`jqserve.json` is the truth: specs, shapes, dtypes and CRC-32s, under a SHA-256 of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.checkpoint.hf import read_json
from jqserve.checkpoint.open import MANIFEST
from jqserve.errors import CheckpointError, UnsupportedError
from jqserve.quant import QuantSpec

NAME = MANIFEST
FORMAT, VERSION = "jqserve canonical checkpoint", 1
#: The array fields of a QuantizedTensor, in its order.
FIELDS = ("qvalue", "scale", "zero_point", "perm", "input_scale")


@dataclasses.dataclass(frozen=True)
class ArrayFacts:
    """Of one array as stored. crc32 is of its bytes in C order."""

    shape: tuple[int, ...]
    dtype: str
    crc32: int

    @staticmethod
    def of(array: np.ndarray) -> ArrayFacts:
        return ArrayFacts(tuple(array.shape), np.dtype(array.dtype).name, crc32(array))


@dataclasses.dataclass(frozen=True)
class LeafFacts:
    """Of one leaf: a plain array (spec None, arrays {"": ...}) or the arrays of a QuantizedTensor by field."""

    spec: QuantSpec | None
    arrays: dict[str, ArrayFacts]

    def to_json(self) -> dict[str, Any]:
        arrays = {name: dataclasses.asdict(facts) for name, facts in self.arrays.items()}
        return {"spec": self.spec.to_json() if self.spec else None, "arrays": arrays}

    @staticmethod
    def from_json(data: dict[str, Any]) -> LeafFacts:
        facts = {k: ArrayFacts(tuple(v["shape"]), v["dtype"], v["crc32"]) for k, v in data["arrays"].items()}
        return LeafFacts(QuantSpec.from_json(data["spec"]) if data["spec"] else None, facts)


def crc32(array: np.ndarray) -> int:
    """zlib's CRC-32 of the bytes; 1 to 3 GB/s, and the interpreter is free meanwhile."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) if array.size else 0


def arrays_of(leaf: Any) -> dict[str, np.ndarray]:
    """A leaf -> {"": array}, or its present fields."""
    if getattr(leaf, "spec", None) is None:
        return {"": np.asarray(leaf)}
    fields = {name: getattr(leaf, name) for name in FIELDS}
    return {name: np.asarray(value) for name, value in fields.items() if value is not None}


def facts_of(leaf: Any) -> LeafFacts:
    arrays = {name: ArrayFacts.of(array) for name, array in arrays_of(leaf).items()}
    return LeafFacts(getattr(leaf, "spec", None), arrays)


def leaf_of(facts: LeafFacts, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of `arrays_of`."""
    if facts.spec is None:
        return arrays[""]
    from jqserve.quant import QuantizedTensor  # which loads jax: describing a leaf needs none

    fields: dict[str, Any] = {name: arrays.get(name) for name in FIELDS}
    return QuantizedTensor(**fields, spec=facts.spec)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(directory: Path, body: dict[str, Any]) -> None:
    """Writes the manifest; called last, so that a directory without one is a conversion that did not finish."""
    data = {"format": FORMAT, "version": VERSION, "sha256": _digest(body), "body": body}
    partial = directory / (NAME + ".partial")
    partial.write_text(json.dumps(data, indent=1), encoding="utf-8")
    partial.replace(directory / NAME)


def read(directory: Path) -> dict[str, Any]:
    """The body. Raises CheckpointError where it was changed, UnsupportedError for another version."""
    path = directory / NAME
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {data.get('format')!r} found, {FORMAT!r} expected")
    if data.get("version") != VERSION:
        raise UnsupportedError(
            f"{path}: version {data.get('version')!r} found, {VERSION} is supported; run `jqserve convert` again on "
            "the original checkpoint"
        )
    body = data.get("body")
    if not isinstance(body, dict) or data.get("sha256") != _digest(body):
        raise CheckpointError(f"{path}: its SHA-256 does not fit its contents: the manifest was changed or is damaged")
    return body
