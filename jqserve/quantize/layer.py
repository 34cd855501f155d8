"""One layer, quantized: its Linears in the order in which they compute, each seeing what the quantized ones before it
make of the calibration samples.

Device memory is at its peak in `Through.collect` for AWQ, while `down_input` computes: 4.82 GiB for a layer of the
Llama-3.1-8B shape, where quantize.memory allows 5.36 (an H200, by XLA's analysis of the programs;
tests/quantize/test_device_memory.py adds it up):

    the sums of all four inputs, with carries  1.91  0.77 for each of down's two, 0.06 for each of the others' six
    the layer, float32                         0.81
    temporaries and result of down_input       1.47  gate and up 0.88, down's input 0.44, the weight in bfloat16
    five chunks [B, S, D]                      0.63  two of the stream; one after attention and what it came from; the
                                                     input of gate and up, whose moments may still be in the making

The next stage is the scale search at the output of the MLP: 4.0 GiB.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.errors import CheckpointError, UnsupportedError
from jqserve.models.config import ModelConfig
from jqserve.quantize import awq, block, compensate, moments
from jqserve.quantize.activations import Activations
from jqserve.quantize.block import GROUPS, Layer
from jqserve.quantize.codes import Codes, round_to_nearest
from jqserve.quantize.fold import NORMS, fold
from jqserve.quantize.formats.format import Inputs, Tensors
from jqserve.quantize.grid import FP8_MAX, Grid, storage, stored_as
from jqserve.quantize.host import Kept, fetch, keep
from jqserve.quantize.moments import Moments
from jqserve.quantize.options import Options
from jqserve.quantize.pace import Pace, in_steps
from jqserve.quantize.report import LinearReport, linear_report
from jqserve.quantize.smooth import smooth_scale
from jqserve.quantize.source import HostLayer, Part


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a layer: its tensors under their full names, and a row for every Linear."""

    tensors: Tensors
    report: tuple[LinearReport, ...]


@dataclasses.dataclass(frozen=True)
class LayerQuantizer:
    """Quantizes the layers of one model. stored: dtype of dense tensors in the output."""

    config: ModelConfig
    options: Options
    grid: Grid
    stored: str

    def run(self, host: HostLayer, window: int | None, activations: Activations | None) -> Done:
        """activations: the residual stream before the layer; it is advanced past it (in place), through the quantized
        layer. Raises CheckpointError naming the layer when activations are not finite."""
        return _Run(self, host, window, activations).done()

    def advance(
        self, host: HostLayer, window: int | None, activations: Activations, weights: dict[str, np.ndarray]
    ) -> None:
        """Moves the activations past a layer that was finished before: weights float32 by tensor name, as read back."""
        layer = {name: jnp.asarray(weights[tensor], jnp.float32) for name, (tensor, _) in host.norms.items()}
        for group, parts in host.groups.items():
            layer[group] = jnp.concatenate([jnp.asarray(weights[p.slot.name], jnp.float32) for p in parts])
            if parts[0].bias is not None:
                biases = [jnp.asarray(weights[f"{p.slot.name}.bias"], jnp.float32) for p in parts]
                layer[f"{group}_bias"] = jnp.concatenate(biases)
        Through(self.config, window, layer, f"model.layers.{host.index}").advance(activations)


def device_layer(host: HostLayer, stored: str) -> Layer:
    """The layer in float32 on the device, Linears of one input joined. What stays dense has its values as `stored`."""

    def dense(array: np.ndarray, name: str) -> jax.Array:
        return jnp.asarray(stored_as(array, stored or array.dtype.name, name)).astype(jnp.float32)

    layer: Layer = {name: dense(array, tensor) for name, (tensor, array) in host.norms.items()}
    for group, parts in host.groups.items():
        layer[group] = jnp.concatenate(
            [
                dense(p.weight, f"{p.slot.name}.weight") if p.ignored else jnp.asarray(p.weight).astype(jnp.float32)
                for p in parts
            ]
        )
        biases = [dense(p.bias, f"{p.slot.name}.bias") for p in parts if p.bias is not None]
        if biases:
            layer[f"{group}_bias"] = jnp.concatenate(biases)
    return layer


