"""Files that are whole or not there: safetensors and JSON, synced before they get their name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.checkpoint.safetensors_file import DTYPES
from jqserve.quantize.formats.format import Tensors

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_CHUNK = 64 << 20


def header_of(tensors: Tensors) -> tuple[bytes, list[str]]:
    """The safetensors header (length, JSON, padded to 8 bytes) and the order of the data: wide dtypes first, then by
    name, so that every tensor is aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        array = tensors[name]
        described[name] = {
            "dtype": _WORDS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def write_safetensors(path: Path, tensors: Tensors) -> str:
    """Writes the file, synced, under its name at the end -> its SHA-256. OSError (a full disk) leaves nothing there."""
    digest = hashlib.sha256()
    partial = path.with_name(f".{path.name}.partial")
    header, order = header_of(tensors)
    try:
        with open(partial, "wb") as file:
            for array in (np.frombuffer(header, np.uint8), *(_bytes(tensors[name]) for name in order)):
                data = array.data
                for begin in range(0, len(data), _CHUNK):
                    piece = data[begin : begin + _CHUNK]
                    file.write(piece)
                    digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_json(path: Path, data: Any) -> None:
    """The same for JSON."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, sort_keys=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Names are on the disk once their directory is."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
