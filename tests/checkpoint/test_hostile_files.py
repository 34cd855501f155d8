"""What somebody who wants to hang, crash or fool the server could put into a checkpoint directory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint.convert import LoadedCheckpoint, keep_on_host, load
from jqserve.errors import CheckpointError
from tests.checkpoint import configs as c
from tests.checkpoint import files, tiny

#: Backtracks 2^n times over n characters, in `re` and in `regex`.
ENDLESS = r"((?:.|..)+)+[A-Z]"


def on_host(path: Path) -> LoadedCheckpoint:
    return load(str(path), device_put=keep_on_host)


def refused(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        on_host(path)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return str(caught.value)


ENDLESS_IN = {
    "gptq dynamic": (tiny.gptq(4, 32), c.gptq(4, 32, dynamic={f"-:{ENDLESS}": {}})),
    "fp8": (tiny.eight(shape="scalar"), c.fp8(modules_to_not_convert=[ENDLESS])),
    "ct ignore": (
        tiny.packed(4, 32),
        c.compressed("pack-quantized", c.weights(4, "int", "group", 32), ignore=[f"re:{ENDLESS}"]),
    ),
}


@pytest.mark.parametrize("case", ENDLESS_IN)
def test_a_pattern_without_end_is_given_up(case: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path, *ENDLESS_IN[case])
    began = time.monotonic()
    refused(made.path, "takes more than", "config.json", "model.layers.0.self_attn.q_proj")
    assert time.monotonic() - began < 60  # it would take years


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    (made.path / name).unlink(missing_ok=True)
    os.mkfifo(made.path / name)
    refused(made.path, name, "not a regular file")


def index(path: Path, shard: str, names: list[str]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


@pytest.mark.parametrize("shard", ["x" * 5000, "a/b.safetensors", "..", ""])
def test_an_index_names_files_of_the_directory(shard: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    index(made.path, shard, ["a"])
    refused(made.path, "index.json", "not a file name")


def test_two_models_in_one_directory(tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    files.write(made.path / "a.safetensors", made.tensors)
    index(made.path, "a.safetensors", list(made.tensors))
    refused(made.path, "model.safetensors stands beside", "Remove")
    (made.path / "model.safetensors").unlink()
    assert on_host(made.path).plan.notes == ()


def test_a_file_that_is_not_read_is_noted(tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    files.write(made.path / "adapter_model.safetensors", {"lora_A": np.zeros((2, 2), np.float32)})
    assert any("adapter_model.safetensors" in note for note in on_host(made.path).plan.notes)


NAMES: dict[str, tuple[str, str]] = {
    "terminal commands": ("model.\x1b[2Jx\n\ry", r"model.\x1b[2Jx"),
    "half a surrogate pair": ("model.\ud800", r"model.\ud800"),
    "a layer far away": ("model.layers.99999999999999999999.mlp.up_proj.bias", "99999999999999999999"),
    "a layer by a long number": (f"model.layers.{'9' * 5000}.mlp.up_proj.bias", "belong to no module"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_shown_so_that_they_can_be_printed(case: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    name, shown = NAMES[case]
    made.tensors[name] = np.zeros(4, ml_dtypes.bfloat16)
    message = refused(made.save().path, shown)
    assert message.encode("utf-8") and all(ch.isprintable() or ch == "\n" for ch in message)


def test_message_of_plain_text_stays_as_it_is() -> None:
    make: Callable[[str], Exception] = CheckpointError
    assert str(make("Größe 模型\nzweite Zeile")) == "Größe 模型\nzweite Zeile"
