"""The library: a checkpoint as (model, params), pure functions of both, and a look inside quantized weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.checkpoint.convert import load as load_checkpoint
from jqserve.checkpoint.hub import resolve
from jqserve.checkpoint.opening import dtype_name
from jqserve.engine.calibrated import open_asked
from jqserve.errors import UnsupportedError
from jqserve.models.build import build
from jqserve.models.config import ModelConfig
from jqserve.models.decoder import Decoder
from jqserve.ops.relayout import place, to_canonical
from jqserve.quant import QuantizedTensor
from jqserve.quant import dequantize as dequantize_canonical

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model without its arrays: every method is a pure function of (params, input), fit for jit, vmap and grad.

    config             shapes and facts of the architecture
    plan               the load plan: one row per module with its scheme, bytes, notes (`print(model.plan.to_text())`)
    generation_config  the checkpoint's sampling defaults

    Gradients flow to activations (`from_embeddings`) and to dense weights; packed weights have none.
    """

    config: ModelConfig
    plan: Any = None
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, params: Params, tokens: jax.Array) -> jax.Array:
        """tokens int32 [S] or [B, S] -> logits float32 [S, V] or [B, S, V], full causal attention from position 0.

        Any integer dtype; S >= 1. Ids outside 0 .. V-1 are clipped, for a jit cannot refuse them; an S beyond
        `config.max_position` is not refused. Raises ValueError for another shape or dtype.
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim not in (1, 2) or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
            found = f"{tokens.dtype} {list(tokens.shape)}"
            raise ValueError(f"tokens: found {found}; expected integers [S] or [B, S], of one token at least")
        return _logits(self.config, params, tokens)

    def embeddings(self, params: Params, tokens: jax.Array) -> jax.Array:
        """tokens int32 [...] -> [..., D] in the model's dtype: the input of `from_embeddings`."""
        return jnp.take(params["embed"]["weight"], jnp.asarray(tokens), axis=0, mode="clip")

    def from_embeddings(self, params: Params, embeddings: jax.Array) -> jax.Array:
        """embeddings [S, D] or [B, S, D] -> logits float32 [..., S, V]; differentiate this with respect to inputs."""
        return _logits_of_embeddings(self.config, params, embeddings)

    def decoder(self, params: Params) -> Decoder:
        """The nnx module over `params`, for use inside a jit: pages, hidden states, single layers."""
        return build(self.config, params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return build(config, params).full(tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits_of_embeddings(config: ModelConfig, params: Params, embeddings: jax.Array) -> jax.Array:
    decoder = build(config, params)
    return decoder.logits(decoder.hidden_states(embeddings))


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    quantization: str | None = None,
    calibration: str | None = None,
    activations: Literal["config", "none"] = "config",
    revision: str | None = None,
    layout: Literal["kernel", "canonical"] = "kernel",
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Loads a checkpoint directory (or a .gguf file, a Hub id from the local cache, or a `jqserve convert` directory).

    Args:
      dtype: "float32", "bfloat16" or "float16" (or jnp's) for everything unquantized and for activations; None: the
        checkpoint's.
      quantization: quantizes an unquantized checkpoint while it loads: "fp8", "int4", ... or "torchao:int4wo-128", ...
        (docs/quantization-flags.md).
      calibration: text for quantization "awq" and "gptq" (.txt, .jsonl, .npy of ids); None: a small built-in one.
      activations: "none" leaves activations unquantized whatever the checkpoint asks, to look at the weights alone.
      revision: of a Hub id.
      progress: called with (modules done, modules in all, the path just done); where it calibrates, with layers first.
      layout: "kernel" rearranges each weight for this device's kernels; "canonical" keeps the documented packing.

    Returns (model, params): params is the parameter tree, a nested dict whose weights are arrays [N out, K in] or
    QuantizedTensors. Raises CheckpointError or UnsupportedError.
    """
    if layout not in ("kernel", "canonical"):
        raise UnsupportedError(f"layout {layout!r} is not supported; supported: kernel, canonical")
    source, quantization = open_asked(resolve(str(path), revision), quantization, calibration, progress=progress)
    loaded = load_checkpoint(
        source,
        dtype=dtype_name(dtype),
        activations=activations,
        quantization=quantization,
        device_put=place if layout == "kernel" else jax.device_put,
        progress=progress,
    )
    return Model(loaded.config, loaded.plan, loaded.generation_config), loaded.params


def dequantize(tensor: QuantizedTensor | jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix W [N, K] of a weight in any layout, in its original column order; a dense array is just cast.

    dtype is a float's: integers would cut nearly every weight to 0. Raises ValueError for another.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: found {jnp.dtype(dtype).name}; expected a float's, for instance float32")
    if not isinstance(tensor, QuantizedTensor):
        return jnp.asarray(tensor, dtype)
    return dequantize_canonical(to_canonical(tensor), dtype)


def logits(model: Model, params: Params, tokens: Any) -> np.ndarray:
    """tokens int [S] -> float32 [S, V] on the host. Pads S to a bucket, so that prompts of many lengths compile few
    programs; `model(params, tokens)` is the plain function."""
    return np.asarray(model(params, _pad(tokens, len(tokens))))[: len(tokens)]


def greedy(model: Model, params: Params, prompt: Any, steps: int) -> np.ndarray:
    """The `steps` tokens that follow prompt int [S] by argmax, whatever the EOS -> int32 [steps].

    Raises ValueError for a prompt of no token.

    Every step computes the whole padded sequence again with the program of `logits`: exact, simple, and only meant
    for comparisons. `jqserve.Engine` generates properly.
    """
    if not len(prompt):
        raise ValueError("prompt: it is empty; at least one token is needed")
    tokens = _pad(prompt, len(prompt) + steps)
    for position in range(len(prompt), len(prompt) + steps):
        tokens = _append(tokens, model(params, tokens), position)
    return np.asarray(tokens)[len(prompt) : len(prompt) + steps]


@jax.jit
def _append(tokens: jax.Array, logits: jax.Array, position: int) -> jax.Array:
    return tokens.at[position].set(jnp.argmax(logits[position - 1]).astype(tokens.dtype))


def _pad(tokens: Any, least: int) -> jax.Array:
    """Zeros up to a multiple of 64 that is at least `least`: causality makes padding at the end harmless."""
    padded = np.zeros(-(-least // 64) * 64, np.int32)
    padded[: len(tokens)] = np.asarray(tokens)
    return jnp.asarray(padded)
