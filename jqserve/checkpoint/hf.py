"""A Hugging Face checkpoint directory: its JSON files and its shards, every header checked, every read lazy."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jqserve.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from jqserve.errors import CheckpointError, UnsupportedError

INDEX = "model.safetensors.index.json"
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
SINGLE = "model.safetensors"
#: The manifest of a directory that `jqserve convert` wrote.
MANIFEST = "jqserve.json"
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
#: config.json and the like are small; a larger one is not what it says.
MAX_JSON_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError naming the file and the place of a syntax error."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise CheckpointError(f"{path}: is not a regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is no configuration; at most {MAX_JSON_BYTES}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(data).__name__}")
    return data


class Checkpoint:
    """The files of one model directory. Opening checks the index and the headers of all shards; no tensor is read.

    With `weights=False` only the JSON files are looked at (`--load-format dummy`).
    note is for the load plan; working_bytes, (device, host), is what making the tensors takes beside the model: both
    are empty for tensors that are simply read.
    Raises CheckpointError or UnsupportedError, naming the file, what was found and what to do.
    """

    note = ""

    @property
    def working_bytes(self) -> tuple[int, int]:
        return 0, 0

    def __init__(self, path: Path | str, *, weights: bool = True, readers: int = 4) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: is not a directory; expected a checkpoint's, with its config.json")
        self.config = read_json(self.path / "config.json")
        self._files: list[SafetensorsFile] = []
        self._where: dict[str, SafetensorsFile] = {}
        self._pool = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="read")
        self._pending: dict[str, Future[np.ndarray]] = {}
        if weights:
            try:
                self._open_shards()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what was prefetched and closes the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        for file in self._files:
            file.close()

    def optional_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file `name` of the directory, or None where there is no such file."""
        return read_json(self.path / name) if (self.path / name).exists() else None

    def names(self) -> list[str]:
        """All tensor names, shard after shard, in the order of the data."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def entry(self, name: str) -> TensorEntry:
        """The header's entry: dtype as the file calls it, shape, bytes."""
        return self._where[name].tensors[name]

    def file_of(self, name: str) -> Path:
        """The shard that holds the tensor, for messages."""
        return self._where[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """The safetensors dtype: "BF16", "I32", "F8_E4M3", ..."""
        return self.entry(name).dtype

    def prefetch(self, names: list[str]) -> None:
        """Starts reading `names` in threads; `read` hands them over. The caller bounds how much is ahead."""
        for name in names:
            if name not in self._pending:
                self._pending[name] = self._pool.submit(self._where[name].read, name)

    def read(self, name: str) -> np.ndarray:
        """The tensor in memory of its own; bfloat16 and float8 as ml_dtypes. A prefetched one is handed over once."""
        future = self._pending.pop(name, None)
        return future.result() if future is not None else self._where[name].read(name)

    def read_bytes(self, name: str, begin: int, end: int) -> np.ndarray:
        """Bytes begin..end of the tensor's data, uint8 [end - begin]."""
        return self._where[name].read_bytes(name, begin, end)

    @property
    def unread(self) -> list[str]:
        """Safetensors files of the directory that are no part of the model: adapters, second copies."""
        read = {file.path.name for file in self._files}
        return sorted(p.name for p in self.path.glob("*.safetensors") if p.name not in read)

    def copy_side_files(self, out: Path) -> None:
        """Configuration, tokenizer and templates, to the directory `out`."""
        for pattern in SIDE_FILES:
            for file in sorted(self.path.glob(pattern)):
                if file.name not in (INDEX, MANIFEST):
                    shutil.copyfile(file, out / file.name)

    def _open_shards(self) -> None:
        listed = self._index()
        for shard in sorted(set(listed.values())) if listed else self._shards_without_index():
            file = SafetensorsFile(self.path / shard)
            self._files.append(file)
            for name in file.tensors:
                if name in self._where:
                    raise CheckpointError(f"tensor {name!r} is in both {self._where[name].path} and {file.path}")
                self._where[name] = file
        for name, shard in listed.items():
            if name not in self._where or self._where[name].path.name != shard:
                raise CheckpointError(f"{self.path / INDEX} places tensor {name!r} in {shard}, which does not hold it")

    def _index(self) -> dict[str, str]:
        path = self.path / INDEX
        if not path.exists():
            return {}
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: has no weight_map {{tensor: file}}")
        for name, shard in weight_map.items():
            if (
                not isinstance(shard, str)
                or shard == ".."
                or Path(shard).name != shard
                or not 0 < len(shard.encode("utf-8", "replace")) < 256
            ):
                raise CheckpointError(
                    f"{path}: tensor {name!r} points to {str(shard)[:80]!r}, which is not a file name"
                )
        shards = sorted(set(weight_map.values()))
        if SINGLE not in shards and (self.path / SINGLE).exists():
            raise CheckpointError(
                f"{self.path}: {SINGLE} stands beside {INDEX}, which names other files: which of them is the model? "
                "Remove the one that is not"
            )
        missing = [s for s in shards if not (self.path / s).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(shards)} shards named in {INDEX} are missing: "
                f"{', '.join(missing[:5])}; download the checkpoint again"
            )
        return weight_map

    def _shards_without_index(self) -> list[str]:
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        found = sorted(p.name for p in self.path.glob("*.safetensors"))
        if len(found) == 1 and not _NUMBERED.fullmatch(found[0]):
            return found
        numbered = [m for m in map(_NUMBERED.fullmatch, found) if m]
        if numbered:
            prefix, total = numbered[0][1], numbered[0][3]
            wanted = [f"{prefix}-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
            missing = [w for w in wanted if w not in found]
            if missing:
                raise CheckpointError(f"{self.path}: shards are missing: {', '.join(missing[:5])}; download them again")
            return wanted
        if found:
            raise CheckpointError(f"{self.path}: several .safetensors files and no {INDEX}: {', '.join(found[:5])}")
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern)]
        if pickles:
            raise UnsupportedError(
                f"{self.path}: {pickles[0]} is a pickle, which may run code when it is read; only .safetensors is "
                "read: save the model with safetensors"
            )
        if (self.path / MANIFEST).is_file():
            raise UnsupportedError(
                f"{self.path}: `jqserve convert` wrote it, for serving; this needs the checkpoint that it was made from"
            )
        raise CheckpointError(
            f"{self.path}: has no .safetensors file; for random weights in config.json's scheme use --load-format dummy"
        )
