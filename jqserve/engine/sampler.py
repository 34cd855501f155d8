"""From logits to the next token, on the device, inside the step's jit. Shapes: R rows, V vocabulary.

    l1 = penalised(l)     repetition r over prompt and answer: l/r where l > 0 else l*r (Hugging Face)
                          presence, frequency over the answer: l - presence*[n > 0] - frequency*n (OpenAI)
    l2 = l1 + logit_bias  (and -inf for stop ids while the answer is shorter than min_new_tokens)
    logprobs = log_softmax(l2)
    temperature 0: argmax(l2); else l3 = l2 / temperature, then top-k, top-p (of what top-k left), min-p, and a draw

The draw is argmax(l3 + Gumbel noise), the noise a function of (seed, position) alone: the same request with the same
seed draws the same token alone, in any batch, and after it was preempted and recomputed.

On a CPU parts that no row asks for are skipped by conditionals. On a GPU there are none: see `engine/variant`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqserve.ops.device import current_device

MAX_TOP_LOGPROBS = 20
#: Beyond it a token is not counted on. int16 wraps at 32,767: a step whose rows all hold one token, at most so many
#: (`config.MAX_CHUNK`), must not get there from here. At the least penalty that tells (0.001) it is worth 16 logits.
MAX_COUNT = 2**14
_HIGH_BIT = np.uint32(0x80000000)
_GPU_BITS = 4  # bits of a threshold found per pass over the row: 8 passes of 15 candidates each
_PART = 256  # columns whose weights are summed first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """Sampling parameters of R rows (see `engine/slots` for their meaning) and what the rows have seen.

    All [R] unless said: temperature, top_p, min_p, repetition, presence, frequency float32; top_k int32 (0 = off);
    seed uint32 [R, 2]; position int32: where the sampled token will stand; top_logprobs int32 (-1 = no logprobs);
    bias_ids int32 [R, E] (V and above = none), bias_values float32 [R, E], bias_until int32 [R, E]: the entry holds
    for positions below it; generated int16 [R, V]: how often each token stands in the answer; prompted bool [R, V].
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    top_k: jax.Array
    seed: jax.Array
    position: jax.Array
    top_logprobs: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    bias_until: jax.Array
    generated: jax.Array
    prompted: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """tokens int32 [R] (-1: the logits held NaN); logprob float32 [R], None in the greedy variant; top_ids int32 and
    top float32 [R, 20], None but in the scored one. A program of K > 1 steps puts an axis [K] before each."""

    tokens: jax.Array
    logprob: jax.Array | None = None
    top_ids: jax.Array | None = None
    top: jax.Array | None = None


def greedy(logits: jax.Array) -> Sampled:
    """The variant of steps in which nobody asked for more: logits float32 [R, V]."""
    return Sampled(_argmax(logits))


def _argmax(logits: jax.Array) -> jax.Array:
    """int32 [R]; -1 for a row with NaN, so that the engine ends that request instead of emitting noise."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the first NaN, when there is one
    return jnp.where(jnp.isnan(jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]), -1, best)


def sample(logits: jax.Array, params: RowParams, *, scored: bool = True, plain: bool = False) -> Sampled:
    """logits float32 [R, V]; greedy rows (temperature 0) give what `greedy` gives unless penalties or biases say so.

    `scored`: with the most likely tokens and their logprobs. `plain`: no row has a penalty, a bias or less than all
    tokens to draw from, which saves most of the work.
    """
    if not plain:
        logits = biased(penalised(logits, params), params)
    greedy_tokens = _argmax(logits)
    drawn = _if_any(params.temperature > 0, lambda: _draw(logits, params, plain), lambda: greedy_tokens)
    tokens = jnp.where((params.temperature > 0) & (greedy_tokens >= 0), drawn, greedy_tokens)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    logprob = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total
    if not scored:
        return Sampled(tokens, logprob[:, 0])
    count = min(MAX_TOP_LOGPROBS, logits.shape[-1])

    def top() -> tuple[jax.Array, jax.Array]:
        best, ids = lax.top_k(logits, count)
        return ids.astype(jnp.int32), best

    def nothing() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((logits.shape[0], count), jnp.int32), jnp.zeros((logits.shape[0], count), jnp.float32)

    top_ids, best = _if_any(params.top_logprobs > 0, top, nothing)
    return Sampled(tokens, logprob[:, 0], top_ids, best - total)


def _if_any[T](asked: jax.Array, some: Callable[[], T], none: Callable[[], T]) -> T:
    """`some()` where a row asks, else `none()`, which must be what `some` gives then; a GPU always takes `some`."""
    if current_device().platform != "cpu":
        return some()
    return lax.cond(jnp.any(asked), some, none)


def penalised(logits: jax.Array, params: RowParams) -> jax.Array:
    """Repetition, presence and frequency penalties; [R, V] -> [R, V]."""
    answered = params.generated > 0
    seen = params.prompted | answered
    repetition = params.repetition[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, scaled, logits)
    logits = logits - params.presence[:, None] * answered
    return logits - params.frequency[:, None] * jnp.minimum(params.generated, MAX_COUNT)


def biased(logits: jax.Array, params: RowParams) -> jax.Array:
    """logit_bias, and the ban on stop ids before min_new_tokens; [R, V] -> [R, V]."""

    def add(logits: jax.Array) -> jax.Array:
        rows = jnp.arange(logits.shape[0])[:, None]
        values = jnp.where(params.position[:, None] < params.bias_until, params.bias_values, 0.0)
        return logits.at[rows, params.bias_ids].add(values, mode="drop")

    return _if_any(params.bias_ids < logits.shape[-1], lambda: add(logits), lambda: logits)


def _draw(logits: jax.Array, params: RowParams, plain: bool) -> jax.Array:
    scaled = logits / jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(params.seed, params.position, logits.shape[-1])
    if plain:
        return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
    keep = kept(scaled, params.top_k, params.top_p, params.min_p)
    return jnp.argmax(jnp.where(keep, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _gumbel(seed: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """[count] float32 noise from the key of a row: fold_in(key(seed), position)."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (count,), jnp.float32)


