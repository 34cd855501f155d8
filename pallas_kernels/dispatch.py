"""Which implementation of an op runs, on which device, and why.

Every op owns an ordered tuple of `Implementation`s, fastest first, ending with the XLA reference, which runs
anywhere. `call` walks it: an implementation is passed over when its `requires` names a reason against the device,
or when it raises `NotImplementedError` for the shapes at hand while it is traced. `explain` makes the same walk
on abstract shapes and keeps the reasons, so that a choice is never silent.

Ops whose kernels `jqserve plan` names state their choice apart from the code, as `Candidate`s in a `choice.py` that
imports no jax: the code asks there when it is traced, and `choose` asks there where nothing can be traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Device:
    """What an implementation may ask about the device it would run on."""

    platform: str  # "cpu" or "cuda"
    kind: str  # "NVIDIA H200", "cpu"
    compute_capability: tuple[int, int] | None = None  # (9, 0) on Hopper; None off CUDA
    core_count: int = 0  # streaming multiprocessors


# Public data-sheet figures; `explain` and `jqserve plan` use them for a GPU that is not in the machine.
KNOWN_DEVICES = {
    "cpu": Device("cpu", "cpu"),
    "h200": Device("cuda", "NVIDIA H200", (9, 0), 132),
    "h100": Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 132),
    "a100": Device("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 108),
    "l40s": Device("cuda", "NVIDIA L40S", (8, 9), 142),
    "l4": Device("cuda", "NVIDIA L4", (8, 9), 58),
    "b200": Device("cuda", "NVIDIA B200", (10, 0), 148),
}

_override: contextvars.ContextVar[Device | None] = contextvars.ContextVar("pallas_kernels_device", default=None)


@functools.cache
def _default_device() -> Device:
    import jax  # here and in `explain` only: choosing for a device that is not there needs none of it

    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return KNOWN_DEVICES["cpu"]
    major, _, minor = str(device.compute_capability).partition(".")
    return Device("cuda", device.device_kind, (int(major), int(minor)), device.core_count)


def current_device() -> Device:
    """The device that ops are traced for: the one set by `use_device`, else JAX's first device."""
    return _override.get() or _default_device()


@contextlib.contextmanager
def use_device(device: Device) -> Iterator[None]:
    """Trace for `device` whatever is in this machine: to explain a choice, or to compile without a GPU."""
    token = _override.set(device)
    try:
        yield
    finally:
        _override.reset(token)


class Shaped(Protocol):
    """What a choice looks at: an array, a ShapeDtypeStruct, or an `Operand`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array's shape and the name of its dtype ("bfloat16"), which is all that a choice needs."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op. `requires(device)` returns None, or the reason why it cannot run there."""

    name: str
    fn: Callable[..., Any]
    requires: Callable[[Device], str | None] = lambda device: None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What decides about an implementation, without its code. `takes`, called with the op's arguments, of which it may
    look at nothing but shapes and dtypes, raises NotImplementedError, with the reason, for those that the code refuses.
    """

    name: str
    requires: Callable[[Device], str | None] = lambda device: None
    takes: Callable[..., object] = lambda *args, **kwargs: None

    def run_by(self, fn: Callable[..., Any]) -> Implementation:
        return Implementation(self.name, fn, self.requires)


def hopper_only(device: Device) -> str | None:
    """`requires` of kernels that use wgmma and TMA (compute capability 9.0 exactly: Blackwell dropped wgmma)."""
    if device.compute_capability == (9, 0):
        return None
    return f"needs compute capability 9.0 (Hopper), {device.kind} has {device.compute_capability}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The outcome of `explain`: the implementation that runs and, in order, those refused with the reason."""

    op: str
    chosen: str | None
    refused: tuple[tuple[str, str], ...]


_registry: dict[str, tuple[Implementation, ...]] = {}
_told: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("told", default=None)  # asked by `explain`


def register(op: str, implementations: Sequence[Implementation]) -> tuple[Implementation, ...]:
    """Makes `op` known to `explain`; returns the implementations for the op's own use with `call`."""
    _registry[op] = tuple(implementations)
    return _registry[op]


def _candidates(op: str, only: str | None) -> tuple[Implementation, ...]:
    implementations = _registry[op]
    if only is None:
        return implementations
    named = tuple(i for i in implementations if i.name == only)
    if not named:
        raise ValueError(f"{op} has no implementation {only!r}; it has {', '.join(i.name for i in implementations)}")
    return named


def call(op: str, only: str | None, *args: Any, **kwargs: Any) -> Any:
    """Runs `op` through its first implementation that takes this device and these shapes.

    `only` names one implementation and disables the fallback. Raises NotImplementedError, with each
    implementation's reason, when none takes the call.
    """
    results: list[Any] = []
    device = current_device()
    choice = _first(op, _candidates(op, only), lambda i: results.append(i.fn(*args, **kwargs)), device)
    told = _told.get()
    if told is not None:
        told.append(choice)
    if choice.chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused)
        raise NotImplementedError(f"{op}: no implementation takes this call on {device.kind}: {reasons}")
    return results[0]


def explain(op: str, fn: Callable[..., Any], *args: Any, device: Device | None = None, **kwargs: Any) -> Choice:
    """Says which implementation of `op` its public function `fn` takes for these arguments, and why.

    Nothing runs: `fn` itself is traced with `jax.eval_shape` under `use_device(device)`, and its `call` noted. So the
    answer is what a call would do, and what `fn` raises ValueError for is raised here.
    """
    import jax

    positional = {i: value for i, value in enumerate(args) if _is_array(value)}
    named = {name: value for name, value in kwargs.items() if _is_array(value)}

    def trace(positional: dict[int, Any], named: dict[str, Any]) -> None:
        fn(*(positional.get(i, value) for i, value in enumerate(args)), **{**kwargs, **named})

    told: list[Choice] = []
    token = _told.set(told)
    try:
        with use_device(device or current_device()):
            jax.eval_shape(trace, positional, named)
    except NotImplementedError:
        if not told:  # not for want of an implementation
            raise
    finally:
        _told.reset(token)
    return next(choice for choice in told if choice.op == op)


def _is_array(value: Any) -> bool:
    """An array or a ShapeDtypeStruct, but no dtype, which has a shape too."""
    return hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple)


def choose(op: str, candidates: Sequence[Candidate], *args: Any, device: Device, **kwargs: Any) -> Choice:
    """As `explain`, by the candidates' own word and without their code: nothing is traced, and jax is not imported."""
    return _first(op, candidates, lambda candidate: candidate.takes(*args, **kwargs), device)


def _first[Way: (Candidate, Implementation)](
    op: str, ways: Sequence[Way], attempt: Callable[[Way], object], device: Device
) -> Choice:
    """The first of `ways` that runs on `device` and whose attempt does not raise NotImplementedError."""
    refused: list[tuple[str, str]] = []
    with use_device(device):
        for way in ways:
            reason = way.requires(device)
            if reason is None:
                try:
                    attempt(way)
                    return Choice(op, way.name, tuple(refused))
                except NotImplementedError as error:
                    reason = str(error)
            refused.append((way.name, reason))
    return Choice(op, None, tuple(refused))
