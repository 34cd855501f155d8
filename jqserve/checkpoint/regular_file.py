"""Opening a file of a checkpoint, which may be anything: a pipe would wait for ever, a device may do worse."""

from __future__ import annotations

import os
from pathlib import Path

from jqserve.errors import CheckpointError


def open_regular(path: Path) -> int:
    """A descriptor for reading. Raises CheckpointError for what is no regular file, or cannot be opened."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
