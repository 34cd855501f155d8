"""One .gguf file: header, fields and tensor table, bounded and checked before anything is believed; plain reads.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: "GGUF", version, tensor count, field
count; fields: name, type, value; tensors: name, dimensions (the fastest first), type, offset; data, aligned.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.checkpoint.regular_file import open_regular
from jqserve.errors import CheckpointError, UnsupportedError

#: type -> (name, values a block, bytes a block); the names are ggml's
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
#: Types that are not read, by ggml's number, so that a refusal can name them as their files do.
OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL"}
OTHER_TYPES |= {21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
OTHER_TYPES |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_FIELDS, MAX_TENSORS, MAX_NAME = 1 << 16, 1 << 20, 1 << 16
#: The header of a real file is its vocabulary: tens of megabytes at the most.
MAX_HEADER_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """`shape` as a matrix is written, [N, K]: the file has K first. `begin` counts from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class _Cursor:
    """Reads forward through the header; never beyond the file or MAX_HEADER_BYTES."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path, self.at, self.limit = path, 0, min(size, MAX_HEADER_BYTES)
        self._fd, self._start, self._buffer = fd, 0, b""

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF header at byte {self.at}: {what}")

    def take(self, count: int, what: str) -> bytes:
        if count < 0 or self.at + count > self.limit:
            raise self.error(f"{what} would end at byte {self.at + count}, the file has {self.limit}")
        end = self.at - self._start + count
        if end > len(self._buffer):
            self._start, self._buffer = self.at, os.pread(self._fd, max(count, 1 << 20), self.at)
            end = count
        found = self._buffer[end - count : end]
        if len(found) != count:
            raise self.error(f"{what}: the file ended")
        self.at += count
        return found

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > most:
            raise self.error(f"{what} would be {length} bytes long")
        return self.take(length, what).decode("utf-8", "replace")

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings: of a vocabulary and its merges there are 400,000, most of what a header takes to read."""
        found: list[str] = []
        for _ in range(count):
            begin = self.at - self._start + 8
            length = int.from_bytes(self._buffer[begin - 8 : begin], "little")
            if begin + length > len(self._buffer):  # the buffer ends here, or the file: `take` knows
                found.append(self.text(what))
                continue
            found.append(self._buffer[begin : begin + length].decode("utf-8", "replace"))
            self.at += 8 + length
        return found

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.error(f"{what} has type {kind}, which is not one of GGUF's")
        inner, count = self.number("I", what), self.number("Q", what)
        if count > self.limit:
            raise self.error(f"{what} would have {count} elements")
        if inner in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[inner])
            return np.frombuffer(self.take(count * width, what), np.dtype("<" + _SCALARS[inner])).tolist()
        if inner != _STRING:
            raise self.error(f"{what} has elements of type {inner}, which is not one of GGUF's")
        return self.texts(count, what)


class GgufFile:
    """`fields` by name and `tensors` in the file's order. Raises CheckpointError (damaged) or UnsupportedError (a
    version, byte order or tensor type that is not read), naming file, tensor and place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_regular(path)
        try:
            self.size = os.fstat(self._fd).st_size
            self.fields, self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        cursor = _Cursor(self.path, self._fd, self.size)
        if cursor.take(4, "the magic") != b"GGUF":
            raise CheckpointError(f"{self.path}: is not a GGUF file: it does not begin with GGUF")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            raise UnsupportedError(
                f"{self.path}: GGUF version {version} (or big endian); supported: 2, 3, little endian"
            )
        tensors, count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the field count")
        if tensors > MAX_TENSORS or count > MAX_FIELDS:
            raise cursor.error(f"{tensors} tensors and {count} fields are announced")
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = cursor.text("a field's name", MAX_NAME)
            if name in fields:
                raise cursor.error(f"field {name!r} occurs twice")
            fields[name] = cursor.value(cursor.number("I", f"the type of {name!r}"), f"field {name!r}")
        infos = [self._tensor(cursor) for _ in range(tensors)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20:
            raise cursor.error(f"general.alignment {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        end = start
        for tensor in sorted(infos, key=lambda t: t.begin):
            tensor = dataclasses.replace(tensor, begin=start + tensor.begin)
            if tensor.name in found:
                raise cursor.error(f"tensor {tensor.name!r} occurs twice")
            if tensor.begin < end:
                raise cursor.error(f"tensor {tensor.name!r} overlaps the one before it")
            end = tensor.begin + tensor.nbytes
            if end > self.size:
                raise CheckpointError(
                    f"{self.path}: truncated: tensor {tensor.name!r} ends at byte {end}, the file has {self.size}; "
                    "download it again"
                )
            found[tensor.name] = tensor
        return fields, found

    def _tensor(self, cursor: _Cursor) -> GgufTensor:
        name = cursor.text("a tensor's name", MAX_NAME)
        dimensions = cursor.number("I", f"the dimensions of {name!r}")
        if not 0 < dimensions <= 4:
            raise cursor.error(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q", f"the shape of {name!r}") for _ in range(dimensions))[::-1]
        kind, offset = cursor.number("I", f"the type of {name!r}"), cursor.number("Q", f"the offset of {name!r}")
        if kind not in TYPES:
            known = ", ".join(t[0] for t in TYPES.values())
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} has ggml type {OTHER_TYPES.get(kind, kind)}; supported: {known}. Take "
                "the model's Q4_K_M file, or make one: `llama-quantize F16.gguf OUT.gguf Q4_K_M`"
            )
        word, block, width = TYPES[kind]
        if shape[-1] % block or min(shape) < 1:
            raise cursor.error(f"tensor {name!r} {list(shape)} does not consist of whole {word} blocks of {block}")
        return GgufTensor(name, word, shape, offset, math.prod(shape) // block * width)

    def read(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [nbytes], in memory of its own. Thread-safe."""
        tensor = self.tensors[name]
        buffer = np.empty(tensor.nbytes, np.uint8)
        view, done = memoryview(buffer), 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + (1 << 30)]], tensor.begin + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: ended inside tensor {name!r}: the file shrank while it was read")
            done += count
        return buffer


def gguf_of(path: Path | str) -> Path | None:
    """The .gguf file that `path` is or holds, else None. Raises UnsupportedError where there are several."""
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or (path / "jqserve.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UnsupportedError(f"{path}: holds several .gguf files ({names}): name one, --model-path {found[0]}")
    return found[0] if found else None
