"""Quantization while loading: which modules are taken, and that they are what the rules of `rounding` make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint import store
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.checkpoint.loaded import flat_leaves
from jqserve.checkpoint.online import ONLINE, TORCHAO
from jqserve.errors import CheckpointError, UnsupportedError
from jqserve.quant import QuantizedTensor, dequantize
from tests.checkpoint import tiny
from tests.checkpoint import tiny_more as more


def expected(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q, scale) by the definition: absmax / 448 a row (as a product, as XLA has it), q to nearest even."""
    absmax = np.abs(w).max(axis=1, keepdims=True)
    scale = np.where(absmax == 0, np.float32(1), absmax * np.float32(1 / 448))
    return np.clip(w / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn), scale


@pytest.mark.parametrize("decode", ["host", "device"])
def test_linears_become_fp8_per_channel(decode: Any, tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tie_word_embeddings=False, num_hidden_layers=1)
    name = "model.layers.0.mlp.down_proj.weight"
    made.tensors[name][3] = 0  # a row of zeros
    made.save()
    place = keep_on_host if decode == "host" else None
    loaded = load(str(tmp_path), quantization="fp8", decode=decode, device_put=place)
    params = loaded.params
    assert not isinstance(params["lm_head"]["weight"], QuantizedTensor)
    layer = params["layers"]["0"]
    down = layer["mlp"]["down"]["weight"]
    q, scale = expected(made.tensors[name].astype(np.float32))
    np.testing.assert_array_equal(np.asarray(down.scale), scale)
    np.testing.assert_array_equal(np.asarray(down.qvalue).view(np.uint8), q.view(np.uint8))
    assert down.scale[3, 0] == 1 and down.spec.activation.kind == "dynamic_token"
    assert down.spec.group_shape == (1, 256) and down.spec.activation.divisor == 448
    parts = [made.tensors[f"model.layers.0.self_attn.{p}_proj.weight"].astype(np.float32) for p in "qkv"]
    np.testing.assert_array_equal(np.asarray(layer["attn"]["qkv"]["weight"].scale), expected(np.concatenate(parts))[1])
    row = next(r for r in loaded.plan.rows if r.path == "layers.0.mlp.down")
    assert row.scheme == "online: float8_e4m3fn, per channel" and row.activation == "fp8 per token"
    assert "--quantization fp8" in loaded.plan.notes[0]


