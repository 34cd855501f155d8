"""Unquantized cases, saved by transformers. Arguments: `new` (transformers 5) or `old` (transformers 4.51).

A file of the new version says `dtype`, `rope_parameters`, `layer_types`; one of the old `torch_dtype`, `rope_theta`,
`rope_scaling`.
"""

from __future__ import annotations

import json
import shutil
import sys

import torch
from tiny import DENSE_SHAPE, WORK, finish, make_model, versions

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def plain(theta: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


LONG = [96, 17, 9, 5]
FULL = {"layer_types": ["full_attention"] * 2}
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def save(name, model, scheme, max_shard_size="5GB", lengths=None, config_edit=None, without=None) -> None:
    """`without`: config attributes of a reader that misses the point of the case; its error goes to meta.json."""
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if config_edit is not None:
        config = json.loads((folder / "config.json").read_text())
        config_edit(config)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dense = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        dense.pop("lm_head.weight")
    meta = {"tool": "transformers", "scheme": scheme, "versions": versions()}
    extra = {"prompt_lengths": lengths, "without": without}
    finish(name, folder, dense, meta | {key: value for key, value in extra.items() if value})


def make_new() -> None:
    two = DENSE_SHAPE | {"num_hidden_layers": 2}
    llama3 = {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    untied, tied = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
    save("dense-fp16-untied", make_model("llama", FLOAT16, 1, **DENSE_SHAPE, **untied), "fp16, untied head")
    save("dense-fp32-tied", make_model("llama", FLOAT32, 2, **DENSE_SHAPE, **tied), "fp32, tied head")
    bias = make_model("llama", BFLOAT16, 3, **DENSE_SHAPE, **tied, attention_bias=True, mlp_bias=True)
    save("dense-bf16-llama-bias", bias, "bf16, biases on every Linear of attention and MLP")
    rope = make_model("llama", BFLOAT16, 4, **DENSE_SHAPE, **tied, **llama3)
    save("dense-bf16-llama3-rope", rope, "bf16, llama3 rope scaling", lengths=LONG, without=plain(500000.0))
    window = make_model("mistral", BFLOAT16, 5, **two, **untied, sliding_window=13)
    save(
        "dense-bf16-mistral-window", window, "bf16, sliding window 13 in every layer", without={"sliding_window": None}
    )
    mixed = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}
    qwen2_shape = two | {"head_dim": 16, "hidden_size": 64}
    save(
        "dense-bf16-qwen2-window",
        make_model("qwen2", BFLOAT16, 6, **qwen2_shape, **tied, **mixed),
        "bf16, qkv bias, layer_types: full attention, then a window of 11",
        without=FULL,
    )
    save(
        "dense-bf16-qwen3",
        make_model("qwen3", BFLOAT16, 7, **(DENSE_SHAPE | {"head_dim": 24}), **tied),
        "bf16, qk-norm",
    )
    sharded = make_model("llama", BFLOAT16, 8, **DENSE_SHAPE, **untied)
    save("dense-bf16-sharded", sharded, "bf16, shards with an index", max_shard_size="40KB")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    model = make_model("qwen3", BFLOAT16, 12, **DENSE_SHAPE, **tied, rope_parameters=yarn)
    save("dense-bf16-yarn", model, "bf16, yarn rope scaling", lengths=LONG, without=plain(10000.0))


def make_old() -> None:
    two = DENSE_SHAPE | {"num_hidden_layers": 2}
    tied = {"tie_word_embeddings": True}
    rope = make_model("llama", BFLOAT16, 9, **DENSE_SHAPE, **tied, rope_theta=500000.0, rope_scaling=dict(LLAMA3))
    save("dense-old-llama3-rope", rope, "bf16, llama3 rope_scaling", lengths=LONG, without=plain(500000.0))

    def oldest(config: dict) -> None:
        config["rope_scaling"] = {"type": "linear", "factor": 4.0}

    linear = {"rope_theta": 25000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    model = make_model("llama", FLOAT16, 10, **DENSE_SHAPE, **tied, **linear)
    scheme = 'fp16, rope_scaling {"type": "linear"}, as in 2023'
    save("dense-old-linear-rope", model, scheme, config_edit=oldest, without=plain(25000.0))
    mixed = {"sliding_window": 11, "max_window_layers": 1}
    model = make_model("qwen2", BFLOAT16, 11, **two, **tied, **mixed, use_sliding_window=True)
    save("dense-old-qwen2-window", model, "bf16, window 11 from layer 1 on, no layer_types", without=FULL)
    model = make_model("qwen2", BFLOAT16, 13, **DENSE_SHAPE, **tied, **mixed, use_sliding_window=False)

    def off(config: dict) -> None:
        config["sliding_window"] = 11  # transformers writes null; the files on the Hub keep a number here

    scheme, window = "bf16, a window that use_sliding_window switches off", ["sliding_attention"]
    without = {"layer_types": window, "sliding_window": 11}
    save("dense-old-qwen2-window-off", model, scheme, config_edit=off, without=without)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"new": make_new, "old": make_old}[sys.argv[1]]()
