"""A .gguf file as a checkpoint: the same questions and answers as `hf.Checkpoint`, under Hugging Face's names."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from jqserve.checkpoint.gguf_config import ROPE_FACTORS, config_json, hf_name
from jqserve.checkpoint.gguf_file import GgufFile
from jqserve.checkpoint.gguf_tokenizer import has_tokenizer, special_ids_beside, write_tokenizer
from jqserve.checkpoint.readers.gguf import FLOATS, GgufPlan, dequantized
from jqserve.checkpoint.safetensors_file import TensorEntry
from jqserve.errors import CheckpointError

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
EMBEDDING = "model.embed_tokens.weight"


class GgufCheckpoint:
    """Matrices are read as bytes, uint8 [N, bytes of a row], for their `Gguf` scheme; norms and biases as floats; an
    embedding in blocks is dequantized. llama.cpp's order of rows in q and k (rotary pairs side by side) is undone.

    Raises CheckpointError or UnsupportedError, naming the file, before any tensor but rope_freqs is read.
    """

    note, working_bytes = "", (0, 0)

    def __init__(self, path: Path, *, readers: int = 4) -> None:
        self.path, self._file = path, GgufFile(path)
        self._pool = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="read")
        self._pending: dict[str, Future[np.ndarray]] = {}
        try:
            self._names: dict[str, str] = {}
            for name in self._file.tensors:
                if name != ROPE_FACTORS:
                    self._names[hf_name(name) or f"gguf.{name}"] = name
            self.config = self._config()
        except BaseException:
            self.close()
            raise

    def _config(self) -> dict[str, Any]:
        if EMBEDDING not in self._names:
            raise CheckpointError(f"{self.path}: tensor 'token_embd.weight' is missing")
        factors = None
        if ROPE_FACTORS in self._file.tensors:
            if self._file.tensors[ROPE_FACTORS].kind != "F32":
                raise CheckpointError(f"{self.path}: {ROPE_FACTORS} is not F32")
            factors = self._file.read(ROPE_FACTORS).view(np.float32)
        rows, tied = self.shape(EMBEDDING)[0], "lm_head.weight" not in self._names
        biased = frozenset(name.split(".")[-2] for name in self._names if name.endswith("_proj.bias"))
        config = config_json(str(self.path), self._file.fields, rows, tied, factors, biased)
        return config if has_tokenizer(self._file) else {**config, **special_ids_beside(self.path)}

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._file.close()

    @property
    def plan(self) -> GgufPlan:
        """The quantization plan: the types of the matrices."""
        kinds = {n.removesuffix(".weight"): self.dtype(n) for n in self._names if n.endswith(".weight")}
        return GgufPlan(kinds)

    @property
    def unread(self) -> list[str]:
        return []

    def optional_json(self, name: str) -> dict[str, Any] | None:
        """A GGUF file has no files beside it."""
        return None

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def entry(self, name: str) -> TensorEntry:
        tensor = self._file.tensors[self._names[name]]
        if name == EMBEDDING and tensor.kind not in FLOATS:  # as it is handed over, which is what loading has to hold
            return TensorEntry(name, "F32", tensor.shape, tensor.begin, 4 * math.prod(tensor.shape))
        return TensorEntry(name, tensor.kind, tensor.shape, tensor.begin, tensor.nbytes)

    def file_of(self, name: str) -> Path:
        return self.path

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        return self.entry(name).dtype

    def prefetch(self, names: list[str]) -> None:
        for name in names:
            if name not in self._pending:
                self._pending[name] = self._pool.submit(self._read, name)

    def read(self, name: str) -> np.ndarray:
        future = self._pending.pop(name, None)
        return future.result() if future is not None else self._read(name)

    def read_bytes(self, name: str, begin: int, end: int) -> np.ndarray:
        return self._read(name).reshape(-1).view(np.uint8)[begin:end]

    def _read(self, name: str) -> np.ndarray:
        tensor = self._file.tensors[self._names[name]]
        raw = self._file.read(tensor.name)
        if tensor.kind in FLOATS:
            found = raw.view(_DTYPES[tensor.kind]).reshape(tensor.shape)
        elif name == EMBEDDING:
            found = dequantized(tensor.kind, raw, tensor.shape[0], tensor.shape[1])
        else:
            found = raw.reshape(tensor.shape[0], -1)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and self.config["model_type"] == "llama":
            return _paired_to_halves(found, self.config[heads])
        return found

    def copy_side_files(self, out: Path) -> None:
        """config.json and the tokenizer's files, made from the fields, or those beside where the file has none."""
        (out / "config.json").write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        if not write_tokenizer(self._file, out):
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if (self.path.parent / name).is_file():
                    shutil.copyfile(self.path.parent / name, out / name)


def _paired_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns rows (2i, 2i + 1) of a head together, transformers rows (i, i + Dh/2): [N, ...] -> the latter."""
    if rows.shape[0] % (2 * heads):
        return rows  # the header check names the shape
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(paired, 1, 2)).reshape(rows.shape)
