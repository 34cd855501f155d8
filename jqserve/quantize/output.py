"""Putting the finished pieces together: one file or a shard a piece, index, config.json, tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from jqserve.checkpoint.hf import INDEX, SINGLE
from jqserve.checkpoint.safetensors_file import SafetensorsFile
from jqserve.quantize.files import sync_directory, write_json, write_safetensors

#: Up to here all tensors go to one file, which every tool reads without an index.
SINGLE_BYTES = 2 << 30
#: What goes along unchanged: tokenizer, sampling defaults, templates, licence.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
)


def assemble(
    source: Path,
    pieces: list[Path],
    into: Path,
    config: dict[str, Any],
    files: dict[str, dict[str, Any]],
    single_bytes: int = SINGLE_BYTES,
) -> None:
    """Fills the empty directory `into`; config.json, without which nothing loads, comes last."""
    total = sum(piece.stat().st_size for piece in pieces)
    opened = [SafetensorsFile(piece) for piece in pieces]
    try:
        if total <= single_bytes:
            write_safetensors(into / SINGLE, {name: file.read(name) for file in opened for name in file.tensors})
        else:
            _shards(opened, into)
    finally:
        for file in opened:
            file.close()
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, into / path.name)
    for name, data in files.items():
        write_json(into / name, data)
    write_json(into / "config.json", config)
    for path in into.iterdir():
        with open(path, "rb") as written:
            os.fsync(written.fileno())
    sync_directory(into)


def _shards(opened: list[SafetensorsFile], into: Path) -> None:
    """A shard a piece, without copying where the file system can link."""
    weight_map: dict[str, str] = {}
    size = 0
    for i, file in enumerate(opened, 1):
        name = f"model-{i:05d}-of-{len(opened):05d}.safetensors"
        try:
            os.link(file.path, into / name)
        except OSError:
            shutil.copyfile(file.path, into / name)
        weight_map.update(dict.fromkeys(file.tensors, name))
        size += sum(entry.nbytes for entry in file.tensors.values())
    write_json(into / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def model_json(source: dict[str, Any], quantization: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The source's config.json with the quantization, readable by transformers 4 and 5 alike: a version 4 reader looks
    for torch_dtype, rope_theta and rope_scaling, and would take 10000 for a theta that it does not find."""
    config = {key: value for key, value in source.items() if key not in ("compression_config", "quantization_config")}
    config["dtype"] = config["torch_dtype"] = dtype
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    config["quantization_config"] = quantization
    return config
