"""`quantize`: the whole run, piece by piece: embedding, layers, head. Memory holds one layer, and on the host the
residual stream of the calibration samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jqserve
from jqserve.errors import CheckpointError, RequestError
from jqserve.quantize.activations import Activations
from jqserve.quantize.formats.format import Tensors
from jqserve.quantize.grid import stored_as
from jqserve.quantize.layer import LayerQuantizer
from jqserve.quantize.options import CHUNK_TOKENS, Options
from jqserve.quantize.output import assemble
from jqserve.quantize.readback import read_piece
from jqserve.quantize.report import LinearReport
from jqserve.quantize.source import Source
from jqserve.quantize.target import target_of
from jqserve.quantize.workplace import Workplace

REPORT = "jqserve_quantize.json"
#: (layers done, layers in all, the rows of the layer just done, whether an earlier run had done it)
Progress = Callable[[int, int, tuple[LinearReport, ...], bool], None]


def quantize(
    model_path: str | Path,
    out: str | Path,
    options: Options,
    samples: np.ndarray | None = None,
    *,
    dtype: str | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    restart: bool = False,
    progress: Progress | None = None,
) -> list[LinearReport]:
    """Writes the quantized checkpoint to `out`, which appears whole or not at all.

    samples   int32 [rows, tokens], for schemes that calibrate
    dtype     of the calibration's activations; None: the model's own, on a CPU float32
    progress  called after each layer

    A run that was stopped goes on where it was when it is repeated: finished layers are kept beside `out`, each with a
    checksum. Raises JqserveError naming the layer or the flag at fault; OSError never leaves a part of the output.
    """
    if options.calibrated and samples is None:
        raise RequestError("--calibration", f"--scheme {options.scheme} needs calibration data, as asked for here")
    source = Source(model_path, options.ignore)
    try:
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else source.config.dtype
        run = _Job(source, Path(out).resolve(), options, samples if options.calibrated else None, dtype, chunk_tokens)
        return run.run(restart, progress)
    finally:
        source.close()


class _Job:
    def __init__(
        self, source: Source, out: Path, options: Options, samples: np.ndarray | None, dtype: str, chunk_tokens: int
    ) -> None:
        self.source, self.out, self.options, self.samples = source, out, options, samples
        self.dtype, self.chunk_tokens = dtype, chunk_tokens
        target = target_of(source, options)
        self.writer, self.grid, self.facts = target.writer, target.grid, target.facts
        self.config_json = target.config_json

    def run(self, restart: bool, progress: Progress | None) -> list[LinearReport]:
        place = Workplace(self.out, self._identity(), restart=restart)
        try:
            rows = self._pieces(place, progress)
            pieces = [place.piece(i) for i in range(self.source.config.layers + 2)]
            files = {**self.writer.files(self.facts), REPORT: self._report(rows)}
            with _naming(place, "the output"):
                assemble(self.source.path, pieces, place.new_output(), self.config_json, files)
                place.publish()
            return rows
        finally:
            place.close()

    def _pieces(self, place: Workplace, progress: Progress | None) -> list[LinearReport]:
        layers = self.source.config.layers
        before, after = self.source.outside()
        for index, names in ((0, before), (layers + 1, after)):
            if place.finished(index) is None:
                with _naming(place, names[0]):
                    place.keep(index, self._dense(names), [])
        found = {i: place.finished(i + 1) for i in range(layers)}
        missing = [i for i, done in found.items() if done is None]
        activations = None
        if self.samples is not None and missing:
            table = self._dense(before)[before[0]].astype(np.float32)
            activations = Activations.embed(self.samples, table, self.dtype, self.chunk_tokens)
        quantizer = LayerQuantizer(self.source.config, self.options, self.grid, self.writer.dtype)
        rows: list[LinearReport] = []
        for index in range(layers):
            done = found[index]
            if done is not None:
                own = tuple(LinearReport.from_json(row) for row in done["report"])
                if activations is not None and index < max(missing):
                    self._advance(quantizer, place, index, activations)
            else:
                result = quantizer.run(self.source.layer(index), self.source.window(index), activations)
                own = result.report
                with _naming(place, f"model.layers.{index}"):
                    place.keep(index + 1, result.tensors, [row.to_json() for row in own])
            rows += own
            if progress:
                progress(index + 1, layers, own, done is not None)
        return rows

    def _advance(self, quantizer: LayerQuantizer, place: Workplace, index: int, activations: Activations) -> None:
        host = self.source.layer(index)
        slots = [part.slot for parts in host.groups.values() for part in parts]
        weights = read_piece(place.piece(index + 1), self.config_json, slots)
        quantizer.advance(host, self.source.window(index), activations, weights)

    def _dense(self, names: list[str]) -> Tensors:
        found = {name: self.source.read(name) for name in names}
        return {name: stored_as(a, self.writer.dtype or a.dtype.name, name) for name, a in found.items()}

    def _identity(self) -> dict[str, Any]:
        """What makes two runs give the same bytes."""
        shards = {}
        for path in sorted({self.source.checkpoint.file_of(name) for name in self.source.checkpoint.names()}):
            stat = path.stat()
            shards[path.name] = [stat.st_size, stat.st_mtime_ns]
        data = None if self.samples is None else hashlib.sha256(np.ascontiguousarray(self.samples)).hexdigest()
        return {
            "jqserve": jqserve.__version__,
            "options": _plain(self.options.to_json()),
            "model": str(self.source.path.resolve()),
            "shards": shards,
            "config": self.source.checkpoint.config,
            "calibration": data,
            "rows": None if self.samples is None else list(self.samples.shape),
            "activations": self.dtype,
            "chunk_tokens": self.chunk_tokens,
            "device": jax.devices()[0].device_kind,
        }

    def _report(self, rows: list[LinearReport]) -> dict[str, Any]:
        identity = self._identity()
        kept = {key: identity[key] for key in ("jqserve", "options", "calibration", "rows", "activations", "device")}
        return {**kept, "linears": [row.to_json() for row in rows]}


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


@dataclasses.dataclass
class _naming:
    """An OSError in here is told with what was being written, and that nothing is lost."""

    place: Workplace
    what: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{self.place.path}: {self.what} could not be written: {error.strerror or error}. Finished layers are "
                "kept: make room and repeat the command"
            ) from error
