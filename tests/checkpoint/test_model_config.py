"""config.json in both dialects, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jqserve.checkpoint.model_config import model_config
from jqserve.errors import CheckpointError, JqserveError, UnsupportedError
from jqserve.models.config import ModelConfig, RopeConfig
from tests.checkpoint.tiny import CONFIG

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


def parse(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    config = {**CONFIG, **changes}
    return model_config({k: v for k, v in config.items() if v != "absent"}, generation)


def test_plain_llama() -> None:
    config = parse()
    assert (config.hidden_size, config.ffn_size, config.layers, config.heads) == (128, 256, 2, 4)
    assert (config.kv_heads, config.head_dim, config.vocab_size, config.max_position) == (2, 32, 64, 256)
    assert config.tied_embeddings and config.dtype == "bfloat16" and config.eos_token_ids == (2,)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    assert config.sliding_windows == (None, None)


def test_json_round_trip() -> None:
    config = parse(rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 16}, eos_token_id=[1, 2])
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


ROPE: dict[str, tuple[dict[str, Any], RopeConfig]] = {
    "v4": ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5, original_max_position=256)),
    "v5": (
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        RopeConfig(theta=5e5, original_max_position=256),
    ),
    "v5 beside a v4 leftover": (
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        RopeConfig(theta=5e5, original_max_position=256),
    ),
    "both, and they agree": (
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
    ),
    "none said": ({"rope_theta": "absent"}, RopeConfig(theta=1e4, original_max_position=256)),
    "llama3 v4": ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)),
    "llama3 v5": (
        {"rope_theta": "absent", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
    ),
    "linear, old key": (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        RopeConfig(kind="linear", factor=2.0, original_max_position=256),
    ),
    "dynamic": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        RopeConfig(kind="dynamic", factor=2.0, original_max_position=256),
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1}},
        RopeConfig(kind="yarn", factor=4.0, original_max_position=64, extra=(("mscale", 1.0),)),
    ),
}


@pytest.mark.parametrize("case", ROPE)
def test_rope_in_both_dialects(case: str) -> None:
    changes, expected = ROPE[case]
    assert parse(**changes).rope == expected


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
WINDOWS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "llama has none": ({"sliding_window": 8}, (None, None)),
    "mistral": ({**MISTRAL, "sliding_window": 8}, (8, 8)),
    "mistral without": ({**MISTRAL, "sliding_window": None}, (None, None)),
    "mistral, not said": ({**MISTRAL}, (4096, 4096)),  # as transformers' MistralConfig
    "qwen2, not said": ({**QWEN2, "use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
    "qwen2, not in use": ({**QWEN2, "sliding_window": 8, "use_sliding_window": False}, (None, None)),
    "qwen2, from a layer on": (
        {**QWEN2, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        (None, 8),
    ),
    "qwen3, by layer": (
        {
            **QWEN3,
            "sliding_window": 8,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (8, None),
    ),
    "qwen3, all full": ({**QWEN3, "layer_types": ["full_attention"] * 2, "max_window_layers": 28}, (None, None)),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_sliding_windows(case: str) -> None:
    changes, expected = WINDOWS[case]
    assert parse(**changes).sliding_windows == expected


def test_biases_and_qk_norm() -> None:
    assert parse(attention_bias=True, mlp_bias=True).mlp_bias
    flags = [(c.qkv_bias, c.o_bias, c.qk_norm) for c in (parse(attention_bias=True), parse(**QWEN2), parse(**QWEN3))]
    assert flags == [(True, True, False), (True, False, False), (False, False, True)]


def test_generation_config_has_the_last_word() -> None:
    config = parse({"eos_token_id": [5, 6], "bos_token_id": 3, "pad_token_id": None}, pad_token_id=9)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((5, 6), 3, 9)


def test_the_file_at_fault_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: found '</s>'"):
        parse({"eos_token_id": "</s>"})


def test_head_dim_where_nothing_is_said() -> None:
    assert parse().head_dim == 32 and parse(**QWEN2).head_dim == 32
    assert parse(**QWEN3).head_dim == 128  # as transformers' Qwen3Config, whatever the hidden size


def test_dtype_words() -> None:
    assert parse(torch_dtype="absent", dtype="float16").dtype == "float16"
    assert parse(torch_dtype="torch.float32").dtype == "float32"
    assert parse(torch_dtype="absent").dtype == ""


REFUSED: dict[str, tuple[dict[str, Any], type[JqserveError], tuple[str, ...]]] = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedError, ("GPT2LMHeadModel", "Qwen3ForCausalLM")),
    "model type alone": ({"architectures": None, "model_type": "gemma3"}, UnsupportedError, ("gemma3", "mistral")),
    "type against architecture": ({"model_type": "qwen2"}, CheckpointError, ("model_type", "qwen2", "'llama'")),
    "activation": ({"hidden_act": "gelu"}, UnsupportedError, ("hidden_act", "gelu", "silu")),
    "dtype": ({"torch_dtype": "float64"}, UnsupportedError, ("torch_dtype", "float64", "bfloat16")),
    "rope type": ({"rope_scaling": {"type": "longrope"}}, UnsupportedError, ("longrope", "llama3")),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        UnsupportedError,
        ("rope_parameters",),
    ),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, CheckpointError, ("rope_scaling", "factor", "nothing")),
    "rope theta": ({"rope_theta": -1.0}, CheckpointError, ("rope_theta", "-1.0")),
    "rope in two ways": (
        {
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
            "rope_scaling": {"type": "yarn", "factor": 4.0},
        },
        CheckpointError,
        ("rope_scaling", "'yarn'", "rope_parameters"),
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, UnsupportedError, ("partial_rotary_factor", "0.5")),
    "llama3 without original": (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("orig")}},
        CheckpointError,
        ("original_max_position_embeddings",),
    ),
    "heads": ({"num_key_value_heads": 3}, CheckpointError, ("num_key_value_heads", "3", "divisor")),
    "odd head": ({"head_dim": 33}, CheckpointError, ("head_dim", "33", "even")),
    "hidden size": ({"hidden_size": 130}, CheckpointError, ("hidden_size", "130")),
    "hidden size is text": ({"hidden_size": "128"}, CheckpointError, ("hidden_size", "'128'", "integer")),
    "no layers": ({"num_hidden_layers": 0}, CheckpointError, ("num_hidden_layers", "0")),
    "layers without end": ({"num_hidden_layers": 10**9}, CheckpointError, ("num_hidden_layers",)),
    "missing": ({"vocab_size": "absent"}, CheckpointError, ("vocab_size", "nothing")),
    "epsilon": ({"rms_norm_eps": 5}, CheckpointError, ("rms_norm_eps",)),
    "epsilon is NaN": ({"rms_norm_eps": float("nan")}, CheckpointError, ("rms_norm_eps", "finite")),
    "layer types": ({**QWEN3, "layer_types": ["full_attention"]}, CheckpointError, ("layer_types", "2 entries")),
    "eos": ({"eos_token_id": "</s>"}, CheckpointError, ("eos_token_id", "</s>")),
    "eos without end": ({"eos_token_id": [2, 1 << 40]}, CheckpointError, ("eos_token_id", "token id")),
    "yarn beta": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0}},
        CheckpointError,
        ("beta_fast", "positive"),
    ),
    "yarn theta": (
        {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        CheckpointError,
        ("theta",),
    ),
    "tie is text": ({"tie_word_embeddings": "yes"}, CheckpointError, ("tie_word_embeddings", "true or false")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    changes, kind, words = REFUSED[case]
    with pytest.raises(kind) as caught:
        parse(**changes)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_fixture_configs(fixtures_dir: Path) -> None:
    paths = sorted(fixtures_dir.glob("*/config.json"))
    found = {p.parent.name: model_config(json.loads(p.read_text())) for p in paths}
    assert len(found) >= 20
    assert all(c.rope.theta == 10000.0 and c.head_dim == 64 for c in found.values())
    assert found["arch-mistral-sw-ct-fp8-dynamic"].sliding_windows == (16, 16)
