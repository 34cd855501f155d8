"""Calibration data: text, jsonl (text or chats) or token ids -> rows of ids, all of one length.

Documents are joined, an end-of-text token between them, and cut into rows without padding; where there are more rows
than asked for, evenly spaced ones are taken, or `seed` draws them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jqserve.errors import RequestError

FLAG = "--calibration"
SUFFIXES = (".txt", ".md", ".jsonl", ".npy")


class Encoder(Protocol):
    """What is needed of a tokenizer (jqserve.server.tokenizer.Tokenizer)."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def need_chat(self) -> Any: ...


def read_calibration(
    path: Path,
    samples: int,
    seqlen: int,
    vocab_size: int,
    encoder: Any,
    end: int | None,
    seed: int | None = None,
    short: str = "lower --seqlen",
) -> np.ndarray:
    """int32 [at most `samples`, seqlen]. path: a file, or a directory of files (sorted by name).

    encoder: a function without arguments that gives the tokenizer; called for text only. end: the id between documents.
    short: what to do where there are fewer tokens than one row has.
    Raises RequestError that names the file, and the line where there is one.
    """
    if samples < 1 or seqlen < 1:
        raise RequestError("--samples" if samples < 1 else "--seqlen", "must be at least 1")
    if seed is not None and seed < 0:
        raise RequestError("--seed", f"must not be negative, found {seed}")
    documents = [ids for file in _files(path) for ids in _read(file, encoder)]
    parts: list[np.ndarray] = []
    for i, ids in enumerate(documents):
        if i and end is not None and parts[-1][-1] != end:
            parts.append(np.array([end], np.int64))
        parts.append(ids)
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    if stream.size and (stream.min() < 0 or stream.max() >= vocab_size):
        bad = int(stream[(stream < 0) | (stream >= vocab_size)][0])
        raise RequestError(FLAG, f"{path}: holds token id {bad}; the model has 0..{vocab_size - 1}")
    rows = stream.size // seqlen
    if rows == 0:
        raise RequestError(FLAG, f"{path}: holds {stream.size} tokens, fewer than one row of {seqlen}: {short}")
    chosen = np.arange(rows)
    if rows > samples and seed is None:
        chosen = np.linspace(0, rows - 1, samples).round().astype(np.int64)
    elif rows > samples:
        chosen = np.sort(np.random.default_rng(seed).choice(rows, samples, replace=False))
    return stream[: rows * seqlen].reshape(rows, seqlen)[chosen].astype(np.int32)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RequestError(FLAG, f"no such file or directory: {path}")
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise RequestError(FLAG, f"{path}: has no file that ends in {', '.join(SUFFIXES)}")
    return found


def _read(file: Path, encoder: Any) -> Iterator[np.ndarray]:
    """The documents of a file, as ids; empty ones are left out."""
    if file.suffix == ".npy":
        yield from _ids(file)
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(FLAG, f"{file}: cannot be read as text: {error}") from None
    tokenizer: Encoder = encoder()
    documents = _jsonl(file, text, tokenizer) if file.suffix == ".jsonl" else iter([text])
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False)
        if ids:
            yield np.array(ids, np.int64)


def _ids(file: Path) -> Iterator[np.ndarray]:
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise RequestError(FLAG, f"{file}: is not a .npy of plain numbers: {error}") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise RequestError(
            FLAG, f"{file}: expected ids, int [tokens] or [rows, tokens], found {array.dtype} {array.shape}"
        )
    yield array.reshape(-1).astype(np.int64)  # rows of a table follow each other without an end-of-text


def _jsonl(file: Path, text: str, tokenizer: Encoder) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(FLAG, f"{file}, line {number}: not JSON: {error}") from None
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            if any("\ud800" <= c <= "\udfff" for c in row["text"]):  # which JSON can write, and UTF-8 cannot
                raise RequestError(
                    FLAG, f"{file}, line {number}: holds half of a surrogate pair, which is no character"
                )
            yield row["text"]
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            try:
                yield tokenizer.need_chat().render(row["messages"], add_generation_prompt=False)
            except RequestError as error:
                raise RequestError(FLAG, f"{file}, line {number}: {error}") from None
        else:
            raise RequestError(FLAG, f'{file}, line {number}: expected {{"text": ...}} or {{"messages": [...]}}')
