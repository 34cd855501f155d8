"""The short list of tensors that may be left out, and what they may be left out for."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint.convert import keep_on_host, load
from tests.checkpoint import configs as c
from tests.checkpoint import tiny

LAYER = "model.layers.{}.self_attn"


def test_extras_are_left_out_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = tiny.make(tmp_path)
    for i in range(2):
        made.tensors[LAYER.format(i) + ".rotary_emb.inv_freq"] = np.ones(16, np.float32)
        made.tensors[LAYER.format(i) + ".q_proj.bias"] = np.zeros(128, np.float16)
        made.tensors[LAYER.format(i) + ".q_proj.g_idx"] = np.full(128, -1, np.int32)
        made.tensors[LAYER.format(i) + ".k_scale"] = np.ones(1, ml_dtypes.bfloat16)
        made.tensors[LAYER.format(i) + ".v_proj.output_scale"] = np.ones(1, ml_dtypes.bfloat16)
    made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"]
    made.save()
    with caplog.at_level(logging.INFO, logger="jqserve.checkpoint"):
        loaded = load(str(tmp_path), activations="none", device_put=keep_on_host)
    reasons = ["rotary", "all-zero bias", "-1 throughout", "tied embedding", "KV cache scale"]
    assert [sum(word in r.message for r in caplog.records) for word in reasons] == [1] * len(reasons)
    assert len(loaded.plan.notes) == len(reasons)
    assert "4 x a KV cache scale: --activations none" in " ".join(loaded.plan.notes)
    assert "lm_head" not in loaded.params and "bias" not in loaded.params["layers"]["0"]["attn"]["qkv"]


def test_untied_head_is_a_module(tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tie_word_embeddings=False)
    params = load(str(tmp_path), device_put=keep_on_host).params
    np.testing.assert_array_equal(params["lm_head"]["weight"], made.tensors["lm_head.weight"])


def test_zero_biases_of_old_gptq_files(tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tiny.gptq(), c.gptq())
    for name, (n, _) in tiny.linears(made.config).items():
        made.tensors[f"{name}.bias"] = np.zeros(n, np.float16)
    made.save()
    assert load(str(tmp_path), device_put=keep_on_host).plan.notes == (
        "left out: 14 x an all-zero bias of a Linear without bias",
    )
