"""The model's tokenizer: transformers' loader without torch and without code from the checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jqserve.errors import CheckpointError, RequestError, UnsupportedError
from jqserve.server.chat import ChatTemplate

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model", "tekken.json",
)  # fmt: skip


class Tokenizer:
    """Text to ids, ids to text, and the chat template. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """`tokenizer` is transformers'; `chat_template` (source text) replaces its own."""
        self._slow = tokenizer
        self.folder: str | None = None  # where its files are
        self.chat_override = chat_template
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        source = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)
        self.chat = ChatTemplate(source, special_tokens(tokenizer)) if source else None

    @property
    def size(self) -> int:
        """Ids run from 0 to `size` - 1."""
        return len(self._slow)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self._fast is not None:
            return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
        return list(self._slow.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Ids beyond the vocabulary (a model may have more rows than its tokenizer has words) give no text."""
        if self._fast is not None:
            return str(self._fast.decode(ids, skip_special_tokens=skip_special_tokens))
        known = [token for token in ids if token < self.size]
        return str(
            self._slow.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def need_chat(self) -> ChatTemplate:
        if self.chat is None:
            raise RequestError(
                "chat",
                "this model has no chat template; send text or token_ids, or start the server with --chat-template",
            )
        return self.chat


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """bos_token, eos_token, ... as the templates name them."""
    return {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def load_tokenizer(path: str, revision: str | None = None, chat_template: str | None = None) -> Tokenizer:
    """From a directory or a Hub id. `chat_template`: a file, or the template itself.

    Raises `CheckpointError` when there is none or it cannot be read. Imports transformers (seconds), so call it late.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that it found no torch
    from transformers import AutoTokenizer

    template = read_template(chat_template)
    folder = _folder(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the loader raises whatever its many backends raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not has_tokenizer(folder):  # the loader's first line ends where its list of them begins
            reason = f"it holds none of {', '.join(TOKENIZER_FILES)}"
        raise CheckpointError(
            f"no tokenizer could be loaded from {path}: {reason}\n"
            "Expected tokenizer.json (or tokenizer.model) and tokenizer_config.json there; the server's "
            "--tokenizer-path names another place. Tokenizers that need code from the checkpoint (trust_remote_code) "
            "are not supported."
        ) from error
    if not tokenizer.encode("a", add_special_tokens=False):  # of some model types transformers makes an empty one
        raise CheckpointError(
            f"no tokenizer could be loaded from {path}: its vocabulary is empty\nExpected tokenizer.json (or "
            "tokenizer.model) and tokenizer_config.json there; the server's --tokenizer-path names another place."
        )
    loaded = Tokenizer(tokenizer, template)
    loaded.folder = folder
    return loaded


def _folder(path: str, revision: str | None) -> str:
    """A directory, or what the Hub's cache has of an id. transformers' loader would ask the Hub for file after file,
    and without a network repeat each for 24 seconds, even where the cache has them all."""
    from jqserve.checkpoint.hub import resolve

    found = Path(path).expanduser()
    if found.is_dir():
        return str(found)
    try:
        if found.is_file():
            raise CheckpointError(f"it is a file; expected the directory that holds it, {found.parent}")
        if path.startswith(("/", ".", "~")):  # no Hub id
            raise CheckpointError("there is no such directory")
        return resolve(path, revision, weights=False)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"no tokenizer could be loaded from {path}: {reason}") from error


def has_tokenizer(path: str) -> bool:
    """False only for a local directory that holds no tokenizer file at all."""
    folder = Path(path).expanduser()
    return not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_template(source: str | None) -> str | None:
    """A template is told from a file name by its braces."""
    if source is None or "{" in source:
        return source
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedError(f"--chat-template {source}: neither a readable file nor a template ({error})") from error
