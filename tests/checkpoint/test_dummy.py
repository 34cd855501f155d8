"""`--load-format dummy`: the tree, the plan and the config that the real checkpoint would give; values of sane size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jqserve.checkpoint import dummy
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.errors import CheckpointError, UnsupportedError
from tests.checkpoint import configs as c
from tests.checkpoint import tiny
from tests.checkpoint.test_readers import canonical

STATIC = c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float", static=True))
CASES: dict[str, tuple[tiny.Maker, dict[str, Any] | None, dict[str, Any]]] = {
    "bf16": (tiny.dense, None, {}),
    "bf16, online fp8": (tiny.dense, None, {"quantization": "fp8"}),
    "awq": (tiny.awq(), c.awq(), {"dtype": "float16"}),
    "gptq act-order": (tiny.gptq(4, 32, desc_act=True), c.gptq(4, 32, desc_act=True), {}),
    "gptq 8 bit": (tiny.gptq(8), c.gptq(8), {}),
    "fp8 static": (tiny.eight(shape="tensor", static=True), STATIC, {}),
    "fp8 static, activations none": (tiny.eight(shape="tensor", static=True), STATIC, {"activations": "none"}),
    "int8": (tiny.eight("int"), c.compressed("int-quantized", c.weights(8, "int", "channel"), c.inputs("int")), {}),
}


def described(tree: Any) -> Any:
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("case", CASES)
def test_same_form_as_the_checkpoint(case: str, tmp_path: Path) -> None:
    maker, quantization, options = CASES[case]
    made = tiny.make(tmp_path, maker, quantization, tie_word_embeddings=False)
    real = load(str(tmp_path), device_put=keep_on_host, **options)
    (made.path / "model.safetensors").unlink()
    random = dummy.load(str(tmp_path), **options)
    assert described(random.params) == described(real.params)
    assert random.config == real.config and random.plan.method == real.plan.method
    assert [(r.path, r.source, r.scheme, r.shape, r.activation) for r in random.plan.rows] == [
        (r.path, r.source, r.scheme, r.shape, r.activation) for r in real.plan.rows
    ]
    assert "random weights" in random.plan.notes[0]
    weight = random.params["layers"]["1"]["mlp"]["down"]["weight"]
    value = canonical(weight) if hasattr(weight, "spec") else np.asarray(weight, np.float32)
    assert 0.5 < value.std() * value.shape[1] ** 0.5 < 1.6 and abs(value.mean()) < 0.02


def test_seed_decides(tmp_path: Path) -> None:
    tiny.make(tmp_path, tiny.gptq(), c.gptq(), num_hidden_layers=1)
    one, same, other, _ = (
        dummy.load(str(tmp_path), seed=s).params["layers"]["0"]["mlp"]["down"]["weight"] for s in (1, 1, 2, -1)
    )
    np.testing.assert_array_equal(one.qvalue, same.qvalue)
    assert (np.asarray(one.qvalue) != np.asarray(other.qvalue)).mean() > 0.9


def test_biases_and_qk_norms(tmp_path: Path) -> None:
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIG, **qwen3}))
    attn = dummy.load(str(tmp_path)).params["layers"]["0"]["attn"]
    assert set(attn) == {"qkv", "o", "q_norm", "k_norm"} and attn["qkv"]["bias"].shape == (256,)


def test_refused_as_a_real_one_would_be(tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tiny.awq(), c.awq(48))
    with pytest.raises(CheckpointError, match="groups of 48"):
        dummy.load(str(made.path))
    made = tiny.make(tmp_path / "late", tiny.awq(64), c.awq(128), intermediate_size=192)  # only down_proj does not fit
    with pytest.raises(CheckpointError, match=r"down_proj.*groups of 128"):
        dummy.load(str(made.path), device_put=lambda weight: pytest.fail("memory was taken before the check"))
    made.config["quantization_config"] = {"quant_method": "aqlm"}
    with pytest.raises(UnsupportedError, match="aqlm"):
        dummy.load(str(made.save().path))
