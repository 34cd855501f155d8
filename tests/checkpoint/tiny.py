"""Tiny checkpoints in every format, made from known codes: the packers are loops from FORMATS.md, not product code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoint import files

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
Tensors = dict[str, np.ndarray]
Maker = Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]  # (rng, n, k) -> (tensors, W float32)


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    d, f = config["hidden_size"], config["intermediate_size"]
    dh = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * dh, config["num_key_value_heads"] * dh
    shapes = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}


def pack(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned fields -> int32 words, the low bits first, along `axis`; the tail is padded with zero bits.

    3 bits: 32 fields in three words, without gaps.
    """
    per = 32 // bits
    values = np.moveaxis(values.astype(np.uint64), axis, 0)
    if bits == 3:
        stream = np.stack([values >> np.uint64(i) & np.uint64(1) for i in range(3)], axis=1).reshape(
            -1, values.shape[1]
        )
        words = np.packbits(stream.astype(np.uint8), axis=0, bitorder="little")  # [4 * words, ...] bytes
        words = np.ascontiguousarray(words.T).view(np.int32).T
        return np.ascontiguousarray(np.moveaxis(words, 0, axis))
    short = -len(values) % per
    values = np.concatenate([values, np.zeros((short, *values.shape[1:]), np.uint64)])
    words = np.zeros((len(values) // per, *values.shape[1:]), np.uint64)
    for i in range(per):
        words |= values[i::per] << np.uint64(bits * i)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis))


def dense(rng: np.random.Generator, n: int, k: int, dtype: Any = ml_dtypes.bfloat16) -> tuple[Tensors, np.ndarray]:
    w = rng.normal(0, 0.05, (n, k)).astype(dtype)
    return {"weight": w}, w.astype(np.float32)


