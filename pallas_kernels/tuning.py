"""Measured tile configs. An op asks here before it takes its heuristic's; bench/tune.py writes the answers.

The whole interface between an op and the tuner is one call where the op picks its config:

    config = tuning.choose(
        "scaled_matmul", tuning.key(m=tuning.bucket(m), n=n, k=k, kind="fp8"),
        heuristic=lambda: heuristic(m, n, k), space=lambda: search_space(m, n, k),
    )

It returns the config of tuned/<device>.json for that op and key, else `heuristic()`. Configs are frozen dataclasses of
plain fields. The tuner finds out what can be tuned by tracing a public op under `recording()`, and tries a candidate by
tracing it again under `forcing(...)`: nothing else has to be written for a new op. So `choose` must be reached each
time that the op is traced: not inside a jit of the library's own whose trace is cached.

tuned/<device>.json has the frame of a result (device, versions, commit, command, date) and "entries":
{op: {key: {"config": {field: value}, "us": measured, "heuristic_us": measured}}}. An entry whose fields are no longer
the config's is passed over with a warning.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.dispatch import Device, current_device

FOLDER = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Request:
    """One question that an op asked while it was traced. `space` has the heuristic's config first."""

    op: str
    key: str
    heuristic: Any
    space: tuple[Any, ...]


_forced: contextvars.ContextVar[dict[tuple[str, str], Any] | None] = contextvars.ContextVar("forced", default=None)
_recorded: contextvars.ContextVar[list[Request] | None] = contextvars.ContextVar("recorded", default=None)


def key(**fields: Any) -> str:
    """The name of a problem: `key(m=16, n=4096)` is "m=16 n=4096". The order is the caller's and counts."""
    return " ".join(f"{name}={value}" for name, value in fields.items())


def bucket(n: int) -> int:
    """The next power of two: shapes that vary at run time are measured at these."""
    return 1 << max(0, n - 1).bit_length()


def path_for(device: Device) -> Path:
    """Where the configs of a kind of device are kept: tuned/nvidia-h200.json."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device.kind.lower()).strip('-')}.json"


@functools.cache
def _entries(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(path.read_text())["entries"] if path.exists() else {}


def lookup[Config](op: str, key: str, config_type: type[Config], device: Device | None = None) -> Config | None:
    """The measured config of `op` for `key` on `device` (default: the one traced for), or None."""
    path = path_for(device or current_device())
    entry = _entries(path).get(op, {}).get(key)
    if entry is None:
        return None
    try:
        return config_type(**entry["config"])
    except TypeError:
        warnings.warn(f"{path.name}: {op} {key!r} does not fit {config_type.__name__}; run bench/tune.py", stacklevel=2)
        return None


def choose[Config](
    op: str,
    key: str,
    *,
    heuristic: Callable[[], Config],
    space: Callable[[], Iterable[Config]],
    check: Callable[[Config], object] = lambda _: None,
) -> Config:
    """The config to run `op` with: forced by the tuner, measured, or the heuristic's (which may raise).

    check    raises NotImplementedError for a config that this call cannot run. A measured one that it refuses is passed
             over: a key stands for more than the shape and dtypes that were measured (its bucket of M, other scales)
    """
    forced = _forced.get()
    if forced is not None and (op, key) in forced:
        return forced[op, key]
    recorded = _recorded.get()
    if recorded is not None:
        first = heuristic()
        recorded.append(Request(op, key, first, tuple(dict.fromkeys([first, *space()]))))
        return first
    known = _entries(path_for(current_device()))
    if key in known.get(op, {}):
        config = lookup(op, key, type(heuristic()))
        if config is not None:
            with contextlib.suppress(NotImplementedError):
                check(config)
                return config
    return heuristic()


@contextlib.contextmanager
def forcing(op: str, key: str, config: Any) -> Iterator[None]:
    """`choose` answers `config` for (op, key) in this thread."""
    token = _forced.set({**(_forced.get() or {}), (op, key): config})
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[Request]]:
    """Collects what ops ask; they get their heuristics' configs, whatever was measured."""
    requests: list[Request] = []
    token = _recorded.set(requests)
    try:
        yield requests
    finally:
        _recorded.reset(token)
