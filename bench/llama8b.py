"""Checkpoint directories without weights, in the shape of Llama-3.1-8B, for `--load-format dummy`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

#: changes to it that make a model with which a CPU checks a script in seconds
QUICK: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def _weights(bits: int, kind: str, strategy: str, group: int | None = None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "group_size": group,
        "symmetric": True,
        "dynamic": False,
        "actorder": None,
    }


def _compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _token(bits: int, kind: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}


SCHEMES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "fp8": _compressed("float-quantized", _weights(8, "float", "channel"), _token(8, "float")),
    "int8": _compressed("int-quantized", _weights(8, "int", "channel"), _token(8, "int")),
    "w4a16": _compressed("pack-quantized", _weights(4, "int", "group", 128), None),
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    },
}


def make_checkpoint(folder: Path, scheme: str, tokenizer_from: Path | None = None, **changes: Any) -> Path:
    """Writes config.json for `scheme` (a key of SCHEMES) under `folder`; `changes` override its fields."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**LLAMA_3_1_8B, **changes}
    if SCHEMES[scheme] is not None:
        config["quantization_config"] = SCHEMES[scheme]
    if scheme in ("awq", "gptq"):
        config["torch_dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if tokenizer_from is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (tokenizer_from / name).exists():
                shutil.copy(tokenizer_from / name, folder / name)
    return folder
