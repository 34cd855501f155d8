"""What an operator may ask of a running engine (`wire.Ask`): forget cached prefixes, profile."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jqserve.errors import PreconditionError

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore


class Operator:
    """Answers each verb with a JSON object. Raises `PreconditionError`, in words for the operator."""

    def __init__(self, engine: EngineCore, profile_dir: str | None) -> None:
        self._engine = engine
        self._profile_dir = profile_dir
        self._profiling: str | None = None

    def __call__(self, verb: str) -> dict[str, Any]:
        if verb == "flush_cache":
            return {"pages": self._engine.flush_cache()}
        if verb == "start_profile":
            return {"directory": self._start()}
        if verb == "stop_profile":
            return {"directory": self._stop()}
        raise PreconditionError(f"unknown verb {verb!r}")

    def _start(self) -> str:
        import jax

        if self._profiling is not None:
            raise PreconditionError(f"the profiler runs already, into {self._profiling}")
        parent = self._profile_dir or os.path.join(tempfile.gettempdir(), f"jqserve-profile-{os.getuid()}")
        folder = Path(parent).expanduser() / time.strftime("%Y%m%d-%H%M%S")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            jax.profiler.start_trace(str(folder))
        except (OSError, RuntimeError) as error:
            raise PreconditionError(f"the profiler cannot start in {folder}: {error}") from error
        self._profiling = str(folder)
        return self._profiling

    def _stop(self) -> str:
        import jax

        if self._profiling is None:
            raise PreconditionError("no profiler runs")
        folder, self._profiling = self._profiling, None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            raise PreconditionError(f"the trace could not be written to {folder}: {error}") from error
        return folder
