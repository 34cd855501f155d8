"""Ten small models against the logits that transformers computes for them: rope scalings, windows, biases, q/k norm,
tied and untied heads, head_dim != D / H. The checkpoints are written here from seeds; see tests/data/architectures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import jqserve

DATA = Path(__file__).resolve().parent.parent / "data" / "architectures"
CASES = runpy.run_path(str(DATA / "cases.py"))
WRITTEN: dict[str, Any] = json.loads((DATA / "configs.json").read_text())
# float32 sums in another order; measured: 1e-6 to 3e-6 of the largest logit.
TOLERANCE = 1e-5


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The same facts as version 4 wrote them: top-level rope_theta and rope_scaling, torch_dtype, no layer_types."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    return config


def logits(name: str, config: dict[str, Any], directory: Path) -> np.ndarray:
    tensors = {key: CASES["weight"](key, tuple(shape)) for key, shape in WRITTEN[name]["shapes"].items()}
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    model, params = jqserve.load(directory, dtype="float32")
    return np.asarray(model(params, CASES["tokens"](name)))


@pytest.mark.parametrize("dialect", [4, 5])
@pytest.mark.parametrize("name", WRITTEN)
def test_logits_of_transformers(name: str, dialect: int, tmp_path: Path) -> None:
    config = WRITTEN[name]["config"]
    if dialect == 4:
        config = as_transformers_4(config)
    with np.load(DATA / "logits.npz") as archive:
        expected = archive[name]
    got = logits(name, config, tmp_path)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-llama3-rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("mistral-window", {"sliding_window": None}),
        ("qwen2-window-of-some-layers", {"max_window_layers": 0, "layer_types": None}),
        ("llama-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)
def test_leaving_the_feature_out_shows(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    """The cases are sharp: without the scaling or the window the logits move by far more than the tolerance."""
    with np.load(DATA / "logits.npz") as archive:
        expected = archive[name]
    got = logits(name, WRITTEN[name]["config"] | change, tmp_path)
    assert np.abs(got - expected).max() > 1e-2 * np.abs(expected).max()
