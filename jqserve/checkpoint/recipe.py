"""From prepared parts to canonical Linears: decode, fuse along N, cast: pure array code, for numpy or jit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jqserve.checkpoint.finite import all_finite
from jqserve.checkpoint.fusing import fused_spec
from jqserve.checkpoint.scheme import Arrays, Prepared, Scheme, cast, namespace
from jqserve.quant import QuantizedTensor, QuantSpec

Linear = dict[str, Any]  # {"weight": Array | QuantizedTensor, "bias": Array (optional)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to build the Linears of one group. Hashable: equal recipes share one compilation.

    parts    (scheme, n, k) of each Linear
    fused    one Linear of all parts, concatenated along N, or one each
    dtype    of dense weights and biases
    """

    parts: tuple[tuple[Scheme, int, int], ...]
    fused: bool
    dtype: str

    def specs(self) -> tuple[QuantSpec | None, ...]:
        """The spec of each Linear that `build` gives; None for a dense one."""
        specs = [scheme.spec(n, k) for scheme, n, k in self.parts]
        if self.fused and len(specs) > 1:
            specs = [fused_spec(specs, sum(n for _, n, _ in self.parts))]
        return tuple(specs)

    def build(self, arrays: tuple[Arrays, ...]) -> tuple[tuple[Linear, ...], Any]:
        """arrays of each part (Scheme.decode's, and "perm", "input_scale", "bias" where there are) ->
        (the Linears, whether every float in them is finite)."""
        decoded = [scheme.decode(a, n, k) for (scheme, n, k), a in zip(self.parts, arrays)]
        groups = [list(range(len(decoded)))] if self.fused else [[i] for i in range(len(decoded))]
        linears, finite = [], True
        for indices, spec in zip(groups, self.specs()):
            values = [decoded[i] for i in indices]
            own = [scheme.spec(n, k) for scheme, n, k in (self.parts[i] for i in indices)]
            linear: Linear = {"weight": self._weight(spec, own, values, arrays[indices[0]])}
            if "bias" in arrays[indices[0]]:
                linear["bias"] = _joined([cast(arrays[i]["bias"], self.dtype) for i in indices])
                finite = finite & all_finite(linear["bias"])
            # What is quantized here is looked at before: integers have no NaN, and XLA's maximum may lose one.
            raw = [arrays[i]["weight"] for i in indices if spec is not None and "weight" in arrays[i]]
            for leaf in [*raw, *jax.tree.leaves(linear["weight"])]:
                finite = finite & all_finite(leaf)
            linears.append(linear)
        return tuple(linears), finite

    def _weight(self, spec: QuantSpec | None, own: list[QuantSpec | None], values: list[Any], first: Arrays) -> Any:
        if spec is None:
            return _joined([cast(v[0], self.dtype) for v in values])
        qvalue = _joined([v[0] for v in values])
        scales = [_spread(v[1], part, spec) for v, part in zip(values, own)]
        zeros = [v[2] for v in values]
        zero = None if zeros[0] is None else _joined(zeros)
        return QuantizedTensor(qvalue, _joined(scales), zero, first.get("perm"), first.get("input_scale"), spec)


def _spread(scale: Any, own: QuantSpec | None, fused: QuantSpec) -> Any:
    """A part's scales as the fused spec has them: per tensor becomes per channel."""
    if own is None or own.group_shape[0] == fused.group_shape[0]:
        return scale
    return namespace(scale).repeat(scale, own.shape[0], axis=0)


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else namespace(arrays[0]).concatenate(arrays, axis=0)


def why_apart(parts: tuple[tuple[Scheme, int, int], ...], prepared: list[Prepared], biases: list[bool]) -> str | None:
    """None where the parts may be fused, else the reason, for the plan."""
    if len(prepared) == 1:
        return None
    try:
        fused_spec([scheme.spec(n, k) for scheme, n, k in parts], sum(n for _, n, _ in parts))
    except ValueError as error:
        return str(error)
    if len(set(biases)) > 1:
        return "only some have a bias"
    for what in ("perm", "input_scale"):
        values = [getattr(p, what) for p in prepared]
        same = all((v is None) == (values[0] is None) for v in values)
        if not same or not (values[0] is None or all(np.array_equal(v, values[0]) for v in values)):
            return "act-order permutations differ" if what == "perm" else "input scales differ"
    dtypes = {p.arrays["scale" if "scale" in p.arrays else "scales"].dtype for p in prepared if _scale(p)}
    return "scale dtypes differ" if len(dtypes) > 1 else None


def _scale(prepared: Prepared) -> bool:
    return "scale" in prepared.arrays or "scales" in prepared.arrays