def gptq(
    bits: int = 4, group: int = 128, sym: bool = True, desc_act: bool = False, v2: bool = False, g_idx: str = "yes"
) -> Maker:
    """Asymmetric zeros include 0 in a quarter of the fields: v1's word-wise subtraction borrows there."""

    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        size = k if group == -1 else group
        groups = -(-k // size)
        q = rng.integers(0, 1 << bits, (k, n))
        z = np.full((groups, n), 1 << (bits - 1))
        if not sym:
            z = rng.integers(0, 1 << bits, (groups, n)) * (rng.random((groups, n)) > 0.25)
        s = rng.uniform(0.001, 0.02, (groups, n)).astype(np.float16)
        index = np.arange(k) // size
        if desc_act:
            index = np.random.default_rng(k).permutation(index)  # the same for q, k and v, as in real files
        words = pack(z if v2 or bits != 3 else (z - 1) % 8, bits, 1).view(np.uint32)
        if not v2 and bits != 3:
            words = words - np.uint32(sum(1 << (bits * i) for i in range(32 // bits)))
        tensors = {"qweight": pack(q, bits, 0), "qzeros": words.view(np.int32), "scales": s}
        if g_idx == "yes":
            tensors["g_idx"] = index.astype(np.int32)
        elif g_idx == "minus one":
            tensors["g_idx"] = np.full(k, -1, np.int32)
        return tensors, ((q - z[index]).astype(np.float32) * s.astype(np.float32)[index]).T

    return make


def awq(group: int = 128) -> Maker:
    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        size = k if group == -1 else group
        q, z = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // size, n))
        s = rng.uniform(0.001, 0.02, (k // size, n)).astype(np.float16)
        order = np.arange(n).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
        tensors = {"qweight": pack(q[:, order], 4, 1), "qzeros": pack(z[:, order], 4, 1), "scales": s}
        index = np.arange(k) // size
        return tensors, ((q - z[index]).astype(np.float32) * s.astype(np.float32)[index]).T

    return make


def packed(bits: int = 4, group: int | None = 128, sym: bool = True, actorder: bool = False) -> Maker:
    """compressed-tensors pack-quantized; group None: a scale a channel."""

    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        half, size = 1 << (bits - 1), group or k
        groups = k // size
        q = rng.integers(-half, half, (n, k))
        z = np.zeros((n, groups), np.int64) if sym else rng.integers(-half, half, (n, groups))
        s = rng.uniform(0.001, 0.02, (n, groups)).astype(ml_dtypes.bfloat16)
        index = np.arange(k) // size
        if actorder:
            index = np.random.default_rng(k).permutation(index)
        tensors = {
            "weight_packed": pack(q + half, bits, 1),
            "weight_scale": s,
            "weight_shape": np.array([n, k], np.int64),
        }
        if not sym:
            tensors["weight_zero_point"] = pack(z + half, bits, 0)
        if actorder:
            tensors["weight_g_idx"] = index.astype(np.int32)
        return tensors, (q - z[:, index]).astype(np.float32) * s.astype(np.float32)[:, index]

    return make


def eight(
    kind: str = "float",
    shape: str = "channel",
    static: bool = False,
    scale_name: str = "weight_scale",
    sym: bool = True,
) -> Maker:
    """float8 or int8 bytes; `shape` of the scale: channel [N, 1], tensor [1], scalar (), or group (128 of K)."""

    def make(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, np.ndarray]:
        q: np.ndarray = rng.integers(-128, 128, (n, k)).astype(np.int8)
        if kind == "float":
            q = rng.normal(0, 100, (n, k)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        shapes: dict[str, tuple[int, ...]] = {"channel": (n, 1), "tensor": (1,), "scalar": (), "group": (n, k // 128)}
        dtype = np.float32 if shape == "scalar" else ml_dtypes.bfloat16
        s = np.asarray(rng.uniform(1e-4, 1e-3, shapes[shape])).astype(dtype)
        tensors = {"weight": q, scale_name: s}
        zero = np.zeros(shapes[shape], np.int8)
        if not sym:
            zero = tensors["weight_zero_point"] = rng.integers(-128, 128, shapes[shape]).astype(np.int8)
        if static:
            tensors["input_scale"] = np.full(shapes[shape] if shape in ("tensor", "scalar") else (1,), 0.02, dtype)
        wide, zeros = s.astype(np.float32), zero.astype(np.float32)
        if shape == "group":
            wide, zeros = wide.repeat(128, 1), zeros.repeat(128, 1)
        return tensors, (q.astype(np.float32) - zeros) * wide

    return make


@dataclasses.dataclass
class Tiny:
    """A checkpoint directory, its tensors, and the true W [N, K] of every Linear."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    weights: dict[str, np.ndarray]

    def save(self) -> Tiny:
        """Writes `config` and `tensors` as they stand now."""
        (self.path / "config.json").write_text(json.dumps(self.config))
        files.write(self.path / "model.safetensors", self.tensors)
        return self


def make(
    path: Path, maker: Maker = dense, quantization: dict[str, Any] | None = None, *, seed: int = 0, **changes: Any
) -> Tiny:
    """A two-layer Llama whose Linears come from `maker`; `changes` override config fields."""
    rng = np.random.default_rng(seed)
    config = {**CONFIG, **changes}
    if quantization is not None:
        config["quantization_config"] = quantization
    d, bf16 = config["hidden_size"], ml_dtypes.bfloat16
    tensors: Tensors = {"model.embed_tokens.weight": rng.normal(0, 0.05, (config["vocab_size"], d)).astype(bf16)}
    weights = {}
    for name, (n, k) in linears(config).items():
        made, weights[name] = maker(rng, n, k)
        tensors |= {f"{name}.{suffix}": array for suffix, array in made.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    for name in [f"model.layers.{i}.{x}" for i in range(config["num_hidden_layers"]) for x in norms] + ["model.norm"]:
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, d).astype(bf16)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = rng.normal(0, 0.05, (config["vocab_size"], d)).astype(bf16)
    path.mkdir(parents=True, exist_ok=True)
    return Tiny(path, config, tensors, weights).save()
