"""The bytes of what is rounded to nearest are LLM Compressor's and transformers' own, on the trained base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jqserve.checkpoint.hf import Checkpoint
from jqserve.quantize.codes import round_to_nearest
from jqserve.quantize.formats.format import Inputs
from jqserve.quantize.job import quantize
from jqserve.quantize.options import Options

CASES: list[tuple[str, dict[str, Any]]] = [
    ("ct-fp8-dynamic", {"scheme": "fp8-dynamic"}),
    ("ct-fp8-static", {"scheme": "fp8-static"}),
    ("ct-w8a8-int8", {"scheme": "w8a8-int8"}),
    ("ct-w4a16-g128", {"scheme": "w4a16"}),
    ("ct-w4a16-asym-g128", {"scheme": "w4a16", "symmetric": False}),
    ("fp8-block", {"scheme": "fp8-block", "format": "fp8"}),
]


@pytest.mark.parametrize(("folder", "flags"), CASES, ids=[name for name, _ in CASES])
def test_weights_are_the_peers_bit_for_bit(fixtures_dir: Path, folder: str, flags: dict[str, Any]) -> None:
    options = Options(**flags)
    grid, writer = options.grid("bfloat16"), options.writer()
    with Checkpoint(fixtures_dir / "base-bf16") as base, Checkpoint(fixtures_dir / folder) as peer:
        for name in base.names():
            module = name.removesuffix(".weight")
            if not module.endswith("_proj") or ".layers.5." in name:  # five of the six layers are enough
                continue
            inputs = Inputs(options.row.inputs)
            for suffix, array in writer.tensors(round_to_nearest(base.read(name), grid), inputs).items():
                theirs = peer.read(f"{module}.{suffix}")
                assert array.dtype == theirs.dtype and array.shape == theirs.shape, f"{module}.{suffix}"
                assert array.tobytes() == theirs.tobytes(), f"{module}.{suffix}"


def test_a_whole_checkpoint_is_the_peers(fixtures_dir: Path, tmp_path: Path) -> None:
    quantize(fixtures_dir / "base-bf16", tmp_path / "out", Options("fp8-dynamic"))
    with Checkpoint(tmp_path / "out") as ours, Checkpoint(fixtures_dir / "ct-fp8-dynamic") as theirs:
        assert set(ours.names()) == set(theirs.names())
        for name in theirs.names():
            assert ours.dtype(name) == theirs.dtype(name), name
            assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name
        mine, other = (c.config["quantization_config"] for c in (ours, theirs))
        assert set(mine) == set(other)
        assert mine["ignore"] == other["ignore"] and mine["format"] == other["format"]
        group, expected = mine["config_groups"]["group_0"], other["config_groups"]["group_0"]
        assert set(group) == set(expected)
        for part in ("weights", "input_activations"):
            observed = {key: value for key, value in expected[part].items() if key != "observer"}
            assert {key: group[part].get(key) for key in observed} == observed


def test_scales_found_on_float32_would_differ(fixtures_dir: Path) -> None:
    """The roundings of bfloat16 arithmetic are what makes the bytes equal: without them they are not."""
    grid = Options("w8a8-int8").grid("float32")
    with Checkpoint(fixtures_dir / "base-bf16") as base, Checkpoint(fixtures_dir / "ct-w8a8-int8") as peer:
        name = "model.layers.0.mlp.up_proj"
        ours = round_to_nearest(base.read(f"{name}.weight"), grid).values ^ np.uint8(128)
        assert (ours.view(np.int8) != peer.read(f"{name}.weight")).any()
