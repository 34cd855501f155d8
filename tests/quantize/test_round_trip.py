"""Every scheme in every format: written, then read by jqserve and by decoders written from the formats' description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jqserve
from jqserve.checkpoint.hf import Checkpoint
from jqserve.quantize.job import quantize
from jqserve.quantize.options import Options
from tests.checkpoint import decoders, tiny

SAMPLES = np.random.default_rng(0).integers(0, tiny.CONFIG["vocab_size"], (8, 32)).astype(np.int32)
O_PROJ = "re:.*o_proj"
CT = "compressed-tensors"
#: name -> (options, least signal to error in dB of any Linear: 6.02 a bit, less where groups are long)
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "w4a16 ct": ({"scheme": "w4a16"}, 18),
    "w4a16 ct asym g32": ({"scheme": "w4a16", "symmetric": False, "group_size": 32}, 20),
    "w4a16 gptq": ({"scheme": "w4a16", "format": "gptq", "ignore": ("model.layers.1.mlp.down_proj",)}, 18),
    "w8a16 ct channel": ({"scheme": "w8a16", "group_size": -1}, 38),
    "w8a16 gptq v2 asym": ({"scheme": "w8a16", "format": "gptq_v2", "symmetric": False}, 40),
    "fp8 dynamic, kv": ({"scheme": "fp8-dynamic", "kv_cache": "fp8", "ignore": (O_PROJ,)}, 28),
    "fp8 static": ({"scheme": "fp8-static"}, 28),
    "int8": ({"scheme": "w8a8-int8"}, 38),
    "int8 smoothquant gptq": ({"scheme": "w8a8-int8", "smoothquant": 0.5, "gptq": True}, 33),
    "gptq v1 asym": ({"scheme": "gptq", "format": "gptq", "symmetric": False, "group_size": 64}, 10),
    "gptq v2 act-order": ({"scheme": "gptq", "format": "gptq_v2", "act_order": True, "group_size": 64}, 10),
    "gptq ct act-order": ({"scheme": "gptq", "format": CT, "act_order": True, "static_groups": True}, 10),
    "gptq ct act-order channel": ({"scheme": "gptq", "format": CT, "act_order": True, "group_size": -1}, 10),
    # Rounding to the nearest of 8 bits in groups of 128 gives some 44 dB; GPTQ moves weights up to a step further away.
    "gptq 8 bit static": ({"scheme": "gptq", "bits": 8, "act_order": True, "static_groups": True}, 36),
    "awq": ({"scheme": "awq", "ignore": (O_PROJ,), "group_size": 64}, 14),
    "awq ct sym": ({"scheme": "awq", "format": "compressed-tensors", "symmetric": True}, 13),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """Queries have a bias, so that folding has one to move as well."""
    made = tiny.make(tmp_path_factory.mktemp("base"), architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    rng = np.random.default_rng(1)
    for name, weight in made.weights.items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            made.tensors[f"{name}.bias"] = rng.normal(0, 0.1, len(weight)).astype(made.tensors[f"{name}.weight"].dtype)
    return made.save()


@pytest.mark.parametrize(("flags", "least"), CASES.values(), ids=CASES.keys())
def test_what_is_written_is_what_is_read(base: tiny.Tiny, tmp_path: Path, flags: dict[str, Any], least: float) -> None:
    options = Options(**flags)
    rows = quantize(base.path, tmp_path / "out", options, SAMPLES if options.calibrated else None, chunk_tokens=64)
    with Checkpoint(tmp_path / "out") as written:
        tensors = {name: written.read(name) for name in written.names()}
        config = written.config
    _, params = jqserve.load(tmp_path / "out", dtype="float32", activations="none", layout="canonical")
    for index in range(tiny.CONFIG["num_hidden_layers"]):
        attn, mlp = params["layers"][str(index)]["attn"], params["layers"][str(index)]["mlp"]
        groups = [(attn, "qkv", ("q", "k", "v")), (attn, "o", ("o",)), (mlp, "gate_up", ("gate", "up"))]
        groups.append((mlp, "down", ("down",)))
        for parent, key, parts in groups:
            where = "self_attn" if parent is attn else "mlp"
            names = [f"model.layers.{index}.{where}.{part}_proj" for part in parts]
            expected = np.concatenate([decoders.decode(tensors, config, name) for name in names])
            assert key in parent, f"{names} were not fused"
            assert np.array_equal(np.asarray(jqserve.dequantize(parent[key]["weight"])), expected), names
    named = {row.name for row in rows}
    left = [n for n in base.weights if n.endswith("o_proj")] if O_PROJ in options.ignore else list(options.ignore)
    assert named == set(base.weights) - set(left)
    assert min(row.weight_db for row in rows) >= least, sorted((row.weight_db, row.name) for row in rows)[0]
    report = json.loads((tmp_path / "out" / "jqserve_quantize.json").read_text())
    assert [row["name"] for row in report["linears"]] == [row.name for row in rows]


def test_the_model_still_is_the_model(base: tiny.Tiny, tmp_path: Path) -> None:
    """Scales that AWQ and SmoothQuant fold must cancel: at 8 bits the logits are those of the base, nearly."""
    tokens = np.arange(24) % tiny.CONFIG["vocab_size"]
    model, params = jqserve.load(base.path, dtype="float32")
    expected = np.asarray(model(params, tokens))
    for name, options, bound in (
        ("int8", Options("w8a8-int8", smoothquant=0.5), 0.02),
        ("awq", Options("awq", group_size=32), 0.2),
    ):
        quantize(base.path, tmp_path / name, options, SAMPLES)
        other, weights = jqserve.load(tmp_path / name, dtype="float32", activations="none")
        difference = np.asarray(other(weights, tokens)) - expected
        assert np.linalg.norm(difference) < bound * np.linalg.norm(expected), name
    folded = Checkpoint(tmp_path / "awq").read("model.layers.0.input_layernorm.weight")
    original = base.tensors["model.layers.0.input_layernorm.weight"].astype(np.float32)
    assert np.abs(folded.astype(np.float32) / original - 1).max() > 0.1, "nothing was folded: the test shows nothing"


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Options("w4a16", group_size=48), "model.layers.0.self_attn.q_proj: 128 in features are not a multiple of the"),
        (Options("awq", ignore=("model.layers.0.self_attn.o_proj",)), "self_attn.o_proj is left out in 1 of 2 layers"),
        (
            Options("fp8-dynamic", ignore=("model.layers.0.self_attn.x_proj",)),
            "'model.layers.0.self_attn.x_proj' names",
        ),
        (Options("fp8-dynamic", ignore=("re:.*",)), "leaves nothing to quantize"),
        (Options("gptq"), "--scheme gptq needs calibration data"),
    ],
)
def test_what_cannot_be_is_said(base: tiny.Tiny, tmp_path: Path, scheme: Options, words: str) -> None:
    samples = None if scheme.scheme == "gptq" else SAMPLES
    with pytest.raises(jqserve.JqserveError, match=words.replace("(", "\\(")):
        quantize(base.path, tmp_path / "out", scheme, samples)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "features", "words"),
    [
        (
            {"scheme": "w4a16", "format": "gptq", "group_size": -1},
            252,
            r"gate_proj: \[252, 128\] are not multiples of 8",
        ),
        (
            {"scheme": "w8a16", "format": "gptq", "group_size": -1},
            250,
            r"gate_proj: \[250, 128\] are not multiples of 4",
        ),
        ({"scheme": "awq", "group_size": -1}, 252, "gate_proj: 252 out features are not a multiple of 8"),
        ({"scheme": "fp8-block"}, 160, r"gate_proj: \[160, 128\] does not divide into blocks of 128 x 128"),
        ({"scheme": "fp8-block", "format": "fp8"}, 64, r"down_proj: \[128, 64\] does not divide"),
    ],
)
def test_shapes_that_the_readers_of_a_format_do_not_take(
    tmp_path: Path, flags: dict[str, Any], features: int, words: str
) -> None:
    """They were written, and then nothing loaded them, or transformers did and was wrong."""
    base = tiny.make(tmp_path / "base", intermediate_size=features)
    with pytest.raises(jqserve.JqserveError, match=rf"^model\.layers\.0\.mlp\.{words}.*--ignore"):
        quantize(base.path, tmp_path / "out", Options(**flags), SAMPLES)
    ignored = Options(**flags, ignore=("re:.*(gate|up|down)_proj",))
    quantize(base.path, tmp_path / "out", ignored, SAMPLES)
    jqserve.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"scheme": "w3a16"}, "--scheme"),
        ({"scheme": "awq", "format": "gptq"}, "--format"),
        ({"scheme": "gptq", "bits": 3}, "--bits"),
        ({"scheme": "fp8-block", "group_size": 64}, "--group-size"),
        ({"scheme": "w4a16", "group_size": 12}, "--group-size"),
        ({"scheme": "gptq", "group_size": 24}, "--group-size"),
        ({"scheme": "w4a16", "group_size": 8, "format": "gptq_v2"}, "--group-size"),
        ({"scheme": "fp8-dynamic", "symmetric": False}, "--asym"),
        ({"scheme": "awq", "symmetric": True}, "--sym"),
        ({"scheme": "w4a16", "act_order": True}, "--act-order"),
        ({"scheme": "gptq", "static_groups": True}, "--static-groups"),
        ({"scheme": "gptq", "act_order": True, "format": CT}, "--act-order"),
        ({"scheme": "gptq", "damp": 0.0}, "--damp"),
        ({"scheme": "fp8-dynamic", "gptq": True}, "--gptq"),
        ({"scheme": "gptq", "smoothquant": 0.5}, "--smoothquant"),
        ({"scheme": "w8a8-int8", "smoothquant": 1.5}, "--smoothquant"),
        ({"scheme": "gptq", "kv_cache": "int8"}, "--kv-cache"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, Any], flag: str) -> None:
    with pytest.raises(jqserve.JqserveError, match=f"^{flag}: "):
        Options(**flags)
