"""The dense checkpoint that is quantized: opened once, read layer by layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.checkpoint.finite import all_finite
from jqserve.checkpoint.gguf_file import gguf_of
from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.names import LinearGroup, LinearSlot, Vector, modules
from jqserve.checkpoint.open import is_store
from jqserve.checkpoint.opening import open_model
from jqserve.checkpoint.readers.patterns import regex_matches
from jqserve.errors import CheckpointError, RequestError, UnsupportedError
from jqserve.models.config import ModelConfig

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Part:
    """One Linear of a group: weight [N, K] and bias [N] as they are stored; `ignored` ones stay dense."""

    slot: LinearSlot
    weight: np.ndarray
    bias: np.ndarray | None
    ignored: bool


@dataclasses.dataclass(frozen=True)
class HostLayer:
    """A layer's tensors on the host: groups "qkv", "o", "gate_up", "down"; norms by the names of quantize.block, each
    with its tensor's name."""

    index: int
    groups: dict[str, tuple[Part, ...]]
    norms: dict[str, tuple[str, np.ndarray]]


class Source:
    """An unquantized checkpoint. Raises CheckpointError and UnsupportedError as loading does, and RequestError for an
    --ignore that names nothing."""

    def __init__(self, path: str | Path, ignore: tuple[str, ...] = ()) -> None:
        if is_store(path) or gguf_of(path) is not None:
            what = "was written by `jqserve convert`" if is_store(path) else "is a GGUF file"
            raise UnsupportedError(f"{path}: {what}; give the unquantized Hugging Face directory that it was made from")
        self.checkpoint = Checkpoint(path)
        opened = open_model(self.checkpoint, None, "config", None)
        if opened.method != "none":
            self.checkpoint.close()
            raise UnsupportedError(
                f"{path}: is quantized already ({opened.method}); give the unquantized model, whose weights the "
                "quantizer needs"
            )
        self.config: ModelConfig = opened.config
        self._modules = list(modules(self.config))
        self.ignored = self._ignored(ignore)

    def close(self) -> None:
        self.checkpoint.close()

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def window(self, index: int) -> int | None:
        """The sliding window of a layer, in tokens."""
        return self.config.sliding_windows[index] if self.config.sliding_windows else None

    def slots(self) -> list[LinearSlot]:
        """Every Linear of the layers."""
        groups = [m for m in self._modules if isinstance(m, LinearGroup) and m.parent]
        return [slot for group in groups for _, slot in group.parts]

    def read(self, name: str) -> np.ndarray:
        """A tensor; CheckpointError where a value is not finite."""
        array = self.checkpoint.read(name)
        if not all_finite(array):
            raise CheckpointError(
                f"{self.checkpoint.file_of(name)}: {name}: has values that are not finite; the file is damaged"
            )
        return array

    def layer(self, index: int) -> HostLayer:
        """Reads one layer."""
        groups: dict[str, tuple[Part, ...]] = {}
        norms: dict[str, tuple[str, np.ndarray]] = {}
        for module in self._of_layer(index):
            if isinstance(module, Vector):
                norms[module.path.split(".")[-2]] = (module.name, self.read(module.name))
                continue
            groups[module.key] = tuple(
                Part(
                    slot,
                    self.read(f"{slot.name}.weight"),
                    self.read(f"{slot.name}.bias") if slot.bias else None,
                    slot.name in self.ignored,
                )
                for _, slot in module.parts
            )
        return HostLayer(index, groups, norms)

    def outside(self) -> tuple[list[str], list[str]]:
        """Tensor names (before the layers, after them)."""
        before, after = ["model.embed_tokens.weight"], ["model.norm.weight"]
        return before, after + ([] if self.config.tied_embeddings else ["lm_head.weight"])

    def _of_layer(self, index: int) -> Iterator[Any]:
        for module in self._modules:
            match = _LAYER.match(module.path)
            if match and int(match[1]) == index:
                yield module

    def _ignored(self, patterns: tuple[str, ...]) -> frozenset[str]:
        names = [slot.name for slot in self.slots()]
        found: set[str] = set()
        for pattern in patterns:
            if pattern in ("lm_head", "re:.*lm_head"):
                continue  # the head never is quantized
            if pattern.startswith("re:"):
                own = {name for name in names if regex_matches(pattern[3:], name, "--ignore")}
            else:
                own = {name for name in names if name == pattern}
            if not own:
                raise RequestError(
                    "--ignore", f"{pattern!r} names no Linear of the model; names are like {names[0]}, patterns re:..."
                )
            found |= own
        if len(found) == len(names):
            raise RequestError("--ignore", "leaves nothing to quantize")
        return frozenset(found)