def test_activations_none_keeps_the_weights_alone(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    loaded = load(str(tmp_path), quantization="fp8", activations="none", device_put=keep_on_host)
    assert loaded.params["layers"]["0"]["mlp"]["down"]["weight"].spec.activation.kind == "none"


@pytest.mark.parametrize("name", ["torchao:int4wo-128", "bitsandbytes"])
def test_a_scheme_that_fits_nothing_is_refused(name: str, tmp_path: Path) -> None:
    """It would leave the model as it is, and look quantized; where one Linear fits, others may not."""
    tiny.make(tmp_path, hidden_size=96, intermediate_size=160, num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match=r"none of the checkpoint's 7 Linears.*q_proj.*group of.*int4"):
        load(str(tmp_path), quantization=name, device_put=keep_on_host)
    tiny.make(tmp_path, hidden_size=96, intermediate_size=256, num_hidden_layers=1)
    loaded = load(str(tmp_path), quantization=name, device_put=keep_on_host)
    notes = {row.path: row.note for row in loaded.plan.rows}
    assert "not quantized" in notes["layers.0.attn.qkv"] and not notes["layers.0.mlp.down"]


def test_sides_that_16_does_not_divide(tmp_path: Path) -> None:
    """torchao's fp8 x fp8 leaves such a Linear dense, its weight-only fp8 takes it; and so its checkpoints are read."""
    sizes = {"hidden_size": 64, "intermediate_size": 264, "num_hidden_layers": 1}

    def dense(folder: str, maker: Any, config: Any, flag: str | None) -> list[str]:
        made = tiny.make(tmp_path / folder, maker, config, **sizes)
        rows = load(str(made.path), device_put=keep_on_host, quantization=flag).plan.rows
        return [row.path.rpartition(".")[2] for row in rows if row.spec is None and "layers" in row.path]

    assert dense("a", tiny.dense, None, "torchao:fp8wo") == []
    for folder, flag in (("b", "torchao:fp8dq-per_row"), ("c", "torchao:fp8dq-per_tensor")):
        assert dense(folder, tiny.dense, None, flag) == ["gate_up", "down"]
    stored = more.torchao8("fp8")

    def left(rng: np.random.Generator, n: int, k: int) -> Any:
        return (tiny.dense if n % 16 or k % 16 else stored)(rng, n, k)

    dynamic = more.torchao("Float8DynamicActivationFloat8WeightConfig")
    assert dense("d", left, dynamic, None) == ["gate_up", "down"]
    assert dense("e", stored, more.torchao("Float8WeightOnlyConfig"), None) == []


SCHEMES = dict.fromkeys((*ONLINE, *(f"torchao:{name}" for name in TORCHAO)))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_linear_and_no_other_module(name: str, tmp_path: Path) -> None:
    """Fused parts, quantized one by one, are what the rule makes of each; head, embedding and norms stay."""
    made = tiny.make(tmp_path, tie_word_embeddings=False, num_hidden_layers=1, hidden_size=256, intermediate_size=512)
    loaded = load(str(tmp_path), quantization=name, device_put=keep_on_host)
    online = TORCHAO[name.removeprefix("torchao:")] if name.startswith("torchao:") else ONLINE[name]
    quantized = [path for path, leaf in flat_leaves(loaded.params) if isinstance(leaf, QuantizedTensor)]
    assert sorted(quantized) == sorted(
        f"layers.0.{x}.weight" for x in ("attn.o", "attn.qkv", "mlp.down", "mlp.gate_up")
    )
    for path, parts in {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}.items():
        leaf = loaded.params["layers"]["0"]["mlp"][path]["weight"]
        whole = [online.quantize(made.tensors[f"model.layers.0.mlp.{part}.weight"]) for part in parts]
        value = np.concatenate([np.asarray(dequantize(jax.tree.map(jnp.asarray, q))) for q in whole])
        np.testing.assert_array_equal(np.asarray(dequantize(jax.tree.map(jnp.asarray, leaf))), value)
    rows = {row.path: row for row in loaded.plan.rows}
    assert rows["layers.0.mlp.down"].scheme.startswith("online: ") and rows["lm_head"].scheme == "dense"
    flag = f"--torchao-config {name[8:]}" if name.startswith("torchao:") else f"--quantization {name}"
    assert loaded.plan.notes == (f"quantized while loading: {flag}",)


def test_blocks_that_do_not_fill_are_kept_apart(tmp_path: Path) -> None:
    tiny.make(tmp_path, num_hidden_layers=1)  # k_proj and v_proj have 64 rows
    loaded = load(str(tmp_path), quantization="fp8_block", device_put=keep_on_host)
    assert {"q", "k", "v"} <= loaded.params["layers"]["0"]["attn"].keys()
    assert "gate_up" in loaded.params["layers"]["0"]["mlp"]
    row = next(r for r in loaded.plan.rows if r.path == "layers.0.attn.k")
    assert "whole 128x128 blocks" in row.note and row.scheme == "online: float8_e4m3fn, blocks of 128x128"


@pytest.mark.parametrize("name", ["int4", "int8", "fp8_block"])
@pytest.mark.parametrize("decode", ["host", "device"])
def test_a_value_that_is_not_finite_is_found(name: str, decode: Any, tmp_path: Path) -> None:
    """Integers have no NaN: the scale carries it."""
    made = tiny.make(tmp_path, num_hidden_layers=1)
    made.tensors["model.layers.0.mlp.down_proj.weight"][5, 7] = np.nan
    made.save()
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down.*not finite"):
        load(str(tmp_path), quantization=name, decode=decode, device_put=keep_on_host if decode == "host" else None)


def test_a_stored_dense_model_is_quantized_the_same(tmp_path: Path) -> None:
    tiny.make(tmp_path / "hf", num_hidden_layers=1)
    store.convert(tmp_path / "hf", tmp_path / "out")
    one, other = (load(str(tmp_path / x), quantization="int4-64", device_put=keep_on_host) for x in ("hf", "out"))
    leaves = [jax.tree.leaves(x.params) for x in (one, other)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*leaves))
    assert [r.scheme for r in one.plan.rows] == [r.scheme for r in other.plan.rows]
