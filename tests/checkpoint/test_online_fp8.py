"""`--quantization fp8`: the arithmetic, in both ways of decoding, and the names that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.errors import UnsupportedError
from jqserve.quant import QuantizedTensor
from tests.checkpoint import configs as c
from tests.checkpoint import tiny


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


@pytest.mark.parametrize("name", ["awq", "gptq", "int8", "bitsandbytes", "nonsense"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    tiny.make(tmp_path)
    with pytest.raises(UnsupportedError, match=f"'{name}'.*supported: fp8"):
        load(str(tmp_path), quantization=name, device_put=keep_on_host)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    tiny.make(tmp_path, tiny.gptq(), c.gptq())
    with pytest.raises(UnsupportedError, match="quantized already"):
        load(str(tmp_path), quantization="fp8", device_put=keep_on_host)
