"""Checkpoint directories whose safetensors files hold headers alone: the data is a hole, which takes no disk.

`jqserve plan` reads no more than that, so an 8B model's plan is timed and tested without 16 GB.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench.llama8b import make_checkpoint
from jqserve.checkpoint.hf import INDEX, Checkpoint
from jqserve.checkpoint.names import Vector, modules
from jqserve.checkpoint.opening import read_plan
from jqserve.checkpoint.safetensors_file import DTYPES

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)


def write_headers(folder: Path, scheme: str, shards: int = 4, **changes: Any) -> int:
    """Writes config.json for `scheme` (a key of bench.llama8b.SCHEMES) and `shards` files with its tensors, about
    equally many in each; returns how many tensors there are. `changes` override fields of config.json."""
    make_checkpoint(folder, scheme, **changes)
    tensors = _tensors(folder)
    names = list(tensors)
    each = -(-len(names) // shards)
    where: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = names[i * each : (i + 1) * each]
        _write(folder / file, {name: tensors[name] for name in own})
        where.update(dict.fromkeys(own, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return len(names)


def _tensors(folder: Path) -> Tensors:
    """What the readers of the folder's config.json ask for, in the order of the model."""
    with Checkpoint(folder, weights=False) as checkpoint:
        config, _, plan, _ = read_plan(checkpoint, None, "config", None)
    dense = {"float16": "F16", "float32": "F32"}.get(config.dtype, "BF16")
    found: Tensors = {}
    for module in modules(config):
        if isinstance(module, Vector):
            found[module.name] = (dense, module.shape)
            continue
        for _, slot in module.parts:
            for suffix, need in plan.scheme(slot.name).needs(slot.n, slot.k).items():
                if need.required:
                    dtype = dense if dense in need.dtypes else need.dtypes[0]
                    found[f"{slot.name}.{suffix}"] = (dtype, need.shapes[0])
            if slot.bias:
                found[f"{slot.name}.bias"] = (dense, (slot.n,))
    return found


def _write(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
