"""Regular expressions out of a config file: bounded in length and in time, and their errors named."""

from __future__ import annotations

import functools
from typing import Any

import regex  # `re` with a time limit: "(x+)+!" of a hostile config would keep `re` busy for years

from jqserve.checkpoint.fields import Fields
from jqserve.errors import CheckpointError

MAX_PATTERN = 2000
#: Of one match. Patterns of real checkpoints take microseconds on a module's name.
SECONDS = 0.5


@functools.cache
def _compiled(pattern: str, where: str) -> Any:
    if len(pattern) > MAX_PATTERN:
        raise CheckpointError(f"{where}: a pattern of {len(pattern)} characters; at most {MAX_PATTERN} are taken")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {pattern[:80]!r} is not a regular expression: {error}") from error


def regex_matches(pattern: str, name: str, where: str) -> bool:
    """Python's `re.match`: anchored at the start of `name`, not at its end.

    Raises CheckpointError for what is no pattern, and for one that takes longer than SECONDS.
    """
    try:
        return _compiled(pattern, where).match(name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise CheckpointError(
            f"{where}: the pattern {pattern[:80]!r} takes more than {SECONDS} s on {name!r} (nested repetitions?); "
            "write it simpler"
        ) from error


class SkipList:
    """Modules that transformers did not quantize: an entry is a prefix by `re.match`, or a suffix of the name.

    Source: transformers 5, quantizers_utils.should_convert_module.
    """

    def __init__(self, config: Fields, key: str) -> None:
        self._entries, self._key, self._where = config.texts(key), key, f"{config.where}, {key}"

    def why(self, module: str) -> str:
        """Which entry names the module, in words; "" for none."""
        for entry in self._entries:
            if module.endswith(entry) or regex_matches(entry, module, self._where):
                return f"{self._key} has {entry!r}"
        return ""
