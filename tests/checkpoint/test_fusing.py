"""What is fused, what is kept apart and why, what the flags change, and what the plan says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jqserve.checkpoint.convert import LoadedCheckpoint, keep_on_host, load
from jqserve.checkpoint.plan import LoadPlan
from jqserve.quant import QuantizedTensor
from tests.checkpoint import configs as c
from tests.checkpoint import tiny

STATIC = c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float", static=True))
ATTN = "model.layers.0.self_attn"


def on_host(path: Path, **options: str) -> LoadedCheckpoint:
    return load(str(path), device_put=keep_on_host, **options)  # type: ignore[arg-type]


def notes(loaded: LoadedCheckpoint) -> dict[str, str]:
    return {row.path: row.note for row in loaded.plan.rows if row.note}


def test_per_tensor_scales_are_expanded_and_the_input_scale_kept(tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tiny.eight(shape="tensor", static=True), STATIC)
    qkv = on_host(tmp_path).params["layers"]["0"]["attn"]["qkv"]["weight"]
    scales = [
        made.tensors[f"{ATTN}.{p}_proj.weight_scale"].astype(np.float32).repeat(n) for p, n in zip("qkv", (128, 64, 64))
    ]
    np.testing.assert_array_equal(qkv.scale[:, 0], np.concatenate(scales))
    assert qkv.spec.group_shape == (1, 128) and qkv.spec.activation.kind == "static_tensor"
    assert qkv.input_scale.shape == (1, 1) and qkv.input_scale.dtype == np.float32
    o = on_host(tmp_path).params["layers"]["0"]["attn"]["o"]["weight"]
    assert o.spec.group_shape == (128, 128) and o.scale.shape == (1, 1), "a single Linear stays per tensor"


def test_activations_none_drops_the_input_scale(tmp_path: Path) -> None:
    tiny.make(tmp_path, tiny.eight(shape="tensor", static=True), STATIC)
    qkv = on_host(tmp_path, activations="none").params["layers"]["0"]["attn"]["qkv"]["weight"]
    assert qkv.input_scale is None and qkv.spec.activation.kind == "none"


def test_static_asymmetric_input_is_not_served_but_its_weights_can_be_looked_at(tmp_path: Path) -> None:
    from jqserve.errors import UnsupportedError

    inputs = c.inputs("int", static=True, sym=False)
    config = c.compressed("int-quantized", c.weights(8, "int", "channel"), inputs)
    made = tiny.make(tmp_path, tiny.eight("int", static=True), config)
    for name in tiny.linears(made.config):
        made.tensors[f"{name}.input_zero_point"] = np.full(1, 3, np.int8)
    made.save()
    with pytest.raises(UnsupportedError, match="asymmetric"):
        on_host(tmp_path)
    weight = on_host(tmp_path, activations="none").params["layers"]["0"]["attn"]["o"]["weight"]
    np.testing.assert_array_equal(weight.qvalue, made.tensors[f"{ATTN}.o_proj.weight"])


def test_input_scales_that_differ_keep_the_parts_apart(tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tiny.eight(shape="tensor", static=True), STATIC)
    made.tensors[f"{ATTN}.v_proj.input_scale"] = made.tensors[f"{ATTN}.v_proj.input_scale"] * 2
    loaded = on_host(made.save().path)
    assert set(loaded.params["layers"]["0"]["attn"]) == {"q", "k", "v", "o"}
    assert set(loaded.params["layers"]["1"]["attn"]) == {"qkv", "o"}
    assert notes(loaded) == {f"layers.0.attn.{p}": "kept apart: input scales differ" for p in "qkv"}


def test_permutations_that_differ_keep_the_parts_apart(tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tiny.gptq(4, 32, desc_act=True), c.gptq(4, 32, desc_act=True))
    made.tensors["model.layers.0.mlp.up_proj.g_idx"] = np.arange(128, dtype=np.int32) // 32
    loaded = on_host(made.save().path)
    assert notes(loaded) == {f"layers.0.mlp.{p}": "kept apart: act-order permutations differ" for p in ("gate", "up")}
    assert loaded.params["layers"]["0"]["mlp"]["up"]["weight"].perm is None
    assert loaded.params["layers"]["0"]["mlp"]["gate"]["weight"].perm is not None


def test_schemes_that_differ_keep_the_parts_apart(tmp_path: Path) -> None:
    quantization = c.gptq(dynamic={r"-:.*layers\.0\.self_attn\.v_proj": {}})
    made = tiny.make(tmp_path, tiny.gptq(), quantization)
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        made.tensors.pop(f"{ATTN}.v_proj.{suffix}")
    made.tensors[f"{ATTN}.v_proj.weight"] = tiny.dense(np.random.default_rng(0), 64, 128)[0]["weight"]
    attn = (loaded := on_host(made.save().path)).params["layers"]["0"]["attn"]
    assert isinstance(attn["q"]["weight"], QuantizedTensor) and not isinstance(attn["v"]["weight"], QuantizedTensor)
    assert notes(loaded) == {f"layers.0.attn.{p}": "kept apart: schemes differ" for p in "qkv"}


def test_biases_are_fused_and_cast(tmp_path: Path) -> None:
    changes = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    made = tiny.make(tmp_path, tiny.gptq(), c.gptq(), **changes)
    for p, n in zip("qkv", (128, 64, 64)):
        made.tensors[f"{ATTN}.{p}_proj.bias"] = made.tensors[f"model.layers.1.self_attn.{p}_proj.bias"] = np.full(
            n, ord(p), np.float16
        )
    qkv = on_host(made.save().path, dtype="float32").params["layers"]["0"]["attn"]["qkv"]
    np.testing.assert_array_equal(qkv["bias"], np.repeat(np.float32([113, 107, 118]), [128, 64, 64]))
    assert qkv["bias"].dtype == np.float32 and qkv["weight"].scale.dtype == np.float16


def test_missing_bias_is_an_error(tmp_path: Path) -> None:
    from jqserve.errors import CheckpointError

    tiny.make(tmp_path, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*missing"):
        on_host(tmp_path)


def test_plan_json_and_text(tmp_path: Path) -> None:
    tiny.make(tmp_path, tiny.gptq(4, 32, desc_act=True), c.gptq(4, 32, desc_act=True))
    loaded = on_host(tmp_path)
    plan = loaded.plan
    assert LoadPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    row = next(r for r in plan.rows if r.path == "layers.1.attn.qkv")
    assert row.source == "model.layers.1.self_attn.{q_proj,k_proj,v_proj}"
    assert row.scheme == "gptq: uint4, groups of 32, act-order" and row.shape == (256, 128) and row.bits == 4
    assert row.group == 32 and row.activation == "none" and row.dtype == "float16"
    assert row.bytes == 256 * 64 + 256 * 4 * 2 + 128 * 4
    assert "layers.0-1.attn.qkv" in plan.to_text() and len(plan.to_text().splitlines()) == 6
    assert plan.to_table().row_count == 5


def test_progress_counts_modules(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    seen: list[tuple[int, int, str]] = []
    load(str(tmp_path), device_put=keep_on_host, progress=lambda *what: seen.append(what))
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1)) and seen[-1][0] == seen[-1][1]
    assert seen[0][2] == "embed.weight" and seen[-1][2] == "final_norm.weight"
