"""`--quantization awq` and `gptq`: an unquantized checkpoint that reads as what `jqserve quantize` would write.

Its headers are known at once. When the first tensor is read all layers are quantized, one after the other, and wait on
the host, packed. So calibrating has the device to itself, and loading, which comes after it, is the same loop with the
same readers as for a quantized checkpoint on disk: the memory that both need is the larger of the two, not the sum.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.names import LinearGroup, LinearSlot, Vector, modules
from jqserve.checkpoint.quant_config import QuantPlan, quant_plan
from jqserve.checkpoint.safetensors_file import DTYPES, TensorEntry
from jqserve.errors import CheckpointError
from jqserve.quantize.described import Described
from jqserve.quantize.grid import stored_as
from jqserve.quantize.memory import memory_bound
from jqserve.quantize.options import CHUNK_TOKENS, Options
from jqserve.quantize.source import Source
from jqserve.quantize.target import target_of

if TYPE_CHECKING:
    from jqserve.quantize.activations import Activations

log = logging.getLogger(__name__)
EMBEDDING = "model.embed_tokens.weight"


class Calibrated(Checkpoint):
    """The first read takes minutes.

    samples        int32 [rows, tokens]; None: headers alone (`jqserve plan`), nothing can be read
    tokens         of the samples, where they are not given yet
    note           for the plan: what it is calibrated on
    activations    dtype of the calibration's activations; None: the model's own, on a CPU float32
    progress       called with (layers done, layers in all, which one was quantized)

    Raises as `Source` and `target_of` do.
    """

    def __init__(
        self,
        path: Path | str,
        options: Options,
        samples: np.ndarray | None = None,
        *,
        note: str = "",
        tokens: int = 0,
        activations: str | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        super().__init__(path, weights=False)
        self.note = note
        self._source = Source(path)
        try:
            self._target = target_of(self._source, options)
            self.config = self._target.config_json
            self._tokens = tokens if samples is None else samples.size
            self._samples, self._dtype, self._chunk = samples, activations, chunk_tokens
            self._options, self._progress = options, progress
            self._entries: dict[str, TensorEntry] = {}
            self._describe(quant_plan(Described(self.config, self.path)))  # type: ignore[arg-type]
        except BaseException:
            self.close()
            raise
        self._made: dict[str, np.ndarray] | None = None

    def close(self) -> None:
        super().close()
        self._source.close()

    @property
    def working_bytes(self) -> tuple[int, int]:
        """Device: `memory_bound`. Host: the samples' residual stream with what is on its way to and from the device,
        and what waits to be loaded."""
        config, tokens = self._source.config, min(self._chunk, self._tokens)
        width = np.dtype(config.dtype).itemsize
        stream = self._tokens * config.hidden_size * width
        made = sum(entry.nbytes for name, entry in self._entries.items() if _in_layer(name))
        return memory_bound(config, tokens, width), 2 * stream + made

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> TensorEntry:
        return self._entries[name]

    def file_of(self, name: str) -> Path:
        """The source's shard, or its directory for a tensor that is made."""
        return self._source.checkpoint.file_of(name) if name in self._source.checkpoint else self.path

    @property
    def unread(self) -> list[str]:
        return self._source.checkpoint.unread

    def prefetch(self, names: list[str]) -> None:
        self._source.checkpoint.prefetch([name for name in names if not _in_layer(name)])

    def read(self, name: str) -> np.ndarray:
        if self._made is None:
            self._made = self._quantized()
        if _in_layer(name):
            array = self._made[name]
        else:
            raw = self._source.read(name)
            array = stored_as(raw, self._target.stored(raw.dtype.name), name)
        entry = self._entries[name]
        if array.shape != entry.shape or array.dtype != DTYPES[entry.dtype]:
            raise AssertionError(f"{name}: {array.dtype} {array.shape} was made, {entry.dtype} {entry.shape} promised")
        return array

    def _describe(self, plan: QuantPlan) -> None:
        for module in modules(self._source.config):
            if isinstance(module, Vector):
                self._dense(module.name)
                continue
            assert isinstance(module, LinearGroup)
            for _, slot in module.parts:
                self._linear(plan, slot)
                if slot.bias:
                    self._dense(f"{slot.name}.bias")

    def _linear(self, plan: QuantPlan, slot: LinearSlot) -> None:
        scheme = plan.scheme(slot.name)
        if scheme.spec(slot.n, slot.k) is None:
            self._dense(f"{slot.name}.weight")
            return
        for suffix, need in scheme.needs(slot.n, slot.k).items():
            dtype = "F16" if "F16" in need.dtypes else need.dtypes[0]  # both formats' scales are float16
            self._add(f"{slot.name}.{suffix}", dtype, need.shapes[0])

    def _dense(self, name: str) -> None:
        found = self._source.checkpoint.entry(name)
        stored = self._target.stored(DTYPES[found.dtype].name)
        word = next(word for word, dtype in DTYPES.items() if dtype.name == stored)
        self._add(name, word, found.shape)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        self._entries[name] = TensorEntry(name, dtype, shape, 0, nbytes)

    def _quantized(self) -> dict[str, np.ndarray]:
        """The tensors of all layers. jax is loaded here, where the work begins: headers need none."""
        from jqserve.quantize.layer import LayerQuantizer

        began, made = time.perf_counter(), dict[str, np.ndarray]()
        source, target, layers = self._source, self._target, self._source.config.layers
        stream = self._embedded()
        quantizer = LayerQuantizer(source.config, self._options, target.grid, target.writer.dtype)
        for index in range(layers):
            made |= quantizer.run(source.layer(index), source.window(index), stream).tensors
            done, seconds = index + 1, time.perf_counter() - began
            if done <= min(2, layers - 1):  # the first one compiles
                left = seconds / done * (layers - done)
                log.info("layer %d of %d quantized in %.1f s; at most %.0f s more", done, layers, seconds, left)
            if self._progress is not None:
                self._progress(done, layers, f"layer {index} quantized")
        log.info("calibrated %d layers in %.0f s", layers, time.perf_counter() - began)
        return made

    def _embedded(self) -> Activations:
        """The samples' embeddings."""
        import jax

        from jqserve.quantize.activations import Activations

        if self._samples is None:
            raise CheckpointError(f"{self.path}: {self.note}: opened for its headers alone")
        dtype = self._dtype or ("float32" if jax.default_backend() == "cpu" else self._source.config.dtype)
        raw = self._source.read(EMBEDDING)
        table = stored_as(raw, self._target.stored(raw.dtype.name), EMBEDDING).astype(np.float32)
        return Activations.embed(self._samples, table, dtype, self._chunk)


def _in_layer(name: str) -> bool:
    return name.startswith("model.layers.")
