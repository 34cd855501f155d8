"""Compiled programs kept between starts, in a folder that only its owner may write: what lies there is run as code.

Two layers. JAX's own persistent cache is keyed by the lowered program, so finding something in it still costs tracing
and lowering it: 2 to 4 seconds of one core for a step program of an 8B model, and a server has some thirty of them. So
the step programs' executables are kept whole as well, under a key made of all that goes into them: our source, the
versions, the device, XLA's flags, the model's structure and the shapes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from jqserve.errors import CheckpointError
from jqserve.ops.compiler_options import compiler_options

log = logging.getLogger(__name__)

OFF = "off"
DEFAULT = "~/.cache/jqserve/programs"  # on a GPU; a CPU compiles little and is used by tests
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-cuda13-pjrt", "jax-cuda12-pjrt", "flax")
SOURCES = ("jqserve", "pallas_kernels")


def choose_folder(asked: str | None, platform: str) -> Path | None:
    """The folder to use, made and checked; None: no cache. Raises CheckpointError for one that others can write."""
    if asked == OFF or (asked is None and platform == "cpu"):
        return None
    path = Path(asked or DEFAULT).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if asked is None:
            log.warning("no compilation cache: %s cannot be made (%s)", path, error)
            return None
        raise CheckpointError(
            f"compilation cache {path}: it cannot be made ({error}); name another directory"
        ) from None
    check_private(path)
    return path.resolve()


def check_private(path: Path) -> None:
    """Raises CheckpointError unless only this user may change the folder, or put another in its place."""
    real = path.resolve()
    status = real.stat()
    problem = None
    if status.st_uid != os.getuid():
        problem = f"it belongs to user {status.st_uid}, not to you ({os.getuid()})"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"others than you may write there (mode {stat.S_IMODE(status.st_mode):o})"
    else:
        above = real.parent.stat()
        if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
            problem = f"everybody may replace it, for {real.parent} can be written by all"
    if problem:
        raise CheckpointError(
            f"compilation cache {path}: {problem}, and its entries are run as code; chmod 700 a directory of your own, "
            f"name another one with --compilation-cache-dir, or turn it off with --compilation-cache-dir {OFF}"
        )


def use_jax_cache(folder: Path | None) -> None:
    """Points JAX's persistent cache there (None: leaves it as it is), apart for each state of our source."""
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / f"xla-{source_digest()[:16]}"))
    compilation_cache.reset_cache()  # an array made before now has opened whatever cache was set for the machine
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


_thread = threading.local()


@functools.cache
def _listen() -> None:
    def heard(event: str, **_: Any) -> None:
        if event.endswith("/cache_hits"):
            _thread.hits = getattr(_thread, "hits", 0) + 1

    jax.monitoring.register_event_listener(heard)


def compile_lowered(lowered: jax.stages.Lowered, captured: bool = True) -> tuple[Any, bool]:
    """(executable, whether it was really compiled): False when JAX's cache had it. What was read back from there must
    not be written again: a CPU executable loses functions on the way, and fails when it is run."""
    _listen()
    before = getattr(_thread, "hits", 0)
    compiled = lowered.compile(compiler_options(captured))
    return compiled, getattr(_thread, "hits", 0) == before


@functools.cache
def source_digest() -> str:
    """Of every .py and .json file of our packages: a changed kernel or tuning table is another program."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for top in SOURCES:
        for path in sorted((root / top).rglob("*")):
            if path.suffix in (".py", ".json") and path.is_file():
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def environment_facts(device: Any) -> dict[str, Any]:
    """What of this machine goes into a program."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "source": source_digest(),
        "device": f"{device.platform} {device.device_kind} {getattr(device, 'compute_capability', '')}",
        "platform_version": device.client.platform_version,
        "flags": os.environ.get("XLA_FLAGS", ""),
        "options": compiler_options(),
    }


def key_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def remembered(folder: Path | None, facts: dict[str, Any], compute: Callable[[], int]) -> int:
    """`compute()`, or what it gave an earlier process with the same facts (JSON)."""
    if folder is None:
        return compute()
    path = folder / "numbers" / key_of(facts)
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        value = compute()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(str(value))
    partial.replace(path)
    return value


def compile_program(
    name: str, lower: Callable[[], jax.stages.Lowered], cache: ProgramCache | None, captured: bool = True
) -> tuple[Any, bool]:
    """(executable, whether it was made now): from the cache, or lowered and compiled. Any thread may call this."""
    if cache is not None and (known := cache.load(name)) is not None:
        return known, False
    began = time.perf_counter()
    lowered = lower()
    lower_seconds = time.perf_counter() - began
    began = time.perf_counter()
    compiled, new = compile_lowered(lowered, captured)
    seconds = time.perf_counter() - began
    how = "compiled" if new else "found in JAX's cache"
    log.debug("%s: lowered after %.1f s, %s in %.1f s", name, lower_seconds, how, seconds)
    if cache is not None and new:
        cache.store(name, compiled)
    return compiled, True


class ProgramCache:
    """Executables by name, for one model on one device. Threads may use it at once."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """`facts` (JSON): everything but the name that makes a program what it is."""
        self.folder = folder / "steps" / key_of(facts)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.hits = 0

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def load(self, name: str) -> Any | None:
        """The executable, or None when there is none that works."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                compiled = serialize_executable.deserialize_and_load(*pickle.load(file))
        except FileNotFoundError:
            return None
        except Exception as error:  # a truncated file, another driver: compiling it again is always right
            log.warning("the compiled program %s cannot be used (%s: %s)", path, type(error).__name__, error)
            return None
        self.hits += 1
        return compiled

    def store(self, name: str, compiled: Any) -> None:
        """Keeps it; what cannot be kept is only logged."""
        partial = self.folder / f".{name}.{os.getpid()}"
        try:
            content = pickle.dumps(serialize_executable.serialize(compiled))
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
            partial.replace(self.folder / name)
        except Exception as error:
            log.warning("the compiled program %s cannot be kept (%s: %s)", name, type(error).__name__, error)
            partial.unlink(missing_ok=True)
