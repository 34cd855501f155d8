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


def calibration(fixtures_dir: Path) -> np.ndarray:
    """What the peers calibrated on: 64 evenly spaced rows of 256 ids out of the first nine tenths."""
    rows = np.load(fixtures_dir / "calib.npy").reshape(-1, 256)
    rows = rows[: len(rows) * 9 // 10]
    return rows[np.linspace(0, len(rows) - 1, 64).round().astype(int)].astype(np.int32)


@pytest.mark.parametrize(
    ("folder", "options", "suffixes"),
    [
        ("ct-fp8-static", Options("fp8-static"), (".input_scale",)),
        ("ct-fp8-kv", Options("fp8-dynamic", kv_cache="fp8"), (".k_scale", ".v_scale")),
    ],
)
def test_calibrated_scales_are_near_the_peers(
    fixtures_dir: Path, tmp_path: Path, folder: str, options: Options, suffixes: tuple[str, ...]
) -> None:
    """Ours are absmax / 448 over every token of the quantized weights' own activations. Theirs come from a bfloat16 run
    and from observers of their own: single ones differ by up to a fifth (keys of layer 0: 0.0228, theirs 0.0189), in
    both directions. What is tested is that they are the same quantity, and as large on the whole."""
    quantize(fixtures_dir / "base-bf16", tmp_path / "out", options, calibration(fixtures_dir))
    with Checkpoint(tmp_path / "out") as ours, Checkpoint(fixtures_dir / folder) as peer:
        names = [name for name in peer.names() if name.endswith(suffixes)]
        assert names and set(names) <= set(ours.names())
        pairs = {n: (float(ours.read(n)[0]), float(peer.read(n)[0])) for n in names}
        assert not {n: pair for n, pair in pairs.items() if not 0.75 < pair[0] / pair[1] < 1.33}
        assert 0.9 < np.exp(np.mean([np.log(a / b) for a, b in pairs.values()])) < 1.15
        assert all(ours.dtype(n) == peer.dtype(n) and ours.shape(n) == peer.shape(n) for n in names)
