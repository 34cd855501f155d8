"""One .safetensors file: a validated header and plain positional reads. Nothing in the file is trusted.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON object
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}, then the data without holes.

Reads go through `preadv` into memory of our own and not through mmap: a file that shrinks under a mapping kills the
process with SIGBUS, mapped pages count as resident until they are evicted, and the copy is needed anyway (several
gigabytes a second, in threads).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jqserve.checkpoint.regular_file import open_regular
from jqserve.errors import CheckpointError, UnsupportedError

#: The format's own limit on the header.
MAX_HEADER_BYTES = 100_000_000
#: The kernel transfers at most 2 GiB - 4 KiB a call.
MAX_READ_BYTES = 1 << 30

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `begin` counts from the start of the file."""

    name: str
    dtype: str  # the file's own word, a key of DTYPES
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return found


def _entry(path: Path, name: str, data: Any, data_start: int) -> TensorEntry:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: damaged header: tensor {name!r} {what}")

    if not isinstance(data, dict) or not {"dtype", "shape", "data_offsets"} <= data.keys():
        raise bad(f"needs dtype, shape and data_offsets, found {str(data)[:80]!r}")
    dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedError(f"{path}: tensor {name!r} has dtype {dtype!r}; known dtypes: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(s) for s in shape):
        raise bad(f"has shape {shape!r}, which is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise bad(f"has data_offsets {offsets!r}, which is not [begin, end]")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise bad(f"of {dtype} {shape} needs {needed} bytes, its data_offsets {offsets} span {end - begin}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, needed)


class SafetensorsFile:
    """A shard, its header checked when it is opened. `tensors` maps names to entries, in the order of the data.

    Raises CheckpointError (damaged, truncated) or UnsupportedError (unknown dtype), naming the file and the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_regular(path)
        try:
            self.size = os.fstat(self._fd).st_size
            self.tensors = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Closes the descriptor; later reads fail."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_header(self) -> dict[str, TensorEntry]:
        prefix = os.pread(self._fd, 64, 0)
        if prefix.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{self.path}: is a git-lfs pointer, not the weights; run `git lfs pull`")
        if len(prefix) < 8:
            raise CheckpointError(
                f"{self.path}: has {self.size} bytes, too few for a safetensors file; download it again"
            )
        length = int.from_bytes(prefix[:8], "little")
        if length > MAX_HEADER_BYTES or length < 2:
            raise CheckpointError(
                f"{self.path}: not a safetensors file: the header would be {length} bytes long "
                f"(2 to {MAX_HEADER_BYTES} are allowed)"
            )
        if 8 + length > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: a header of {length} bytes is announced, the file has {self.size} in all; "
                "download it again"
            )
        try:
            header = json.loads(os.pread(self._fd, length, 8).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: damaged header: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(
                f"{self.path}: damaged header: a JSON object is expected, found {type(header).__name__}"
            )
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{self.path}: damaged header: __metadata__ is not an object")
        self.metadata: dict[str, Any] = metadata
        entries = [_entry(self.path, name, data, 8 + length) for name, data in header.items()]
        entries.sort(key=lambda e: (e.begin, e.nbytes))
        end = 8 + length
        for entry in entries:
            if entry.begin != end:
                what = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
                raise CheckpointError(f"{self.path}: damaged header: tensor {entry.name!r} {what}")
            end += entry.nbytes
        if end != self.size:
            state = "truncated" if end > self.size else "damaged"
            raise CheckpointError(
                f"{self.path}: {state}: the header describes {end} bytes, the file has {self.size}; download it again"
            )
        return {e.name: e for e in entries}

    def read(self, name: str) -> np.ndarray:
        """The tensor, in memory of its own (64-byte aligned), of the dtype DTYPES names. Thread-safe."""
        entry = self.tensors[name]
        return self.read_bytes(name, 0, entry.nbytes).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def read_bytes(self, name: str, begin: int, end: int) -> np.ndarray:
        """Bytes begin..end of the tensor's data: uint8 [end - begin], aligned as `read` does. Thread-safe."""
        raw = np.empty(end - begin + 64, np.uint8)
        start = -raw.ctypes.data % 64
        buffer = raw[start : start + end - begin]
        view, done = memoryview(buffer), 0
        while done < len(view):
            try:
                count = os.preadv(
                    self._fd, [view[done : done + MAX_READ_BYTES]], self.tensors[name].begin + begin + done
                )
            except OSError as error:
                raise CheckpointError(f"{self.path}: reading {name!r} failed: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path}: ended inside tensor {name!r}: the file shrank while it was read")
            done += count
        return buffer
