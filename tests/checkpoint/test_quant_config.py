"""quantization_config -> the scheme of each module: ignore lists, overrides, fallbacks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.quant_config import QuantPlan, quant_plan
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.gptq import Gptq
from jqserve.errors import CheckpointError, JqserveError, UnsupportedError
from tests.checkpoint import configs as c
from tests.checkpoint import tiny_more as m
from tests.checkpoint.tiny import CONFIG

Q, DOWN, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"
W4 = c.weights(4, "int", "group", 128)
F8 = c.weights(8, "float", "channel")


def plan(path: Path, quantization: Any, key: str = "quantization_config", **beside: Any) -> QuantPlan:
    config = CONFIG if quantization is None else {**CONFIG, key: quantization}
    (path / "config.json").write_text(json.dumps(config))
    for name, content in beside.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    with Checkpoint(path, weights=False) as checkpoint:
        return quant_plan(checkpoint)


def dense(found: QuantPlan, *modules: str) -> list[bool]:
    return [found.scheme(m) == DENSE for m in modules]


def test_unquantized(tmp_path: Path) -> None:
    found = plan(tmp_path, None)
    assert found.method == "none" and dense(found, Q, HEAD) == [True, True]


def test_awq_skips_by_substring(tmp_path: Path) -> None:
    found = plan(tmp_path, c.awq(modules_to_not_convert=["layers.0.self_attn", "down"]))
    assert dense(found, Q, DOWN, "model.layers.1.self_attn.q_proj", HEAD) == [True, True, False, True]


def test_gptq_dynamic_takes_the_first_match(tmp_path: Path) -> None:
    dynamic = {
        r"-:.*layers\.0\.self_attn": {},
        r"+:.*\.down_proj": {"bits": 8, "group_size": 32},
        r"model\.layers\.1": {"sym": False, "desc_act": True, "damp_percent": 0.1},
    }
    found = plan(tmp_path, c.gptq(dynamic=dynamic))
    assert found.scheme(Q) == DENSE
    assert found.scheme(DOWN) == Gptq(8, 32, False, True, False)
    assert found.scheme("model.layers.1.mlp.up_proj") == Gptq(4, 128, True, False, False)
    assert found.scheme("x.layers.1.mlp.up_proj") == Gptq(4, 128, False, True, False), "anchored at the start"


def test_gptq_lm_head_and_block_lists(tmp_path: Path) -> None:
    assert dense(plan(tmp_path, c.gptq()), HEAD) == [True]
    assert dense(plan(tmp_path, c.gptq(lm_head=True)), HEAD) == [False]
    listed = c.gptq(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]])
    assert dense(plan(tmp_path, listed), Q, DOWN) == [False, True]


def test_gptq_from_quantize_config(tmp_path: Path) -> None:
    old = {"bits": 8, "group_size": 64, "desc_act": True, "sym": False, "true_sequential": True, "damp_percent": 0.01}
    assert plan(tmp_path, None, quantize_config=old).scheme(Q) == Gptq(8, 64, True, False, v2=False)


def test_awq_from_quant_config(tmp_path: Path) -> None:
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert plan(tmp_path, None, quant_config=old).method == "awq"


def test_old_compression_config(tmp_path: Path) -> None:
    group = c.compressed("pack-quantized", W4)
    group.pop("quant_method")
    group["config_groups"]["group_0"].pop("format")
    assert plan(tmp_path, group, "compression_config").method == "compressed-tensors"
    assert not dense(plan(tmp_path, {"quantization_config": group}, "compression_config"), Q)[0]


IGNORES: dict[str, tuple[list[str], list[bool]]] = {
    "exact": ([Q], [True, False]),
    "no suffix rule": (["q_proj", "self_attn.q_proj"], [False, False]),
    "no prefix rule": (["model.layers.0"], [False, False]),
    "regex, open at the end": ([r"re:model\.layers\.0"], [True, False]),
    "regex, anchored at the start": ([r"re:self_attn", r"re:.*down_proj"], [False, True]),
    "class": (["Linear"], [True, True]),
}


@pytest.mark.parametrize("case", IGNORES)
def test_compressed_tensors_ignore(case: str, tmp_path: Path) -> None:
    ignore, expected = IGNORES[case]
    found = plan(tmp_path, c.compressed("float-quantized", F8, c.inputs("float"), ignore=[*ignore, HEAD]))
    assert dense(found, Q, DOWN, HEAD) == [*expected, True]


def test_compressed_tensors_groups_by_name_before_class(tmp_path: Path) -> None:
    base = c.compressed("mixed-precision", F8)
    groups = {
        "group_0": {"targets": ["Linear"], "weights": F8, "input_activations": None, "format": "float-quantized"},
        "group_1": {"targets": [r"re:.*mlp.*"], "weights": W4, "input_activations": None, "format": "pack-quantized"},
    }
    found = plan(tmp_path, {**base, "config_groups": groups})
    assert [found.scheme(m).method.split()[-1] for m in (Q, DOWN)] == ["float-quantized", "pack-quantized"]
    groups["group_0"]["targets"] = [Q]
    assert dense(plan(tmp_path, {**base, "config_groups": groups}), Q, "model.layers.0.self_attn.k_proj") == [
        False,
        True,
    ]


def test_fp8_lists(tmp_path: Path) -> None:
    found = plan(tmp_path, c.fp8(ignored_layers=[Q], modules_to_not_convert=["down_proj", "model.layers.1.self_attn"]))
    others = ("model.layers.1.self_attn.k_proj", "model.layers.0.self_attn.k_proj")
    assert dense(found, Q, DOWN, *others, HEAD) == [True, True, True, False, True]


def ct(weights: dict[str, Any], form: str = "pack-quantized", inputs: Any = None, **more: Any) -> dict[str, Any]:
    return c.compressed(form, weights, inputs, **more)


DYNAMIC_TENSOR = {**c.inputs("float"), "strategy": "tensor"}
REFUSED: dict[str, tuple[Any, type[JqserveError], tuple[str, ...]]] = {
    "no method": ({"bits": 4}, CheckpointError, ("quant_method", "missing")),
    "unknown method": ({"quant_method": "aqlm"}, UnsupportedError, ("'aqlm'", "gptq", "awq")),
    "bnb of both kinds": (m.bnb(load_in_4bit=True, load_in_8bit=True), CheckpointError, ("load_in_4bit", "one of")),
    "bnb of no kind": (m.bnb(), CheckpointError, ("load_in_4bit",)),
    "bnb storage": (
        m.bnb(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
        UnsupportedError,
        ("bnb_4bit_quant_storage", "bfloat16", "uint8"),
    ),
    "bnb kind": (m.bnb(load_in_4bit=True, bnb_4bit_quant_type="int4"), UnsupportedError, ("int4", "nf4", "fp4")),
    "torchao of several": (
        {"quant_method": "torchao", "quant_type": {"default": None, "q_proj": {}}},
        UnsupportedError,
        ("quant_type", "default"),
    ),
    "torchao as text": ({"quant_method": "torchao", "quant_type": "int8wo"}, CheckpointError, ("quant_type", "object")),
    "torchao unknown": (m.torchao("UIntXWeightOnlyConfig"), UnsupportedError, ("UIntX", "Int4WeightOnlyConfig")),
    "a cache in int8": (
        c.compressed("float-quantized", c.weights(8, "float", "channel"), kv_cache_scheme={"type": "int"}),
        UnsupportedError,
        ("kv_cache_scheme", "'int'", "'float'"),
    ),
    "a cache in 4 bits": (
        c.compressed("float-quantized", c.weights(8, "float", "channel"), kv_cache_scheme={"num_bits": 4}),
        UnsupportedError,
        ("kv_cache_scheme", "num_bits: 4", "8"),
    ),
    "torchao tiles": (
        m.torchao("Int4WeightOnlyConfig", int4_packing_format={"_data": "TILE_PACKED_TO_4D"}),
        UnsupportedError,
        ("int4_packing_format", "PLAIN"),
    ),
    "torchao asymmetric": (
        m.torchao("Int8DynamicActivationInt8WeightConfig", act_mapping_type={"_data": "ASYMMETRIC"}),
        UnsupportedError,
        ("act_mapping_type", "SYMMETRIC"),
    ),
    "torchao inputs per tensor, weights per row": (
        m.torchao(
            "Int8DynamicActivationInt8WeightConfig",
            granularity=[{"_type": "PerTensor", "_data": {}}, {"_type": "PerRow", "_data": {"dim": -1}}],
        ),
        UnsupportedError,
        ("granularity", "PerTensor", "the same"),
    ),
    "torchao 7 bits": (
        m.torchao("Int8DynamicActivationInt8WeightConfig", reduce_range=True),
        UnsupportedError,
        ("reduce_range", "True", "null or false"),
    ),
    "torchao clamps inputs": (
        m.torchao("Float8DynamicActivationFloat8WeightConfig", activation_value_ub=3.0),
        UnsupportedError,
        ("activation_value_ub", "3.0", "null"),
    ),
    "torchao e5m2 inputs": (
        m.torchao(
            "Float8DynamicActivationFloat8WeightConfig",
            activation_dtype={"_type": "torch.dtype", "_data": "float8_e5m2"},
        ),
        UnsupportedError,
        ("activation_dtype", "float8_e5m2", "float8_e4m3fn"),
    ),
    "torchao fp8 packed for one kernel": (
        m.torchao(
            "Float8DynamicActivationFloat8WeightConfig",
            packing_format={"_type": "Float8PackingFormat", "_data": "SPARSE_CUTLASS"},
        ),
        UnsupportedError,
        ("packing_format", "SPARSE_CUTLASS", "PLAIN"),
    ),
    "not an object": ("gptq", CheckpointError, ("quantization_config", "object")),
    "awq gemv": (c.awq(version="gemv"), UnsupportedError, ("version", "gemv", "gemm")),
    "awq 8 bit": (c.awq(bits=8), UnsupportedError, ("bits", "8", "4")),
    "awq without zeros": (c.awq(zero_point=False), UnsupportedError, ("zero_point",)),
    "awq group 0": (c.awq(0), CheckpointError, ("group_size", "0")),
    "gptq 5 bit": (c.gptq(5), UnsupportedError, ("bits", "5", "2, 3, 4, 8")),
    "gptq marlin asym": (c.gptq(sym=False, is_marlin_format=True), UnsupportedError, ("sym", "Marlin")),
    "gptq format": (c.gptq(checkpoint_format="bitblas"), UnsupportedError, ("checkpoint_format", "bitblas", "gptq_v2")),
    "gptq two formats": (c.gptq(format="gptq_v2"), CheckpointError, ("checkpoint_format", "gptq_v2")),
    "gptq pack": (c.gptq(pack_dtype="int16"), UnsupportedError, ("pack_dtype", "int16")),
    "gptq dynamic bits": (c.gptq(dynamic={"+:.*": {"bits": 6}}), UnsupportedError, ("dynamic", "bits", "6")),
    "gptq bad pattern": (c.gptq(dynamic={"-:(": {}}), CheckpointError, ("dynamic", "regular expression")),
    "gptq group is text": (c.gptq(group_size="128"), CheckpointError, ("group_size", "'128'")),
    "fp8 blocks": (
        c.fp8(weight_block_size=[64, 64]),
        UnsupportedError,
        ("weight_block_size", "[64, 64]", "[128, 128]"),
    ),
    "fp8 blocks, static": (c.fp8("static", weight_block_size=[128, 128]), UnsupportedError, ("activation_scheme",)),
    "fp8 block scales": (c.fp8(weight_block_size=[128, 128], scale_fmt="x"), UnsupportedError, ("scale_fmt",)),
    "fp8 e5m2": (c.fp8(fmt="e5m2"), UnsupportedError, ("fmt", "e5m2")),
    "fp8 scheme": (c.fp8("blockwise"), UnsupportedError, ("activation_scheme", "blockwise")),
    "ct marlin": (ct(W4, "marlin-24"), UnsupportedError, ("marlin-24", "pack-quantized")),
    "ct nvfp4": (ct(W4, "nvfp4-pack-quantized"), UnsupportedError, ("nvfp4-pack-quantized",)),
    "ct calibrating": (ct(W4, quantization_status="calibration"), UnsupportedError, ("calibration", "compressed")),
    "ct sparse": (ct(W4, sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedError, ("sparsity_config",)),
    "ct transforms": (ct(W4, transform_config={"config_groups": {}}), UnsupportedError, ("transform_config",)),
    "ct no groups": ({**ct(W4), "config_groups": {}}, CheckpointError, ("config_groups",)),
    "ct bits": (ct({**W4, "num_bits": 3}), UnsupportedError, ("num_bits", "3", "4, 8")),
    "ct w4a8": (ct(W4, inputs=c.inputs("int")), UnsupportedError, ("input_activations",)),
    "ct fp8 block": (
        ct({**F8, "strategy": "block", "block_structure": [64, 128]}, "float-quantized"),
        UnsupportedError,
        ("block_structure", "[64, 128]", "[128, 128]"),
    ),
    "ct kind against format": (ct(F8, "int-quantized"), CheckpointError, ("type", "int-quantized")),
    "ct dynamic per tensor": (
        ct(F8, "float-quantized", DYNAMIC_TENSOR),
        UnsupportedError,
        ("dynamic True", "'tensor'", "'token'"),
    ),
    "ct group without size": (ct({**W4, "group_size": None}), CheckpointError, ("group_size", "positive")),
    "ct bad ignore": (ct(W4, ignore=["re:["]), CheckpointError, ("regular expression",)),
    "ct ignore is text": (ct(W4, ignore="lm_head"), CheckpointError, ("ignore", "list of strings")),
    "ct outputs": (
        {**ct(W4), "config_groups": {"g": {"targets": ["Linear"], "weights": W4, "output_activations": {}}}},
        UnsupportedError,
        ("output_activations",),
    ),
}


def test_modelopt_beside_a_config_that_says_nothing(tmp_path: Path) -> None:
    """Its first exports keep the facts in hf_quant_config.json alone."""
    with pytest.raises(UnsupportedError, match=r"hf_quant_config\.json: modelopt"):
        plan(tmp_path, None, hf_quant_config={"quantization": {"quant_algo": "FP8"}})


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    quantization, kind, words = REFUSED[case]
    with pytest.raises(kind) as caught:
        plan(tmp_path, quantization).scheme(Q)
    missing = [word for word in ("config.json", *words) if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