@dataclasses.dataclass
class Through:
    """Passes over all chunks with one layer's weights. Each begins with the residual stream before the layer and makes
    on the device what it needs: attention again costs an 8B layer 0.2 s; its results to the host and back, 4."""

    config: ModelConfig
    window: int | None
    layer: Layer
    name: str

    def _of(self, function: Callable[..., Any], *arrays: Any) -> Any:
        return function(self.config, self.window, self.layer, *arrays)

    def inputs(self, groups: Sequence[str], h: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """The inputs of some groups for one chunk, in the order of GROUPS, each computed when it is asked for."""
        if "qkv" in groups:
            yield "qkv", self._of(block.attention_input, h)
        if not {"o", "gate_up", "down"} & set(groups):
            return
        mixed, _ = self._of(block.attention_output, h)
        if "o" in groups:
            yield "o", mixed
        if {"gate_up", "down"} & set(groups):
            h = self._of(block.after_attention, h, mixed)
        del mixed
        if "gate_up" in groups:
            yield "gate_up", self._of(block.mlp_input, h)
        if "down" in groups:
            yield "down", self._of(block.down_input, h)

    def collect(self, groups: Sequence[str], activations: Activations, *, hessian: bool) -> dict[str, Moments]:
        """The moments of the inputs of `groups`, in one pass. Raises CheckpointError where one is not finite."""
        sums = {group: moments.start(self.layer[group].shape[1], hessian=hessian) for group in groups}
        pace = Pace()
        for h in activations:
            for group, x in self.inputs(groups, h):
                sums[group] = moments.add(sums[group], x)
                del x
                pace.step(sums[group]["mean"] + 0.0)  # a copy: the next chunk donates the sums
        found = {}
        for group in groups:
            found[group] = moments.finish(sums.pop(group), float(activations.rows))
            if not bool(jnp.isfinite(found[group]["mean"]).all()):
                raise CheckpointError(
                    f"{self.name}: the input of {group} is not finite on the calibration data: the weights of this "
                    "layer or of one before it are damaged, or the model needs a wider dtype than its own"
                )
        return found

    def advance(self, activations: Activations) -> np.ndarray:
        """Moves the stream past the layer; absmax of keys and values, float32 [2]."""
        largest: list[jax.Array] = []

        def past(h: jax.Array) -> jax.Array:
            mixed, own = self._of(block.attention_output, h)
            largest.append(own)
            after: jax.Array = self._of(block.after_mlp, self._of(block.after_attention, h, mixed))
            return after

        activations.replace(past)
        return np.asarray(jnp.stack(largest)).max(axis=0)


class _Run:
    def __init__(
        self, owner: LayerQuantizer, host: HostLayer, window: int | None, activations: Activations | None
    ) -> None:
        self.owner, self.host, self.window, self.activations = owner, host, window, activations
        self.options, self.grid, self.config = owner.options, owner.grid, owner.config
        self.name = f"model.layers.{host.index}"
        self.layer = device_layer(host, owner.stored)
        self.folded = False
        self.hessians: dict[str, Kept] = {}  # of the inputs as the folded layer has them, where a scale was searched
        self.tensors: Tensors = {}
        self.rows: list[LinearReport] = []

    def done(self) -> Done:
        if self.activations is None:
            for group in GROUPS:
                self._group(group, None)
        else:
            if self.options.algorithm == "awq":
                self._scale_by_search()
            elif self.options.smoothquant is not None:
                self._smooth()
            self._in_order()
        for name, (tensor, array) in self.host.norms.items():
            self.tensors[tensor] = stored_as(
                np.asarray(self.layer[name]), self.owner.stored or array.dtype.name, tensor
            )
        return Done(self.tensors, tuple(self.rows))

    @property
    def through(self) -> Through:
        return Through(self.config, self.window, self.layer, self.name)

    def _in_order(self) -> None:
        assert self.activations is not None
        for group in GROUPS:
            found = None
            if self._needs_moments():
                hessian = self.options.algorithm == "gptq"
                found = self.through.collect((group,), self.activations, hessian=hessian)[group]
            self._group(group, found)
        kv = self.through.advance(self.activations)
        if self.options.kv_cache != "none":
            for word, largest in zip("kv", kv):
                scale = np.float32(largest) / np.float32(FP8_MAX) if largest > 0 else np.float32(1)
                self.tensors[f"{self.name}.self_attn.{word}_scale"] = self._small(scale)

    def _needs_moments(self) -> bool:
        return self.options.algorithm == "gptq" or self.options.row.inputs == "static"

    def _small(self, value: Any) -> np.ndarray:
        return np.asarray(value, np.float32).reshape(1).astype(storage(self.owner.stored or self.config.dtype))

    def _scale_by_search(self) -> None:
        assert self.activations is not None
        found = self.through.collect(GROUPS, self.activations, hessian=True)  # of the layer as it is
        self.hessians = {group: keep(found[group].pop("hessian")) for group in GROUPS}
        jax.block_until_ready(list(self.hessians.values()))
        sample = self.activations.sample(self.options.search_tokens)
        for group in GROUPS:
            if group == "gate_up":
                sample = in_steps(self._past_attention, sample)
            if not self._scalable(group):
                continue
            mean, hessian = found[group]["mean"], self.hessians[group]
            scale = awq.best_scale(self.config, self.window, self.grid, self.layer, group, mean, hessian, sample)
            self.layer, exact = fold(self.config, self.layer, group, scale, self._norm_dtype(group))
            self.hessians[group] = keep(moments.rescaled(fetch(hessian), exact))
        self.folded = True

    def _past_attention(self, h: jax.Array) -> jax.Array:
        mixed, _ = block.attention_output(self.config, self.window, self.layer, h)
        return block.after_attention(self.config, self.window, self.layer, h, mixed)

    def _smooth(self) -> None:
        assert self.options.smoothquant is not None and self.activations is not None
        found = self.through.collect(tuple(NORMS), self.activations, hessian=False)
        for group in NORMS:
            scale = smooth_scale(self.layer[group], found[group]["largest"], self.options.smoothquant)
            self.layer, _ = fold(self.config, self.layer, group, scale, self._norm_dtype(group))
        self.folded = True

    def _norm_dtype(self, group: str) -> str:
        return self.owner.stored or self.config.dtype

    def _scalable(self, group: str) -> bool:
        """Dense Linears take no part: one that stays dense would be stored scaled, in 16 bits. The Linear before, whose
        rows are divided, must be quantized too."""
        before = {"o": self.host.groups["qkv"][2:], "down": self.host.groups["gate_up"][1:]}.get(group, ())
        return not any(part.ignored for part in (*self.host.groups[group], *before))

    def _group(self, group: str, found: Moments | None) -> None:
        """Quantizes the Linears of one input and puts what is left of them into the layer."""
        parts = self.host.groups[group]
        weight = self.layer[group]
        bounds = np.cumsum([0, *(p.slot.n for p in parts)])
        rows = [(int(a), int(b)) for a, b in itertools.pairwise(bounds)]
        live = [i for i, part in enumerate(parts) if not part.ignored]
        inputs = self._inputs(found)
        hessian = self.hessians.pop(group, None)
        if found is not None and "hessian" in found:
            hessian = keep(found.pop("hessian"))
        for i in live:
            self.grid.check(parts[i].slot.name, parts[i].slot.n, parts[i].slot.k)
        coded, note = self._codes(group, parts, weight, rows, live, hessian)
        pieces = [weight[a:b] for a, b in rows]
        for i in live:
            self._held(parts[i].slot.name, coded[i])
            left = coded[i].on_device()
            self.rows.append(linear_report(parts[i].slot, pieces[i], left, hessian, self.grid.bits, note))
            for suffix, array in self.owner.options.writer().tensors(coded[i], inputs).items():
                self.tensors[f"{parts[i].slot.name}.{suffix}"] = array
            pieces[i] = left
        for i, part in enumerate(parts):
            if part.ignored:
                name = f"{part.slot.name}.weight"
                kept = stored_as(np.asarray(pieces[i]), self.owner.stored or part.weight.dtype.name, name)
                self.tensors[name], pieces[i] = kept, jnp.asarray(kept).astype(jnp.float32)
            if part.bias is not None:
                a, b = rows[i]
                name = f"{part.slot.name}.bias"
                bias = np.asarray(self.layer[f"{group}_bias"][a:b])
                self.tensors[name] = stored_as(bias, self.owner.stored or part.bias.dtype.name, name)
        self.layer = {**self.layer, group: jnp.concatenate(pieces)}

    def _codes(
        self,
        group: str,
        parts: tuple[Part, ...],
        weight: jax.Array,
        rows: list[tuple[int, int]],
        live: list[int],
        hessian: Kept | None,
    ) -> tuple[dict[int, Codes], str]:
        """Codes of each quantized part, and a note."""
        if self.options.algorithm == "gptq" and hessian is not None and live:
            chosen = weight if len(live) == len(parts) else jnp.concatenate([weight[slice(*rows[i])] for i in live])
            order = compensate.Order(self.options.act_order, self.options.static_groups)
            codes, note = compensate.quantize(chosen, hessian, self.grid, self.options.damp, order)
            coded, at = {}, 0
            for i in live:
                coded[i] = codes.rows(at, at + parts[i].slot.n)
                at += parts[i].slot.n
            return coded, note
        coded = {}
        for i in live:
            own = weight[slice(*rows[i])] if self.folded else jnp.asarray(parts[i].weight)
            # Queries and keys meet in a product that a Linear's own error says little about: not clipped, as in AutoAWQ
            clips = self.options.algorithm == "awq" and self.options.clip and (group != "qkv" or i == 2)
            if clips and hessian is not None:
                own = awq.clipped(self.grid, own.astype(jnp.float32), fetch(hessian))
            coded[i] = round_to_nearest(own, self.grid)
        return coded, ""

    def _held(self, name: str, codes: Codes) -> None:
        """Raises UnsupportedError where the format's dtype cannot hold a scale: no reader would take the file."""
        if not np.isfinite(codes.scale.astype(np.float32)).all():
            raise UnsupportedError(
                f"{name}: its weights are so large that a scale is beyond {self.grid.scale_dtype}, which --format "
                f"{self.options.written} stores scales in; use --format compressed-tensors where the scheme has it, or "
                f"--ignore {name}"
            )

    def _inputs(self, found: Moments | None) -> Inputs:
        kind = self.options.row.inputs
        if kind != "static":
            return Inputs(kind)
        assert found is not None
        largest = float(found["largest"].max())
        return Inputs(kind, self._small(np.float32(largest) / np.float32(FP8_MAX) if largest > 0 else 1.0))
