"""Time and device memory of the quantizers at Llama-3.1-8B's shape: random weights, layer by layer, by stage."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bench.llama8b import LLAMA_3_1_8B
from jqserve.checkpoint.model_config import model_config
from jqserve.checkpoint.names import LinearGroup, modules
from jqserve.models.config import ModelConfig
from jqserve.quantize import awq, compensate
from jqserve.quantize import layer as layer_module
from jqserve.quantize.activations import Activations
from jqserve.quantize.layer import LayerQuantizer, Through
from jqserve.quantize.memory import memory_bound
from jqserve.quantize.options import CHUNK_TOKENS, Options
from jqserve.quantize.source import HostLayer, Part

LAYERS = 32


class Clock:
    """Seconds by stage, device work included: each stage's results are waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            jax.block_until_ready([leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)])
            took = time.perf_counter() - begin
            self.seconds[stage] = self.seconds.get(stage, 0.0) + took
            print(f"  {stage} {took:.2f} s", file=sys.stderr, flush=True)
            return result

        return timed


@contextmanager
def stages(clock: Clock) -> Iterator[None]:
    """The quantizer's own steps, timed."""
    where: list[tuple[Any, str, str]] = [
        (Through, "collect", "inputs and their moments"),
        (Through, "advance", "past the layer"),
        (compensate, "quantize", "gptq solve"),
        (awq, "best_scale", "awq scale search"),
        (awq, "clipped", "awq clipping"),
        (layer_module, "round_to_nearest", "rounding"),
        (layer_module, "linear_report", "error report"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in where]
    for owner, name, stage in where:
        setattr(owner, name, clock.wrap(stage, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def shape(scale: int) -> ModelConfig:
    """Llama-3.1-8B, its sizes divided by `scale`."""
    heads = {"num_attention_heads": 32 // scale, "num_key_value_heads": 8 // scale}
    sizes = {"hidden_size": 4096 // scale, "intermediate_size": 14336 // scale, "vocab_size": 128256 // scale}
    return model_config({**LLAMA_3_1_8B, **heads, **sizes})


def random_layer(config: ModelConfig, index: int) -> HostLayer:
    """bfloat16, normal; norms are ones."""
    rng = np.random.default_rng(index)
    groups = {}
    for module in modules(config):
        if isinstance(module, LinearGroup) and module.path.startswith("layers.0."):
            groups[module.key] = tuple(
                Part(slot, _normal(rng, (slot.n, slot.k), slot.k**-0.5), None, False) for _, slot in module.parts
            )
    ones = np.ones(config.hidden_size, ml_dtypes.bfloat16)
    norms = {"attn_norm": ("input_layernorm.weight", ones), "mlp_norm": ("post_attention_layernorm.weight", ones)}
    return HostLayer(index, groups, norms)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * deviation).astype(ml_dtypes.bfloat16)


def matmul_flops(config: ModelConfig, tokens: int, scheme: str, search_tokens: int) -> dict[str, float]:
    """Floating point operations of one layer's Linears and solvers, by precision: "bf16" (inputs bfloat16), "fp32"."""
    d, f, kv = config.hidden_size, config.ffn_size, config.kv_heads * config.head_dim
    ks = (d, d, d, f)
    qkv, o, gate_up, down = 2 * d * (d + 2 * kv), 2 * d * d, 2 * d * 2 * f, 2 * d * f
    moments = sum(2 * k * k for k in ks)
    factor = sum(k**3 for k in ks)  # Cholesky and a triangular inverse
    update = sum(2 * n * k * k for n, k in ((d + 2 * kv, d), (d, d), (2 * f, d), (d, f)))
    if scheme == "gptq":
        # a pass for the moments of each input, and one past the layer, each from the layer's beginning
        bf16 = tokens * (4 * qkv + 3 * o + 2 * gate_up + down + moments)
        return {"bf16": bf16, "fp32": 2 * factor + 2 * update}
    passes = 2 * (qkv + o + gate_up) + down + moments
    tried = 2 * awq.STEPS
    search = tried * min(tokens, search_tokens) * (qkv + o + gate_up + down)
    return {"bf16": tokens * passes + search, "fp32": tried * update / 2 + 3 * update}


def rate(dtype: Any, size: int) -> float:
    """Operations a second of a square matmul: what the device does at best."""
    a = jnp.ones((size, size), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    product(a).block_until_ready()
    begin = time.perf_counter()
    for _ in range(5):
        result = product(a)
    result.block_until_ready()
    return 5 * 2 * size**3 / (time.perf_counter() - begin)


def measure(scheme: str, layers: int, samples: int, seqlen: int, scale: int) -> list[dict[str, Any]]:
    """A row a layer (the first one compiles), and a row for all 32 by the last one."""
    config = shape(scale)
    cpu = jax.default_backend() == "cpu"
    options = Options(scheme, search_tokens=65536 // scale**2)
    grid = options.grid(options.writer().dtype or config.dtype)
    rng = np.random.default_rng(0)
    per_chunk = max(1, CHUNK_TOKENS // seqlen)
    dtype = np.float32 if cpu else ml_dtypes.bfloat16
    chunk = rng.standard_normal((per_chunk, seqlen, config.hidden_size), np.float32).astype(dtype)
    activations = Activations([np.roll(chunk, i, axis=1) for i in range(max(1, samples // per_chunk))])
    quantizer = LayerQuantizer(config, options, grid, options.writer().dtype)
    size = 8192 // scale
    rates = {"bf16": rate(jnp.bfloat16, size), "fp32": rate(jnp.float32, size)}
    flops = matmul_flops(config, activations.rows, scheme, options.search_tokens)
    rows: list[dict[str, Any]] = []
    for index in range(layers):
        host, clock = random_layer(config, index), Clock()
        begin = time.perf_counter()
        with stages(clock):
            quantizer.run(host, None, activations)
        seconds = time.perf_counter() - begin
        stats = jax.devices()[0].memory_stats() or {}
        row = {
            "layer": index,
            "compiles": index == 0,
            "seconds": round(seconds, 3),
            "stages": {name: round(value, 3) for name, value in clock.seconds.items()},
            "tokens": activations.rows,
            "matmul_tflop": {name: round(value / 1e12, 2) for name, value in flops.items()},
            "matmul_share": round(sum(flops[name] / rates[name] for name in flops) / seconds, 3),
            "peak_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 3),
            "bound_gib": round(memory_bound(config, chunk.shape[0] * chunk.shape[1], chunk.dtype.itemsize) / 2**30, 3),
        }
        print(row, flush=True)
        rows.append(row)
    total = rows[0]["seconds"] + (LAYERS - 1) * rows[-1]["seconds"]
    best = {name: round(value / 1e12, 1) for name, value in rates.items()}
    rows.append({"layers": LAYERS, "seconds": round(total, 1), "matmul_tflops_at_best": best})
    print(rows[-1], flush=True)
    return rows
