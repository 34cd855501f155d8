"""The tokenizer's files as one zip, so that a gateway on another machine needs no model files."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

from jqserve.errors import UnsupportedError

NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip of the same files has the same digest on every worker


def make_bundle(folder: Path, chat_template: str | None = None) -> tuple[bytes, str]:
    """(zip, its sha256 in hexadecimal). `chat_template`: source text that replaces the checkpoint's own.

    Raises `UnsupportedError` when there is no tokenizer.
    """
    files = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}
    if not files.keys() & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UnsupportedError(f"there is no tokenizer file in {folder.name}")
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()
