"""Safetensors files of headers alone, the data a hole that takes no disk: what a plan needs of weights not here.

From a config.json, where the weights are to be random (`--load-format dummy`); or from the Hub, of which `hub.planned`
asks for the headers alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jqserve.checkpoint.hf import INDEX, SIDE_FILES, SINGLE, Checkpoint
from jqserve.checkpoint.names import Vector, modules
from jqserve.checkpoint.opening import read_plan
from jqserve.checkpoint.safetensors_file import DTYPES
from jqserve.errors import UnsupportedError

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape), in the order of the data


def described(directory: Path) -> Tensors:
    """What the readers of the directory's config.json ask for, in the order of the model; scales in the model's dtype
    where the format leaves them the choice. Raises as opening does."""
    with Checkpoint(directory, weights=False) as checkpoint:
        config, _, plan, _ = read_plan(checkpoint, None, "config", None)
    dense = {"float16": "F16", "float32": "F32"}.get(config.dtype, "BF16")
    found: Tensors = {}
    for module in modules(config):
        if isinstance(module, Vector):
            found[module.name] = (dense, module.shape)
            continue
        for _, slot in module.parts:
            scheme = plan.scheme(slot.name)
            scheme.check(slot.name, slot.n, slot.k)
            for suffix, need in scheme.needs(slot.n, slot.k).items():
                if need.required:
                    dtype = dense if dense in need.dtypes else need.dtypes[0]
                    found[f"{slot.name}.{suffix}"] = (dtype, need.shapes[0])
            if slot.bias:
                found[f"{slot.name}.bias"] = (dense, (slot.n,))
    return found


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of `tensors`, as long as a whole one. Raises UnsupportedError for a dtype that does not exist."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in DTYPES:
            raise UnsupportedError(f"{path.name}: tensor {name!r} is {dtype!r}; supported: {', '.join(DTYPES)}")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def link_side_files(directory: Path, into: Path) -> None:
    """config.json and its like, the shards' index among them, as links."""
    for pattern in SIDE_FILES:
        for file in directory.glob(pattern):
            (into / file.name).symlink_to(file.resolve())


def headers_of_config(directory: Path, into: Path) -> None:
    """Fills the empty folder `into`: the directory's configuration and one file of what it describes."""
    tensors = described(directory)
    link_side_files(directory, into)
    (into / INDEX).unlink(missing_ok=True)
    write_header(into / SINGLE, tensors)
