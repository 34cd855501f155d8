"""config.json -> `ModelConfig`, for the architectures of the dense decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.rope_config import rope_config
from jqserve.models.config import ModelConfig

#: architecture -> model_type
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("bfloat16", "float16", "float32")
#: What transformers' configuration classes take where the key is absent; null means none.
ABSENT_WINDOW = 4096  # Mistral, Qwen2, Qwen3
ABSENT_HEAD_DIM = {"qwen3": 128}  # the others: hidden_size / num_attention_heads


def model_config(
    config_json: dict[str, Any], generation_config: dict[str, Any] | None = None, where: str = "config.json"
) -> ModelConfig:
    """The facts of the model. EOS and the like come from generation_config.json where it has them.

    Raises UnsupportedError for an architecture, an activation or a rope type that is not built, CheckpointError for
    numbers that contradict each other; both name the key in `where`.
    """
    config = Fields(config_json, where)
    architecture = _architecture(config)
    model_type = ARCHITECTURES[architecture]
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    layers = config.integer("num_hidden_layers", maximum=4096)
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    usual = ABSENT_HEAD_DIM.get(model_type)
    if config.data.get("head_dim") is None and usual is None and hidden % heads:
        raise config.error("hidden_size", f"a multiple of num_attention_heads {heads} (or a head_dim)")
    head_dim = config.integer("head_dim", usual or hidden // heads)
    if head_dim % 2:
        raise config.error("head_dim", "an even number (rotary embedding turns pairs)")
    max_position = config.integer("max_position_embeddings")
    attention_bias = config.flag("attention_bias") if model_type in ("llama", "qwen3") else False
    eps = config.number("rms_norm_eps", 1e-6)
    if not 0 < eps < 1:
        raise config.error("rms_norm_eps", "a small positive number")
    config.one_of("hidden_act", ("silu",), "silu")
    generation = Fields(generation_config or {}, str(Path(where).with_name("generation_config.json")))
    bos, eos, pad = (
        _special_tokens(generation, config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    return ModelConfig(
        architecture=architecture,
        model_type=model_type,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=eps,
        rope=rope_config(config, max_position),
        max_position=max_position,
        tied_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=model_type == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias") if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(config, model_type, layers),
        dtype=_dtype(config),
        bos_token_id=bos[0],
        eos_token_ids=tuple(i for i in eos if i is not None),
        pad_token_id=pad[0],
    )


def _architecture(config: Fields) -> str:
    listed = config.texts("architectures")
    by_type = {v: k for k, v in ARCHITECTURES.items()}
    if len(listed) > 1:
        raise config.unsupported("architectures", "one architecture a checkpoint")
    if listed:
        if listed[0] not in ARCHITECTURES:
            raise config.unsupported("architectures", ", ".join(ARCHITECTURES))
        model_type = config.text("model_type", ARCHITECTURES[listed[0]])
        if model_type != ARCHITECTURES[listed[0]]:
            raise config.error("model_type", f"{ARCHITECTURES[listed[0]]!r}, as architectures says {listed[0]}")
        return listed[0]
    return by_type[config.one_of("model_type", by_type)]


def _sliding_windows(config: Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """One window a layer, None = full attention, by the rules of transformers' configuration classes.

    Llama has none. Mistral's `sliding_window` holds for every layer. Qwen2 and Qwen3 heed it only under
    `use_sliding_window`: in the layers that `layer_types` marks, else in those from `max_window_layers` on.
    """
    if model_type == "llama":
        return (None,) * layers
    window = config.integer("sliding_window", None if "sliding_window" in config.data else ABSENT_WINDOW)
    if model_type != "mistral" and not config.flag("use_sliding_window"):
        window = None
    kinds = config.texts("layer_types")
    if kinds:
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise config.error("layer_types", f"{layers} entries, each full_attention or sliding_attention")
        if window is None and "sliding_attention" in kinds:
            raise config.error("layer_types", "no sliding_attention, as no sliding_window is in force")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = 0 if model_type == "mistral" else config.integer("max_window_layers", 28, minimum=0)
    return tuple(window if i >= first else None for i in range(layers))


def _dtype(config: Fields) -> str:
    """`dtype` (transformers >= 4.56) or `torch_dtype`; "" where the file says nothing: the tensors decide then."""
    key = "dtype" if config.data.get("dtype") is not None else "torch_dtype"
    name = config.text(key, "").removeprefix("torch.")
    if name and name not in DTYPES:
        raise config.unsupported(key, ", ".join(DTYPES))
    return name


def _special_tokens(generation: Fields, config: Fields, key: str) -> tuple[int | None, ...]:
    """generation_config.json has the last word."""
    return _token_ids(config if generation.data.get(key) is None else generation, key)


def _token_ids(config: Fields, key: str) -> tuple[int | None, ...]:
    value = config.data.get(key)
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(
        i is None or (isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31) for i in ids
    ):
        if ids == [-1]:
            return (None,)
        raise config.error(key, "a token id, or a list of them")
    return tuple(ids)
