"""How well a model predicts a text, and how far its predictions are from another's: perplexity, KL, top-1 agreement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.library import Model, Params

#: Logits on the device at a time, of one model: tokens x vocabulary.
LOGITS = 1 << 27


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Sums over windows, each position kept apart.

    nll        float64 [length - 1]: mean -log p(next token) at each position
    kl         float64 [length - 1]: mean KL(base || model) in nats, or None without a base
    base_nll   the base's nll, or None
    agree      share of positions where both have the same most likely token, or None
    tokens     predictions counted
    """

    nll: np.ndarray
    kl: np.ndarray | None
    base_nll: np.ndarray | None
    agree: float | None
    tokens: int

    @property
    def perplexity(self) -> float:
        return _exp(float(self.nll.mean()))

    @property
    def base_perplexity(self) -> float | None:
        return None if self.base_nll is None else _exp(float(self.base_nll.mean()))

    @property
    def mean_kl(self) -> float | None:
        return None if self.kl is None else float(self.kl.mean())


def _exp(value: float) -> float:
    """A broken model's loss may be beyond what a float's exponential holds."""
    return math.exp(value) if value < 700 else math.inf


def predict(
    model: Model,
    params: Params,
    windows: np.ndarray,
    base: tuple[Model, Params] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """windows int32 [n, length]: the model predicts tokens 1 .. length - 1 of each from those before."""
    count, length = windows.shape
    size = max(1, LOGITS // (length * model.config.vocab_size))
    sums = {name: np.zeros(length - 1) for name in ("nll", "base_nll", "kl", "agree")}
    for begin in range(0, count, size):
        ids = jnp.asarray(windows[begin : begin + size])
        logits = model(params, ids)
        if base is None:
            found: Any = {"nll": _nll(logits, ids)}
        else:
            found = compared_with(log_probabilities(base[0](base[1], ids)), logits, ids)
        for name, values in found.items():
            sums[name] += np.asarray(values, np.float64).sum(axis=0)
        if progress:
            progress(min(begin + size, count), count)
    mean = {name: total / count for name, total in sums.items()}
    if base is None:
        return Prediction(mean["nll"], None, None, None, count * (length - 1))
    agree = float(mean["agree"].mean())
    return Prediction(mean["nll"], mean["kl"], mean["base_nll"], agree, count * (length - 1))


@jax.jit
def log_probabilities(logits: jax.Array) -> jax.Array:
    """Logits [B, S, V] -> log p of the next token at each of the S - 1 positions that have one."""
    return jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)


def _of_next(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]


@jax.jit
def _nll(logits: jax.Array, ids: jax.Array) -> jax.Array:
    return _of_next(log_probabilities(logits), ids)


@jax.jit
def compared_with(p: jax.Array, logits: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
    """p [B, S - 1, V], the base's log probabilities; logits [B, S, V] -> nll, base_nll, kl, agree [B, S - 1]"""
    q = log_probabilities(logits)
    return {
        "nll": _of_next(q, ids),
        "base_nll": _of_next(p, ids),
        "kl": (jnp.exp(p) * (p - q)).sum(axis=-1),
        "agree": (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(jnp.float32),
    }
