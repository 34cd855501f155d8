"""Tiny decoders with random weights in any scheme: a config and a canonical parameter tree, no checkpoint needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jqserve.models.config import ModelConfig, RopeConfig
from jqserve.quant import NO_ACTIVATION, ActivationSpec, QuantizedTensor, QuantSpec

FP8_TOKEN = ActivationSpec("dynamic_token", "float8_e4m3fn", 448.0)
INT8_TOKEN = ActivationSpec("dynamic_token", "int8", 127.5)
FP8_STATIC = ActivationSpec("static_tensor", "float8_e4m3fn", 448.0)
FP8_BLOCK = ActivationSpec("dynamic_block", "float8_e4m3fn", 448.0, 128)

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    vocab_size=61,
    hidden_size=64,
    ffn_size=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=24,
    norm_eps=1e-5,
    rope=RopeConfig(),
    max_position=256,
    tied_embeddings=True,
    dtype="float32",
)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How `random_params` stores a weight; `qtype` None is dense."""

    qtype: Any = None
    group: tuple[int, int] = (1, 32)  # (0 or -1 stand for N or K)
    zero: Any = "none"
    activation: ActivationSpec = NO_ACTIVATION
    perm: bool = False


def random_weight(rng: np.random.Generator, n: int, k: int, scheme: Scheme) -> Any:
    """A weight [n, k] of standard deviation about 1/sqrt(k), dense float32 or quantized by `scheme` (no rounding:
    the packed values themselves are random)."""
    if scheme.qtype is None:
        return jnp.asarray(rng.normal(size=(n, k)).astype(np.float32) * k**-0.5)
    gn, gk = (n if scheme.group[0] < 1 else scheme.group[0]), (k if scheme.group[1] < 1 else scheme.group[1])
    spec = QuantSpec(scheme.qtype, (n, k), (gn, gk), scheme.zero, scheme.activation)
    spread = {"uint4": 4.6, "nf4": 0.55, "fp4": 0.5, "int8": 74.0, "uint8": 74.0, "float8_e4m3fn": 1.0}[scheme.qtype]
    scale = (rng.uniform(0.5, 1.5, spec.grid) * k**-0.5 / spread).astype(np.float32)
    if spec.bits == 4:
        q = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    elif scheme.qtype == "float8_e4m3fn":
        q = rng.normal(size=(n, k)).astype(ml_dtypes.float8_e4m3fn)
    else:
        q = rng.integers(-128, 128, (n, k)).astype(np.int8).view(scheme.qtype)
    zero = None
    if scheme.zero == "int":
        middle = 8 if scheme.qtype == "uint4" else 128
        zero = jnp.asarray(rng.integers(middle - 3, middle + 3, spec.grid, dtype=np.uint8))
    elif scheme.zero == "offset":
        zero = jnp.asarray((rng.normal(size=spec.grid) * 0.1 * k**-0.5).astype(np.float32))
    static = scheme.activation.kind == "static_tensor"
    return QuantizedTensor(
        qvalue=jnp.asarray(q),
        scale=jnp.asarray(scale),
        zero_point=zero,
        perm=jnp.asarray(rng.permutation(k).astype(np.int32)) if scheme.perm else None,
        input_scale=jnp.full((1, 1), 4.0 / 448, jnp.float32) if static else None,
        spec=spec,
    )


def random_params(config: ModelConfig, scheme: Scheme = Scheme(), *, fused: bool = True, seed: int = 0) -> dict:
    """A canonical parameter tree for `config`: biases, q/k norms and an own head as the config says."""
    rng = np.random.default_rng(seed)
    hidden, heads, kv = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim

    def linear(n: int, k: int, bias: bool = False) -> dict[str, Any]:
        entry = {"weight": random_weight(rng, n, k, scheme)}
        if bias:
            entry["bias"] = jnp.asarray(rng.normal(size=n).astype(np.float32) * 0.3)
        return entry

    def norm(size: int) -> dict[str, Any]:
        return {"weight": jnp.asarray(rng.uniform(0.5, 1.5, size).astype(np.float32))}

    def layer() -> dict[str, Any]:
        if fused:
            attn = {"qkv": linear(heads + 2 * kv, hidden, config.qkv_bias)}
            mlp = {"gate_up": linear(2 * config.ffn_size, hidden, config.mlp_bias)}
        else:
            attn = {name: linear(n, hidden, config.qkv_bias) for name, n in (("q", heads), ("k", kv), ("v", kv))}
            mlp = {name: linear(config.ffn_size, hidden, config.mlp_bias) for name in ("gate", "up")}
        attn["o"] = linear(hidden, heads, config.o_bias)
        mlp["down"] = linear(hidden, config.ffn_size, config.mlp_bias)
        if config.qk_norm:
            attn |= {"q_norm": norm(config.head_dim), "k_norm": norm(config.head_dim)}
        return {"attn_norm": norm(hidden), "attn": attn, "mlp_norm": norm(hidden), "mlp": mlp}

    params = {
        "embed": {"weight": jnp.asarray(rng.normal(size=(config.vocab_size, hidden)).astype(np.float32))},
        "layers": {str(i): layer() for i in range(config.layers)},
        "final_norm": norm(hidden),
    }
    if not config.tied_embeddings:
        params["lm_head"] = {"weight": random_weight(rng, config.vocab_size, hidden, Scheme())}
    return params
