"""A path -> the checkpoint in it: a Hugging Face directory, a .gguf file, or a directory that holds one .gguf alone.

One that is open already (`quantize.online.Calibrated`) may stand wherever a path may.
"""

from __future__ import annotations

from pathlib import Path

from jqserve.checkpoint.gguf_checkpoint import GgufCheckpoint
from jqserve.checkpoint.gguf_file import gguf_of
from jqserve.checkpoint.hf import MANIFEST, Checkpoint

AnyCheckpoint = Checkpoint | GgufCheckpoint


def open_checkpoint(path: Path | str | AnyCheckpoint, *, weights: bool = True) -> AnyCheckpoint:
    """weights=False: of a Hugging Face directory only the JSON files. Raises as the classes do."""
    if isinstance(path, AnyCheckpoint):
        return path
    file = gguf_of(path)
    return Checkpoint(path, weights=weights) if file is None else GgufCheckpoint(file)


def is_store(path: str | Path) -> bool:
    """Whether `jqserve convert` wrote this directory."""
    return (Path(path) / MANIFEST).is_file()
