"""Every format's bits: tiny checkpoints of known codes, and the peers' fixtures through independent decoders."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint.convert import load
from jqserve.checkpoint.loaded import keep_on_host
from jqserve.quant import QuantizedTensor
from tests.checkpoint import configs as c
from tests.checkpoint import decoders, files, tiny
from tests.checkpoint import tiny_more as m

FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
SINGLE = {
    "o": "o_proj",
    "down": "down_proj",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "gate": "gate_proj",
    "up": "up_proj",
}
BLOCKS = {"attn": "self_attn", "mlp": "mlp"}

CASES: dict[str, tuple[tiny.Maker, dict[str, Any] | None]] = {
    "bf16": (tiny.dense, None),
    "fp16": (functools.partial(tiny.dense, dtype=np.float16), None),
    "fp32": (functools.partial(tiny.dense, dtype=np.float32), None),
    "awq group 128": (tiny.awq(128), c.awq(128)),
    "awq group 64": (tiny.awq(64), c.awq(64)),
    "awq group 32": (tiny.awq(32), c.awq(32)),
    "awq group -1": (tiny.awq(-1), c.awq(-1)),
    "awq, old field names": (
        tiny.awq(64),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
    ),
    **{
        f"gptq {bits} bit, group {group}, {'sym' if sym else 'asym'}, {'v2' if v2 else 'v1'}": (
            tiny.gptq(bits, group, sym, v2=v2),
            c.gptq(bits, group, sym, v2=v2),
        )
        for bits in (2, 3, 4, 8)
        for group in (-1, 32, 64, 128)
        for sym in (True, False)
        for v2 in (False, True)
    },
    "gptq act-order": (tiny.gptq(4, 32, desc_act=True), c.gptq(4, 32, desc_act=True)),
    "gptq 8 bit act-order asym v2": (
        tiny.gptq(8, 64, False, desc_act=True, v2=True),
        c.gptq(8, 64, False, desc_act=True, v2=True),
    ),
    "gptq 3 bit act-order": (tiny.gptq(3, 32, desc_act=True), c.gptq(3, 32, desc_act=True)),
    "gptq 2 bit act-order asym": (tiny.gptq(2, 64, False, desc_act=True), c.gptq(2, 64, False, desc_act=True)),
    "gptq act-order with one group": (tiny.gptq(4, -1), c.gptq(4, -1, desc_act=True)),
    "gptq without g_idx": (tiny.gptq(g_idx="no"), c.gptq()),
    "gptq, g_idx all -1": (tiny.gptq(g_idx="minus one"), c.gptq()),
    "gptq ragged last group": (tiny.gptq(4, 96), c.gptq(4, 96)),
    "ct w4a16": (tiny.packed(4, 128), c.compressed("pack-quantized", c.weights(4, "int", "group", 128))),
    "ct w4a16 group 32 asym": (
        tiny.packed(4, 32, sym=False),
        c.compressed("pack-quantized", c.weights(4, "int", "group", 32, sym=False)),
    ),
    "ct w4a16 channel": (tiny.packed(4, None), c.compressed("pack-quantized", c.weights(4, "int", "channel"))),
    "ct w4a16 channel asym": (
        tiny.packed(4, None, sym=False),
        c.compressed("pack-quantized", c.weights(4, "int", "channel", sym=False)),
    ),
    "ct w4a16 actorder group": (
        tiny.packed(4, 32, actorder=True),
        c.compressed("pack-quantized", c.weights(4, "int", "group", 32, actorder="group")),
    ),
    "ct w4a16 actorder group asym": (
        tiny.packed(4, 32, sym=False, actorder=True),
        c.compressed("pack-quantized", c.weights(4, "int", "group", 32, sym=False, actorder="group")),
    ),
    "ct w4a16 actorder static": (
        tiny.packed(4, 128),
        c.compressed("pack-quantized", c.weights(4, "int", "group", 128, actorder="static")),
    ),
    "ct w8a16 group": (tiny.packed(8, 128), c.compressed("pack-quantized", c.weights(8, "int", "group", 128))),
    "ct w8a16 channel": (tiny.packed(8, None), c.compressed("pack-quantized", c.weights(8, "int", "channel"))),
    "ct w8a16 asym": (
        tiny.packed(8, 64, sym=False),
        c.compressed("pack-quantized", c.weights(8, "int", "group", 64, sym=False)),
    ),
    "ct w8a16 actorder": (
        tiny.packed(8, 32, actorder=True),
        c.compressed("pack-quantized", c.weights(8, "int", "group", 32, actorder="group")),
    ),
    "ct fp8 dynamic": (
        tiny.eight(),
        c.compressed("float-quantized", c.weights(8, "float", "channel"), c.inputs("float")),
    ),
    "ct fp8 static": (
        tiny.eight(shape="tensor", static=True),
        c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float", static=True)),
    ),
    "ct fp8 static per channel": (
        tiny.eight(static=True),
        c.compressed("float-quantized", c.weights(8, "float", "channel"), c.inputs("float", static=True)),
    ),
    "ct fp8 per tensor, dynamic input": (
        tiny.eight(shape="scalar"),
        c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float")),
    ),
    "ct fp8 weights only": (tiny.eight(), c.compressed("float-quantized", c.weights(8, "float", "channel"))),
    "ct int8 dynamic": (
        tiny.eight("int"),
        c.compressed("int-quantized", c.weights(8, "int", "channel"), c.inputs("int")),
    ),
    "ct int8 static per tensor": (
        tiny.eight("int", "tensor", static=True),
        c.compressed("int-quantized", c.weights(8, "int", "tensor"), c.inputs("int", static=True)),
    ),
    "ct int8 weights only, groups": (
        tiny.eight("int", "group"),
        c.compressed("int-quantized", c.weights(8, "int", "group", 128)),
    ),
    "ct int8 weights only, asym": (
        tiny.eight("int", "channel", sym=False),
        c.compressed("int-quantized", c.weights(8, "int", "channel", sym=False)),
    ),
    "ct naive": (tiny.eight(), c.compressed("naive-quantized", c.weights(8, "float", "channel"), c.inputs("float"))),
    "fp8 per tensor, scalar scales": (tiny.eight(shape="scalar"), c.fp8()),
    "fp8 per tensor, [1] scales": (tiny.eight(shape="tensor"), c.fp8()),
    "fp8 per tensor static": (tiny.eight(shape="scalar", static=True), c.fp8("static", fmt="e4m3")),
    "fp8 with transformers' names": (tiny.eight(shape="scalar", scale_name="weight_scale_inv"), c.fp8()),
}


def canonical(weight: QuantizedTensor) -> np.ndarray:
    """W float32 [N, K] by the words of QuantSpec's docstring, in numpy (tests/quant checks `dequantize` itself)."""
    spec = weight.spec
    (n, k), (gn, gk) = spec.shape, spec.group_shape
    q = np.asarray(weight.qvalue)
    if spec.qtype in ("uint4", "nf4", "fp4"):
        q = np.stack([q & 15, q >> 4], axis=2).reshape(n, -1)[:, :k]
    rows, columns = np.arange(n) // gn, np.arange(k) // gk

    def spread(grid: Any) -> np.ndarray:
        return np.asarray(grid).astype(np.float32)[rows][:, columns]

    zero = spread(weight.zero_point) if spec.zero == "int" else {"uint4": 8, "uint8": 128}.get(spec.qtype, 0)
    value = m.TABLES[spec.qtype][q] if spec.qtype in m.TABLES else q.astype(np.float32) - zero
    value = value * spread(weight.scale)
    if spec.zero == "offset":
        value = value + spread(weight.zero_point)
    if weight.perm is None:
        return value
    ordered = np.empty_like(value)
    ordered[:, np.asarray(weight.perm)] = value
    return ordered


