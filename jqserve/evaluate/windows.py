"""The text that a model is measured on: ids, cut into windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.errors import RequestError

FLAG = "--text"


def read_windows(path: Path, windows: int, length: int, vocab_size: int, encoder: Callable[[], Any]) -> np.ndarray:
    """int32 [at most `windows`, length], the first ones of the text.

    path: .npy (int, any shape), .bin (uint16, as training corpora are kept), or text in UTF-8, for which `encoder`
    gives the tokenizer. Raises RequestError naming the file.
    """
    if windows < 1 or length < 2:
        raise RequestError("--windows" if windows < 1 else "--seqlen", "windows must be at least 1, their length 2")
    if not path.is_file():
        raise RequestError(FLAG, f"no such file: {path}")
    try:
        if path.suffix == ".npy":
            ids = np.load(path, allow_pickle=False).reshape(-1)
        elif path.suffix == ".bin":
            ids = np.fromfile(path, "<u2")
        else:
            ids = np.array(encoder().encode(path.read_text(encoding="utf-8-sig"), add_special_tokens=False))
    except (ValueError, OSError, EOFError) as error:
        raise RequestError(FLAG, f"{path}: cannot be read as {path.suffix or 'text'}: {error}") from None
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size):
        raise RequestError(FLAG, f"{path}: holds something that is no token id of the model, 0..{vocab_size - 1}")
    count = min(windows, ids.size // length)
    if count == 0:
        raise RequestError(FLAG, f"{path}: holds {ids.size} tokens, fewer than one window of --seqlen {length}")
    return ids[: count * length].reshape(count, length).astype(np.int32)
