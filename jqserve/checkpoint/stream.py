"""The loading loop: read ahead, prepare, build (numpy, or jitted on the device), place, and check what arrived."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from jqserve.checkpoint.audit import Audit, GroupSource, Part, tensor_names
from jqserve.checkpoint.extras import verify
from jqserve.checkpoint.finite import all_finite
from jqserve.checkpoint.kv_scales import read as read_kv_scales
from jqserve.checkpoint.loaded import Place, Weight, keep_on_host
from jqserve.checkpoint.matrix_row import matrix_row
from jqserve.checkpoint.names import Vector
from jqserve.checkpoint.online import Online
from jqserve.checkpoint.open import AnyCheckpoint
from jqserve.checkpoint.opening import OpenModel
from jqserve.checkpoint.plan import PlanRow, joined_notes, source_text
from jqserve.checkpoint.recipe import Linear, Recipe, why_apart
from jqserve.checkpoint.scheme import Arrays, Prepared, cast
from jqserve.errors import CheckpointError

Decode = Literal["auto", "host", "device"]
#: Modules whose transfer and decoding may be under way on the device while the next one is sent. Unquantized ones are
#: large beside what becomes of them: with one under way, never more than two are there.
IN_FLIGHT, IN_FLIGHT_ONLINE = 2, 1


@dataclasses.dataclass(frozen=True)
class Built:
    """What became of one module: leaves under their dotted canonical paths, and their rows of the plan."""

    path: str
    leaves: tuple[tuple[str, Weight], ...]
    rows: tuple[PlanRow, ...]


@functools.partial(jax.jit, static_argnums=0)
def _build_on_device(recipe: Recipe, arrays: tuple[Arrays, ...]) -> tuple[tuple[Linear, ...], Any]:
    return recipe.build(arrays)


class Stream:
    """Iterates over the modules of an audited checkpoint, each built from its tensors and placed.

    on_device: raw tensors are sent as they are and repacked there. The values of a module are checked (no NaN, no
    infinity) when the next ones are under way, the last ones' at the end: CheckpointError.
    """

    def __init__(
        self,
        checkpoint: AnyCheckpoint,
        audited: Audit,
        *,
        dtype: str,
        place: Place,
        on_device: bool,
    ) -> None:
        self._checkpoint, self._modules, self._kv = checkpoint, audited.modules, audited.kv
        self._dtype, self._place, self._on_device = dtype, place, on_device
        groups = (module for module in audited.modules if isinstance(module, GroupSource))
        online = any(isinstance(part.scheme, Online) for group in groups for part in group.parts)
        self._in_flight = IN_FLIGHT_ONLINE if online else IN_FLIGHT
        self._flying: deque[tuple[str, Any]] = deque()  # path, whether it is finite (perhaps not computed yet)

    @staticmethod
    def of(opened: OpenModel, device_put: Place | None, decode: Decode) -> Stream:
        """The modules of an opened model. Reads the extras whose values must be looked at first."""
        verify(opened.checkpoint, opened.audited.extras)
        if decode == "auto":
            decode = "host" if device_put is keep_on_host or jax.default_backend() == "cpu" else "device"
        return Stream(
            opened.checkpoint,
            opened.audited,
            dtype=opened.config.dtype,
            place=device_put or jax.device_put,
            on_device=decode == "device",
        )

    def __len__(self) -> int:
        return len(self._modules) + (self._kv is not None)

    def __iter__(self) -> Iterator[Built]:
        names = [tensor_names(module) for module in self._modules]
        for module, own, ahead in zip(self._modules, names, [*names[1:], []]):
            self._checkpoint.prefetch(own + ahead)
            built = self._vector(module) if isinstance(module, Vector) else self._group(module)
            self._settle(self._in_flight if self._on_device else 0)
            yield built
            del built  # or the host would hold it while the next one is made
        if self._kv is not None:
            leaves = read_kv_scales(self._checkpoint, self._kv)
            yield Built("kv_scales", tuple((path, self._place(scale)) for path, scale in leaves), ())
        self._settle(0)

    def _vector(self, vector: Vector) -> Built:
        raw: Any = self._checkpoint.read(vector.name)
        value = cast(jax.device_put(raw) if self._on_device else raw, self._dtype)
        del raw
        self._flying.append((vector.name, all_finite(value)))
        rows: tuple[PlanRow, ...] = ()
        if len(vector.shape) == 2:
            path, source = vector.path.removesuffix(".weight"), vector.name.removesuffix(".weight")
            rows = (matrix_row(path, source, "dense", value),)
        return Built(vector.path, ((vector.path, self._place(value)),), rows)

    def _group(self, source: GroupSource) -> Built:
        group, shapes = source.group, tuple((p.scheme, p.slot.n, p.slot.k) for p in source.parts)
        prepared = [self._prepare(part) for part in source.parts]
        biases = [self._checkpoint.read(p.bias) if p.bias else None for p in source.parts]
        apart = why_apart(shapes, prepared, [b is not None for b in biases])
        recipe = Recipe(shapes, apart is None, self._dtype)
        arrays = tuple(_with_options(p, bias) for p, bias in zip(prepared, biases))
        del prepared, biases
        linears, finite = (_build_on_device if self._on_device else Recipe.build)(recipe, arrays)
        del arrays
        self._flying.append((group.path, finite))
        leaves: list[tuple[str, Weight]] = []
        rows = []
        for i, linear in enumerate(linears):
            parts = source.parts if apart is None else (source.parts[i],)
            path = group.path if apart is None else f"{group.parent}.{parts[0].key}"
            note = "" if apart is None else f"kept apart: {apart}"
            note = joined_notes(note, parts[0].scheme.misfit(parts[0].slot.n, parts[0].slot.k))
            origin = source_text([p.slot.name for p in parts])
            rows.append(matrix_row(path, origin, parts[0].scheme.method, linear["weight"], note))
            leaves += [(f"{path}.{name}", self._place(leaf)) for name, leaf in linear.items()]
        return Built(group.path, tuple(leaves), tuple(rows))

    def _prepare(self, part: Part) -> Prepared:
        raw = {suffix: self._checkpoint.read(name) for suffix, name in part.tensors.items()}
        return part.scheme.prepare(part.slot.name, raw, part.slot.n, part.slot.k)

    def _settle(self, at_most: int) -> None:
        """Waits until `at_most` modules are under way, and checks the values of those that arrived."""
        while len(self._flying) > at_most:
            path, finite = self._flying.popleft()
            if not bool(finite):
                wider = "bfloat16" if self._dtype == "float16" else "float32"
                narrow = (
                    "" if self._dtype == wider else f", or the dtype is too narrow for it (then try --dtype {wider})"
                )
                raise CheckpointError(
                    f"{self._checkpoint.path}: {path}: has values that are not finite in {self._dtype}: the file is "
                    f"damaged{narrow}"
                )


def _with_options(prepared: Prepared, bias: np.ndarray | None) -> Arrays:
    optional = {"perm": prepared.perm, "input_scale": prepared.input_scale, "bias": bias}
    return {**prepared.arrays, **{k: v for k, v in optional.items() if v is not None}}
