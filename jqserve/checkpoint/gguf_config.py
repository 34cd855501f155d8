"""GGUF's fields -> what config.json would say, and ggml's tensor names -> Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.checkpoint.fields import Fields
from jqserve.errors import UnsupportedError

#: general.architecture -> (Hugging Face's architecture, model_type)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: config.json's key -> the Linears of a layer that have a bias together.
BIASES = {
    "attention_bias": frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    "mlp_bias": frozenset({"gate_proj", "up_proj", "down_proj"}),
}
#: Fields that change yarn, behind "rope.scaling." -> config.json's key; None where it has none of that meaning.
YARN: dict[str, str | None] = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
YARN |= dict.fromkeys(("attn_factor", "yarn_attn_factor", "yarn_ext_factor"))
ROPE_FACTORS = "rope_freqs.weight"
#: llama.cpp's token type of what is no text, and the names under which Llama 3 and Qwen have ends among such tokens.
CONTROL = 3
ENDS = frozenset({"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>"})
#: Llama 3.1 and 3.2 as Meta scales their rotary frequencies; a GGUF holds only the factors that follow.
LLAMA3 = [{"factor": f, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192} for f in (8.0, 32.0)]


def hf_name(name: str) -> str | None:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; None for a name that has no counterpart."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _INSIDE:
        return None
    return f"model.layers.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"


def config_json(
    where: str, raw: Mapping[str, Any], rows: int, tied: bool, factors: np.ndarray | None, biased: frozenset[str]
) -> dict[str, Any]:
    """rows: of the embedding; factors: float32 [Dh/2] of rope_freqs, where the file has them; biased: which of a
    layer's Linears have a bias, "q_proj", ...: no field says so.

    Raises UnsupportedError for what the dense decoder does not do, CheckpointError for fields that make no sense.
    """
    fields = Fields(dict(raw), where)
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise fields.unsupported("general.architecture", ", ".join(ARCHITECTURES))
    a = architecture
    if fields.integer("split.count", 1, minimum=0) > 1:
        raise fields.unsupported("split.count", "1: join the parts with `llama-gguf-split --merge FIRST OUT.gguf`")
    for key in (f"{a}.expert_count", f"{a}.attention.sliding_window"):
        if fields.data.get(key):
            raise fields.unsupported(key, "0 (no experts, no sliding window in a GGUF)")
    hidden, heads = fields.integer(f"{a}.embedding_length"), fields.integer(f"{a}.attention.head_count")
    if hidden % heads and fields.data.get(f"{a}.attention.key_length") is None:
        raise fields.error(f"{a}.embedding_length", f"a multiple of {heads} heads")
    head_dim = fields.integer(f"{a}.attention.key_length", hidden // heads)
    rotated = fields.integer(f"{a}.rope.dimension_count", head_dim)
    if rotated != head_dim or fields.integer(f"{a}.attention.value_length", head_dim) != head_dim:
        raise fields.unsupported(f"{a}.rope.dimension_count", f"{head_dim}: the whole head, and values as wide as keys")
    names, kind = ARCHITECTURES[a], fields.data.get("general.file_type")
    config: dict[str, Any] = {
        "architectures": [names[0]],
        "model_type": names[1],
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": fields.integer(f"{a}.feed_forward_length"),
        "num_hidden_layers": fields.integer(f"{a}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer(f"{a}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer(f"{a}.context_length"),
        "rms_norm_eps": fields.number(f"{a}.attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number(f"{a}.rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        "dtype": {0: "float32", 1: "float16"}.get(kind if isinstance(kind, int) else -1, "bfloat16"),
    }
    for ours, theirs in (("bos", "bos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = fields.data.get(f"tokenizer.ggml.{theirs}_token_id")
    config["eos_token_id"] = _ends(fields)
    config |= _biases(fields, names[1], biased)
    scaling = _scaling(fields, a, config, factors)
    return {**config, "rope_scaling": scaling} if scaling else config


def _biases(fields: Fields, model_type: str, biased: frozenset[str]) -> dict[str, bool]:
    """What config.json has where a bias is a choice: llama.cpp's "llama" covers models with and without."""
    if model_type == "qwen2":  # always in q, k and v
        return {}
    found = {}
    for key, inside in BIASES.items():
        found[key] = bool(biased & inside)
        if found[key] and not biased >= inside:
            some, rest = (", ".join(sorted(names)) for names in (biased & inside, inside - biased))
            raise UnsupportedError(
                f"{fields.where}: {some} have a bias, {rest} none; supported in {model_type}: all of them or none"
            )
    return found


def _ends(fields: Fields) -> list[int] | None:
    """The ids that end an answer. eos is often the end of a text alone, after which a chat would go on for ever: as in
    llama.cpp, the ends of a turn and of a message count too, by their fields and by the names of control tokens."""
    tokens, kinds = (fields.data.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    named = [fields.integer(f"tokenizer.ggml.{key}_token_id", -1, minimum=-1) for key in ("eos", "eot", "eom")]
    if isinstance(tokens, list) and isinstance(kinds, list) and len(kinds) == len(tokens):
        named += [i for i, token in enumerate(tokens) if kinds[i] == CONTROL and token in ENDS]
    return list(dict.fromkeys(i for i in named if i >= 0)) or None


def _scaling(fields: Fields, a: str, config: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    """As llama.cpp reads it: a factor without a type is linear, and early files call it rope.scale_linear."""
    factor = fields.number(f"{a}.rope.scaling.factor", fields.number(f"{a}.rope.scale_linear", None))
    kind = fields.text(f"{a}.rope.scaling.type", "none" if factor in (None, 0.0, 1.0) else "linear")
    if factors is not None:
        if kind != "none":
            raise fields.unsupported(f"{a}.rope.scaling.type", f"none beside {ROPE_FACTORS}, which scales already")
        return _llama3(fields, config, factors)
    if kind == "none":
        return None
    if factor is None:
        raise fields.error(f"{a}.rope.scaling.factor", f"a number, as the type is {kind}")
    original = fields.data.get(f"{a}.rope.scaling.original_context_length")
    if kind not in ("linear", "yarn"):
        raise fields.unsupported(f"{a}.rope.scaling.type", "none, linear, yarn")
    more = {"original_max_position_embeddings": original} if original else {}
    for key, ours in YARN.items() if kind == "yarn" else ():
        found = fields.number(f"{a}.rope.scaling.{key}", None)
        if found is None:
            continue
        if ours is None:
            raise fields.unsupported(f"{a}.rope.scaling.{key}", "yarn's usual magnitude")
        more[ours] = found
    return {"rope_type": kind, "factor": factor, **more}


def _llama3(fields: Fields, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The llama3 parameters that give these factors, by the formula of transformers' _compute_llama3_parameters."""
    dim = config["head_dim"]
    frequency = config["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    for known in LLAMA3:
        turns = known["original"] * frequency / (2 * np.pi)
        keep = np.clip(
            (turns - known["low_freq_factor"]) / (known["high_freq_factor"] - known["low_freq_factor"]), 0, 1
        )
        expected = 1 / (keep + (1 - keep) / known["factor"])
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            rest = {key: value for key, value in known.items() if key != "original"}
            return {"rope_type": "llama3", "original_max_position_embeddings": known["original"], **rest}
    raise UnsupportedError(
        f"{fields.where}: {ROPE_FACTORS}: its factors are not those of Llama 3.1 or 3.2; supported: these, linear, yarn"
    )
