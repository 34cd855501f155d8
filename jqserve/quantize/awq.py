"""AWQ (Lin et al., arXiv:2306.00978): channels that see large activations are scaled up before rounding, by the power
of their mean that loses least, and the range of each group is clipped where that helps.

A scale is tried by what it does to the output: of attention for q, k, v and of the MLP for gate, up, over a sample of
the tokens; of the Linear itself for o and down, there over all tokens, by their second moment H:
|x dW^T|^2 = tr(dW H dW^T). Clipping uses H as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqserve.models.config import ModelConfig
from jqserve.quantize import block
from jqserve.quantize.block import Layer
from jqserve.quantize.compiled import compiled
from jqserve.quantize.fold import shared
from jqserve.quantize.grid import Grid
from jqserve.quantize.host import Kept, fetch
from jqserve.quantize.on_grid import decode, encode, scales_of, span_of, spread
from jqserve.quantize.pace import Pace, in_steps

HIGHEST = lax.Precision.HIGHEST
#: Exponents tried: i / STEPS for i < STEPS, as AutoAWQ does.
STEPS = 20
#: Ranges tried when clipping: 1 - i / STEPS for i < CLIPS.
CLIPS = 10


def candidates(weight: jax.Array, mean: jax.Array, grid: Grid) -> list[jax.Array]:
    """Scales [K] to try, 1 first: x^r / w^(1 - r) (AutoAWQ's duo scaling) and x^r, where x [K] is the mean |input|
    and w the mean of |W| relative to the largest of its group; each divided by sqrt(max * min)."""
    n, k = weight.shape
    size = jnp.abs(weight)
    extent = grid.extent(n, k)
    largest = spread(span_of(size, extent)[1], extent, n, k)
    of_weight = (size / (largest + 1e-6)).mean(axis=0)
    found = [jnp.ones(k, jnp.float32)]
    for i in range(STEPS):
        ratio = i / STEPS
        power = mean**ratio
        duo = power / (of_weight ** (1 - ratio) + 1e-4)
        found += [_centred(duo)] if i == 0 else [_centred(duo), _centred(power)]
    return found


def _centred(scale: jax.Array) -> jax.Array:
    scale = jnp.maximum(scale, 1e-4)
    scale = scale / jnp.sqrt(scale.max() * scale.min())
    return jnp.where(jnp.isfinite(scale), scale, 1.0)


@functools.partial(compiled, static_argnums=0)
def requantized(grid: Grid, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """What is left of W [N, K] when W * s is rounded and divided by s again."""
    return _rounded(grid, weight * scale[None, :]) / scale[None, :]


def _rounded(grid: Grid, weight: jax.Array) -> jax.Array:
    n, k = weight.shape
    extent = grid.extent(n, k)
    scale, zero = (spread(table, extent, n, k) for table in scales_of(*span_of(weight, extent), grid))
    return decode(encode(weight, scale, zero, grid), scale, zero)


@compiled
def lost(weight: jax.Array, other: jax.Array, hessian: jax.Array) -> jax.Array:
    """float32 [N]: the mean square error of each output when `other` stands in for `weight` [N, K]."""
    difference = weight - other
    return (jnp.matmul(difference, hessian, precision=HIGHEST) * difference).sum(axis=1)


def best_scale(
    config: ModelConfig,
    window: int | None,
    grid: Grid,
    layer: Layer,
    group: str,
    mean: jax.Array,
    hessian: Kept,
    sample: Sequence[Any],
) -> jax.Array:
    """s [K] for the input of `group`. mean [K] of its absolute values, hessian [K, K]: its second moment; sample:
    chunks of the residual stream [B, S, D] that enters the attention (qkv) or the MLP (gate_up)."""
    weight = layer[group].astype(jnp.float32)
    tried = [shared(config, group, s) for s in candidates(weight, shared(config, group, mean), grid)]
    losses: list[jax.Array] = []
    pace = Pace()  # each try holds a weight of its own
    if group in ("qkv", "gate_up"):
        references = in_steps(lambda h: _reference(config, window, group, layer, h), sample)
        for scale in tried:
            other = {**layer, group: requantized(grid, weight, scale).astype(layer[group].dtype)}
            parts = [_loss(config, window, group, other, h, y) for h, y in zip(sample, references)]
            losses.append(sum(parts[1:], parts[0]))
            pace.step(losses[-1])
    else:
        second = fetch(hessian)
        for scale in tried:
            losses.append(lost(weight, requantized(grid, weight, scale), second).sum())
            pace.step(losses[-1])
    values = np.asarray(jnp.stack(losses))
    return tried[int(np.argmin(np.where(np.isfinite(values), values, np.inf)))]


def _output(config: ModelConfig, window: int | None, group: str, layer: Layer, h: Any) -> jax.Array:
    h = jnp.asarray(h)
    if group == "qkv":
        mixed, _ = block.attend(config, window, layer, block.norm(h, layer["attn_norm"], config.norm_eps))
        return block.project(layer, "o", mixed)
    return block.project(layer, "down", block.gated(layer, block.norm(h, layer["mlp_norm"], config.norm_eps)))


_reference = compiled(_output, static_argnums=(0, 1, 2))


@functools.partial(compiled, static_argnums=(0, 1, 2))
def _loss(config: ModelConfig, window: int | None, group: str, layer: Layer, h: Any, reference: jax.Array) -> jax.Array:
    difference = (_output(config, window, group, layer, h) - reference).astype(jnp.float32)
    return jnp.sum(difference * difference)


@functools.partial(compiled, static_argnums=0)
def clipped(grid: Grid, weight: jax.Array, hessian: jax.Array) -> jax.Array:
    """W [N, K] with each group held to the range, among CLIPS, whose rounding loses least of that group's own part of
    the output."""
    n, k = weight.shape
    columns = grid.extent(n, k)[1]
    groups = k // columns
    tiles = weight.reshape(n, groups, columns)
    of_group = jnp.stack(
        [hessian[i * columns : (i + 1) * columns, i * columns : (i + 1) * columns] for i in range(groups)]
    )
    full = jnp.abs(tiles).max(axis=2)

    def attempt(i: jax.Array, state: tuple) -> tuple:
        least, bound = state
        limit = full * (1 - i / STEPS)
        held = jnp.clip(tiles, -limit[..., None], limit[..., None])
        error = tiles - _rounded(grid, held.reshape(n, k)).reshape(tiles.shape)
        loss = (jnp.einsum("ngi,gij->ngj", error, of_group, precision=HIGHEST) * error).sum(axis=2)
        better = loss < least
        return jnp.where(better, loss, least), jnp.where(better, limit, bound)

    _, bound = lax.fori_loop(0, CLIPS, attempt, (jnp.full((n, groups), jnp.inf), full))
    return jnp.clip(tiles, -bound[..., None], bound[..., None]).reshape(n, k)
