"""`--quantization awq` and `gptq`: an unquantized checkpoint that reads as what `jqserve quantize` would write.

Its headers are known at once. The tensors of a layer are made when the first of them is read, and forgotten when the
next layer's are: loading is the same loop, with the same readers, as for a quantized checkpoint on disk.
"""

from __future__ import annotations

import logging
import math
import time
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
from jqserve.quantize.options import CHUNK_TOKENS, Options
from jqserve.quantize.source import Source
from jqserve.quantize.target import target_of

if TYPE_CHECKING:
    from jqserve.quantize.activations import Activations
    from jqserve.quantize.layer import LayerQuantizer

log = logging.getLogger(__name__)
EMBEDDING = "model.embed_tokens.weight"


class Calibrated(Checkpoint):
    """Layers must be read in order, as loading does; each only once the one before has been.

    samples        int32 [rows, tokens]; None: headers alone (`jqserve plan`), nothing can be read
    tokens         of the samples, where they are not given yet
    note           for the plan: what it is calibrated on
    activations    dtype of the calibration's activations; None: the model's own, on a CPU float32

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
    ) -> None:
        super().__init__(path, weights=False)
        self.note = note
        self._source = Source(path)
        try:
            self._target = target_of(self._source, options)
            self.config = self._target.config_json
            self._tokens = tokens if samples is None else samples.size
            self._samples, self._dtype, self._chunk = samples, activations, chunk_tokens
            self._options = options
            self._entries: dict[str, TensorEntry] = {}
            self._layer_of: dict[str, int] = {}
            self._describe(quant_plan(Described(self.config, self.path)))  # type: ignore[arg-type]
        except BaseException:
            self.close()
            raise
        self._at, self._made = -1, dict[str, np.ndarray]()
        self._quantizer: LayerQuantizer | None = None
        self._stream: Activations | None = None
        self._seconds = 0.0

    def close(self) -> None:
        super().close()
        self._source.close()

    @property
    def working_bytes(self) -> tuple[int, int]:
        """(device, host), roughly, beside what is loaded. Device: a layer in float32 twice (before and after), its
        largest Hessian with factor and workspace, and what one chunk makes in the MLP; host: the residual stream."""
        config = self._source.config
        layer = sum(slot.n * slot.k for slot in self._source.slots()) // config.layers
        widest = max(slot.k for slot in self._source.slots())
        chunk = min(self._chunk, self._tokens) * (3 * widest + 4 * config.hidden_size) * 4
        return 8 * layer + 12 * widest * widest + chunk, 2 * self._tokens * config.hidden_size * np.dtype(
            np.float32
        ).itemsize

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
        self._source.checkpoint.prefetch([name for name in names if name not in self._layer_of])

    def read(self, name: str) -> np.ndarray:
        if name in self._layer_of:
            self._make(self._layer_of[name])
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
        if name.startswith("model.layers."):
            self._layer_of[name] = int(name.split(".")[2])

    def _make(self, index: int) -> None:
        """Quantizes the layers up to `index`."""
        if index < self._at:
            raise AssertionError(f"layer {index} is asked for after layer {self._at}")
        while self._at < index:
            began = time.perf_counter()
            if self._quantizer is None or self._stream is None:
                self._quantizer, self._stream = self._start()
            self._at += 1
            self._made = {}
            host, window = self._source.layer(self._at), self._source.window(self._at)
            self._made = self._quantizer.run(host, window, self._stream).tensors
            self._seconds += time.perf_counter() - began
            self._tell()

    def _start(self) -> tuple[LayerQuantizer, Activations]:
        """The quantizer, and the samples' embeddings. jax is loaded here, where the work begins: headers need none."""
        import jax

        from jqserve.quantize.activations import Activations
        from jqserve.quantize.layer import LayerQuantizer

        if self._samples is None:
            raise CheckpointError(f"{self.path}: {self.note}: opened for its headers alone")
        config, target = self._source.config, self._target
        dtype = self._dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
        raw = self._source.read(EMBEDDING)
        table = stored_as(raw, target.stored(raw.dtype.name), EMBEDDING).astype(np.float32)
        stream = Activations.embed(self._samples, table, dtype, self._chunk)
        return LayerQuantizer(config, self._options, target.grid, target.writer.dtype), stream

    def _tell(self) -> None:
        done, layers = self._at + 1, self._source.config.layers
        if done == layers:
            self._stream = None  # the calibration is over
            log.info("calibrated %d layers in %.0f s", layers, self._seconds)
        elif done <= 2:  # the first one compiles
            left = self._seconds / done * (layers - done)
            log.info("layer %d of %d quantized in %.1f s; at most %.0f s more", done, layers, self._seconds, left)
