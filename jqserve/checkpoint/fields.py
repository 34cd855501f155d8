"""Typed reading of a JSON object whose errors name the file, the key, what was found and what is expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jqserve.errors import CheckpointError, UnsupportedError

_REQUIRED: Any = object()


class Fields:
    """A view of `data`, which stands in `where` ("<dir>/config.json, quantization_config")."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"{where}: a JSON object is expected, found {type(data).__name__} {str(data)[:60]!r}")
        self.data: dict[str, Any] = data
        self.where = where

    def error(self, key: str, expected: str) -> CheckpointError:
        """What to raise for a value that makes no sense."""
        found = repr(self.data[key])[:120] if key in self.data else "nothing"
        return CheckpointError(f"{self.where}: {key}: found {found}, expected {expected}")

    def unsupported(self, key: str, supported: str) -> UnsupportedError:
        """What to raise for a value that makes sense but is not supported."""
        found = repr(self.data[key])[:120] if key in self.data else "nothing"
        return UnsupportedError(f"{self.where}: {key}: {found} is not supported; supported: {supported}")

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = 1 << 31) -> Any:
        """An int in [minimum, maximum]; `default` where the key is absent or null."""
        value = self.data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if isinstance(value, float) and value.is_integer():  # some tools write 131072.0
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite float; `default` where the key is absent or null."""
        value = self.data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.error(key, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where the key is absent or null."""
        value = self.data.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.error(key, "a list of strings")
        return tuple(value)

    def child(self, key: str) -> Fields | None:
        """The object under `key`, or None where it is absent or null."""
        value = self.data.get(key)
        return None if value is None else Fields(value, f"{self.where}, {key}")

    def one_of(self, key: str, allowed: Iterable[Any], default: Any = _REQUIRED) -> Any:
        """One of `allowed` (compared as they are); anything else is refused by name."""
        value = self.data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        choices = list(allowed)
        if isinstance(value, bool) or value not in choices:
            raise self.unsupported(key, ", ".join(map(repr, choices)))
        return value
