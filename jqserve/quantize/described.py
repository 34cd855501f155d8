"""`Described`: a config.json that has no files beside it yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Described:
    """A configuration alone, where `quant_plan` expects a checkpoint."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.config, self.path = config, path

    def optional_json(self, name: str) -> None:
        return None