def kept(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which tokens may be drawn, bool [R, V]. Ties at a threshold are all kept, as Hugging Face does.

    No sort: the threshold of top-k and of top-p is found bit by bit, in a few passes over the row, exactly.
    """
    order = _sortable(scaled)
    vocabulary = scaled.shape[-1]

    def by_count() -> jax.Array:
        k = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
        return order >= _threshold(order, 1, k)

    keep = _if_any(top_k > 0, by_count, lambda: jnp.ones(scaled.shape, bool))

    def by_mass() -> jax.Array:
        weight = jnp.where(keep, jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True)), 0.0)
        threshold = _threshold(order, weight, top_p * jnp.sum(weight, axis=-1))
        return keep & ((order >= threshold) | (top_p >= 1)[:, None])

    keep = _if_any(top_p < 1, by_mass, lambda: keep)
    floor = jnp.max(scaled, axis=-1) + jnp.where(min_p > 0, jnp.log(jnp.maximum(min_p, 1e-30)), -jnp.inf)
    return keep & (scaled >= floor[:, None])


def _sortable(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order (both zeros equal)."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >= _HIGH_BIT, ~bits, bits | _HIGH_BIT)


def _threshold(order: jax.Array, weight: jax.Array | int, wanted: jax.Array) -> jax.Array:
    """The greatest t per row for which the weights ([R, V] or all 1) of `order >= t` still sum to `wanted` [R]; [R, 1].

    A CPU finds one bit a pass. A GPU, where a pass costs its launches and 0.5 MB of traffic a row, finds `_GPU_BITS`:
    the sums for all candidates of a pass come out of one reading of the row. They are taken in two stages written out
    here, for XLA would split a sum over 128k columns itself, and then finish each candidate in a kernel of its own. The
    loop's trip count is static, so that the host does not wait for it; unrolled, it compiles for a minute.
    """
    bits = 1 if current_device().platform == "cpu" else _GPU_BITS
    rows, vocabulary = order.shape
    fill = ((0, 0), (0, -vocabulary % _PART))
    parts = (rows, -1, _PART)
    order = jnp.pad(order, fill).reshape(parts)
    if not isinstance(weight, int):
        weight = jnp.pad(weight, fill).reshape(parts)
    values = jnp.arange(1, 2**bits, dtype=jnp.uint32)

    def digit(i: jax.Array, t: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * i.astype(jnp.uint32)
        sums = [
            jnp.sum(jnp.where(order >= (t | (jnp.uint32(value) << shift))[:, :, None], weight, 0), axis=-1)
            for value in range(1, 2**bits)
        ]
        enough = jnp.sum(jnp.stack(sums, axis=1), axis=-1) >= wanted[:, None]
        return t | (jnp.max(jnp.where(enough, values, 0), axis=-1, keepdims=True) << shift)

    return lax.fori_loop(0, 32 // bits, digit, jnp.zeros((rows, 1), jnp.uint32))
