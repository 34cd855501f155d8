"""What the quantizer holds on a device, summed up without one.

`Ledger` follows a real run on the CPU whose sizes are all a 16th of an 8B model's (arrays: a 256th). At every program
it adds up, as if at full size,
- the arrays alive in Python, and those that a program still computes or reads: they stay in a GPU's memory until it is
  done, however far the host has run ahead. A program counts as done once something later than it was waited for;
- what the program itself takes: temporaries and results, from XLA's own analysis of it, compiled at full size for an
  H200. (cuDNN's attention is left out of it, whose kernel needs its arguments and its result.)
Arrays between programs (`x / y` outside of a jit) count while Python holds them.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.quantize_shape import shape
from jqserve.models.config import ModelConfig
from jqserve.quantize import activations, awq, block, codes, compensate, gptq, host, layer, moments, report
from pallas_kernels.dispatch import KNOWN_DEVICES, use_device
from tests.pallas_kernels.aot import h200_sharding

SCALE = 16
FULL = shape(1)
SMALL = dataclasses.replace(
    FULL, heads=4, kv_heads=1, head_dim=64, hidden_size=FULL.hidden_size // SCALE, ffn_size=FULL.ffn_size // SCALE
)
MODULES = (activations, awq, block, codes, compensate, gptq, layer, moments, report)


@dataclasses.dataclass
class Entry:
    """A program's start: bytes at full size, of all arrays (by dtype and shape as they are here) and of its own."""

    name: str
    arrays: dict[str, int]
    own: int

    @property
    def total(self) -> int:
        return sum(self.arrays.values()) + self.own

    def __str__(self) -> str:
        rows = sorted(self.arrays.items(), key=lambda row: -row[1])
        parts = {"in all": self.total, "its own": self.own} | {name: size for name, size in rows if size >= 2**24}
        return f"{self.name}: " + ", ".join(f"{name} {size / 2**30:.3f} GiB" for name, size in parts.items())


class Ledger:
    """Watches the programs of jqserve.quantize from `watch` on."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._flying: list[tuple[int, list[jax.Array]]] = []  # the number of a program and what it takes and makes
        self._number = 0
        self._made: dict[int, tuple[int, weakref.ref[Any]]] = {}  # id of an array -> its program's number, and itself
        self._own: dict[Any, int] = {}

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        self._others = jax.live_arrays()  # also keeps their ids
        self._before = {id(x) for x in self._others}
        wait, keep, fetch = jax.block_until_ready, host.keep, host.fetch

        def waited(tree: Any) -> Any:
            for leaf in jax.tree.leaves(tree):
                self.done(leaf)
            return wait(tree)

        def kept(x: Any, *, pinned: bool | None = None) -> np.ndarray:
            result = np.array(keep(x, pinned=pinned))  # a copy: on the CPU it would be the same memory
            if isinstance(x, jax.Array):  # on its way: done with when the copy has been waited for
                at = self._at(x)
                self._flying.append((at, [x]))
                result = result.view(_Waited)
                self._made[id(result)] = at, weakref.ref(result)
            return result

        def fetched(x: Any) -> jax.Array:
            result = fetch(x)
            self._note([result], [])
            return result

        def scalar(kind: type) -> Callable[[Any], Any]:
            def read(x: Any) -> Any:
                self.done(x)
                return kind(x)

            return read

        patch.setattr(jax, "block_until_ready", waited)
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if hasattr(value, "lower") and hasattr(value, "trace"):
                    patch.setattr(module, name, self._program(name.lstrip("_"), value))
            for name, replaced in {"keep": kept, "fetch": fetched, "np": _Numpy(self)}.items():
                if hasattr(module, name):
                    patch.setattr(module, name, replaced)
            for kind in (bool, float):
                patch.setattr(module, kind.__name__, scalar(kind), raising=False)

    def summary(self) -> list[Entry]:
        """The largest of each program."""
        found: dict[str, Entry] = {}
        for entry in self.entries:
            if entry.name not in found or entry.total > found[entry.name].total:
                found[entry.name] = entry
        return sorted(found.values(), key=lambda entry: -entry.total)

    def peak(self) -> Entry:
        return max(self.entries, key=lambda entry: entry.total)

    def done(self, x: Any) -> None:
        """x was waited for, and with it what came before."""
        if isinstance(x, jax.Array | _Waited):
            number = self._at(x)
            self._flying = [(at, arrays) for at, arrays in self._flying if at > number]

    def _at(self, x: Any) -> int:
        """The number of the program that made x, or of the last one before it."""
        number, made = self._made.get(id(x), (0, None))
        if made is not None and made() is x:
            return number
        self._made[id(x)] = self._number, weakref.ref(x)
        return self._number

    def _program(self, name: str, function: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            arrays: dict[str, int] = {}
            for x in jax.live_arrays():
                if id(x) not in self._before:
                    self._at(x)
                    kind = f"{x.dtype}{list(x.shape)}"
                    arrays[kind] = arrays.get(kind, 0) + x.nbytes * SCALE**2
            self.entries.append(Entry(name, arrays, self._own_bytes(name, function, args)))
            result = function(*args)
            self._note(jax.tree.leaves(result), jax.tree.leaves(args))
            return result

        return run

    def _note(self, outputs: list[Any], inputs: list[Any]) -> None:
        self._number += 1
        self._flying.append((self._number, [x for x in (*outputs, *inputs) if isinstance(x, jax.Array)]))
        self._made |= {id(x): (self._number, weakref.ref(x)) for x in outputs}

    def _own_bytes(self, name: str, function: Any, args: tuple[Any, ...]) -> int:
        """Temporaries and new results of a program at full size."""
        key = (
            name,
            *((leaf.shape, str(leaf.dtype)) if hasattr(leaf, "shape") else leaf for leaf in jax.tree.leaves(args)),
        )
        if key not in self._own:
            large = jax.tree.map(_enlarged, args, is_leaf=lambda leaf: isinstance(leaf, ModelConfig))
            with mock.patch.object(jax.nn, "dot_product_attention", _attention), use_device(KNOWN_DEVICES["h200"]):
                found = function.lower(*large).compile().memory_analysis()
            self._own[key] = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return self._own[key]


class _Numpy:
    """numpy, where reading an array of the device waits for it and copies."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def asarray(self, x: Any, dtype: Any = None) -> np.ndarray:
        self._ledger.done(x)
        return np.array(x, dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)


class _Waited(np.ndarray):
    """An array on the host that may still be on its way."""


def _enlarged(leaf: Any) -> Any:
    """An argument at full size. Chunks [B, S, D] have as many samples, of more tokens."""
    if isinstance(leaf, ModelConfig):
        return FULL
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    sizes = [size * SCALE for size in leaf.shape]
    if leaf.ndim == 3:
        sizes[0] = leaf.shape[0]
    return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype, sharding=h200_sharding())


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    return q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)
