"""Regular expressions out of a config file: bounded in length, and their errors named."""

from __future__ import annotations

import functools
import re

from jqserve.errors import CheckpointError

MAX_PATTERN = 2000


@functools.cache
def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    if len(pattern) > MAX_PATTERN:
        raise CheckpointError(f"{where}: a pattern of {len(pattern)} characters; at most {MAX_PATTERN} are taken")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {pattern[:80]!r} is not a regular expression: {error}") from error


def regex_matches(pattern: str, name: str, where: str) -> bool:
    """Python's `re.match`: anchored at the start of `name`, not at its end."""
    return _compiled(pattern, where).match(name) is not None