def matrices(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Hugging Face module -> W float32 [N, K] of a loaded tree (fused ones: all parts, stacked, under the first)."""
    found = {}
    for i, layer in params["layers"].items():
        for block, hf in BLOCKS.items():
            for key, linear in layer[block].items():
                if key.endswith(("norm", "_scale")):  # an FP8 KV cache's k_scale and v_scale: no matrices
                    continue
                names = FUSED.get(key, (SINGLE.get(key),))
                weight = linear["weight"]
                value = canonical(weight) if isinstance(weight, QuantizedTensor) else np.asarray(weight, np.float32)
                found[tuple(f"model.layers.{i}.{hf}.{name}" for name in names)] = value
    return found


def check_tree(params: dict[str, Any], truth: Any) -> None:
    """Every Linear equals truth(module) bit for bit: the same float32 formula on the same codes."""
    found = matrices(params)
    assert len(found) >= 4 * len(params["layers"])
    for names, value in found.items():
        np.testing.assert_array_equal(value, np.concatenate([truth(name) for name in names]), err_msg=str(names))


PER_TENSOR = {"_type": "PerTensor", "_data": {}}
BLOCK_WEIGHTS = {**c.weights(8, "float", "block"), "block_structure": [128, 128]}
BLOCK_INPUTS = {**c.inputs("float"), "strategy": "group", "group_size": 128}
CASES |= {
    "fp8 blocks": (m.blocks(), c.fp8(weight_block_size=[128, 128])),
    "fp8 blocks, ue8m0": (
        m.blocks(dtype=ml_dtypes.float8_e8m0fnu),
        c.fp8(weight_block_size=[128, 128], scale_fmt="ue8m0", fmt="e4m3"),
    ),
    "ct fp8 blocks": (
        m.blocks("weight_scale", ml_dtypes.bfloat16),
        c.compressed("float-quantized", BLOCK_WEIGHTS, BLOCK_INPUTS),
    ),
    "bnb nf4": (m.bnb4(), m.bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bnb fp4": (m.bnb4("fp4"), m.bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "bnb fp4 double": (
        m.bnb4("fp4", True),
        m.bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    ),
    "bnb int8": (m.bnb8, m.bnb(load_in_8bit=True)),
    "torchao int8wo": (m.torchao8(), m.torchao("Int8WeightOnlyConfig")),
    "torchao fp8dq row": (m.torchao8("fp8"), m.torchao("Float8DynamicActivationFloat8WeightConfig")),
    "torchao fp8wo tensor": (m.torchao8("fp8", True), m.torchao("Float8WeightOnlyConfig", granularity=PER_TENSOR)),
    "torchao int4wo": (m.torchao4(), m.torchao("Int4WeightOnlyConfig", group_size=64)),
    "torchao int4wo, o_proj and others left dense": (
        m.torchao4(256),
        m.torchao("Int4WeightOnlyConfig", group_size=256, int4_packing_format={"_data": "PLAIN"}),
    ),
    "marlin": (m.marlin(64), c.gptq(4, 64, checkpoint_format="marlin", format="marlin")),
    "marlin, old, one group": (
        m.marlin(-1),
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "is_marlin_format": True},
    ),
}
#: Decoded under jit as well, as on a GPU: one of each kind of arithmetic.
ON_DEVICE = [
    "bf16",
    "awq group 64",
    "gptq 4 bit, group 32, asym, v1",
    "gptq 8 bit act-order asym v2",
    "ct w4a16 actorder group asym",
    "ct fp8 static",
    "ct int8 weights only, asym",
    "fp8 blocks, ue8m0",
    "bnb fp4 double",
    "torchao int4wo",
    "marlin",
]


@pytest.mark.parametrize(("case", "decode"), [(x, "host") for x in CASES] + [(x, "device") for x in ON_DEVICE])
def test_tiny_checkpoints_decode_exactly(case: str, decode: Any, tmp_path: Path) -> None:
    maker, quantization = CASES[case]
    layers = 2 if decode == "host" else 1
    made = tiny.make(tmp_path, maker, quantization, num_hidden_layers=layers)
    place = keep_on_host if decode == "host" else None
    params = load(str(tmp_path), dtype="float32", decode=decode, device_put=place).params
    check_tree(params, made.weights.__getitem__)


FIXTURES = [
    "base-bf16",
    "awq-4bit-g128",
    "gptq-4bit-g128",
    "gptq-4bit-g128-asym-v1",
    "gptq-4bit-g128-desc-act",
    "gptq-8bit-g128",
    "gptq-dynamic",
    "ct-fp8-dynamic",
    "ct-fp8-kv",
    "ct-fp8-static",
    "ct-w4a16-asym-g128",
    "ct-w4a16-g128",
    "ct-w8a8-int8",
    "ctold-w4a16-actorder-group",
    "arch-qwen2-gptq",
    "arch-qwen3-ct-w4a16",
    "arch-mistral-sw-ct-fp8-dynamic",
]


@pytest.mark.parametrize("name", FIXTURES)
def test_peer_checkpoints_decode_exactly(name: str, fixtures_dir: Path) -> None:
    path = fixtures_dir / name
    tensors, config = files.read(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    loaded = load(str(path), dtype="float32", device_put=keep_on_host)
    check_tree(loaded.params, lambda module: decoders.decode(tensors, config, module))
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(loaded.params["embed"]["weight"], embedding)
    assert ("lm_head" in loaded.params) == (not config["tie_word_embeddings"])
