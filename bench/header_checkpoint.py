"""Checkpoint directories whose safetensors files hold headers alone, and read as zeros: an 8B model's plan and load
without 16 GB on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.llama8b import make_checkpoint
from jqserve.checkpoint.header_file import described, write_header
from jqserve.checkpoint.hf import INDEX


def write_headers(folder: Path, scheme: str, shards: int = 4, **changes: Any) -> int:
    """Writes config.json for `scheme` (a key of bench.llama8b.SCHEMES) and `shards` files with its tensors, about
    equally many in each; returns how many tensors there are. `changes` override fields of config.json."""
    make_checkpoint(folder, scheme, **changes)
    tensors = described(folder)
    names = list(tensors)
    each = -(-len(names) // shards)
    where: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = names[i * each : (i + 1) * each]
        write_header(folder / file, {name: tensors[name] for name in own})
        where.update(dict.fromkeys(own, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return len(names)
