"""What a run will write, known before any tensor is read: the writer, the grid, and config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from jqserve.quantize.formats.format import Facts, Format
from jqserve.quantize.grid import Grid
from jqserve.quantize.options import Options
from jqserve.quantize.output import model_json
from jqserve.quantize.source import Source


@dataclasses.dataclass(frozen=True)
class Target:
    """writer: of the format; grid: of every quantized Linear; facts: what the format's configuration states;
    config_json: the model's, with its quantization_config."""

    writer: Format
    grid: Grid
    facts: Facts
    config_json: dict[str, Any]

    def stored(self, dtype: str) -> str:
        """The dtype in which a dense tensor of `dtype` is written."""
        return self.writer.dtype or dtype


def target_of(source: Source, options: Options) -> Target:
    """Raises UnsupportedError, naming the Linear, for a shape that the grid or the format cannot hold."""
    writer, config = options.writer(), source.config
    grid = options.grid(writer.dtype or config.dtype)
    for slot in source.slots():
        if slot.name not in source.ignored:
            grid.check(slot.name, slot.n, slot.k)
            writer.check(grid, slot.name, slot.n, slot.k)
    facts = Facts(
        grid=grid,
        inputs=options.row.inputs,
        ignored=tuple(slot.name for slot in source.slots() if slot.name in source.ignored),
        layers=config.layers,
        head=not config.tied_embeddings,
        algorithm=options.algorithm,
        act_order=options.act_order,
        static_groups=options.static_groups,
        damp=options.damp,
        kv_cache=options.kv_cache != "none",
    )
    quantization = writer.config(facts)
    return Target(writer, grid, facts, model_json(source.checkpoint.config, quantization, writer.dtype or config.dtype))
