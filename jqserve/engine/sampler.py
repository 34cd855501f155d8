"""From logits to the next token, on the device, inside the step's jit. Shapes: R rows, V vocabulary.

    l1 = penalised(l)     repetition r over prompt and answer: l/r where l > 0 else l*r (Hugging Face)
                          presence, frequency over the answer: l - presence*[n > 0] - frequency*n (OpenAI)
    l2 = l1 + logit_bias  (and -inf for stop ids while the answer is shorter than min_new_tokens)
    logprobs = log_softmax(l2)
    temperature 0: argmax(l2); else l3 = l2 / temperature, then top-k, top-p (of what top-k left), min-p, and a draw

The draw is argmax(l3 + Gumbel noise), the noise a function of (seed, position) alone: the same request with the same
seed draws the same token alone, in any batch, and after it was preempted and recomputed. It is `pallas_kernels.sample`:
on Hopper one kernel from l2 to the token, elsewhere XLA.

On a CPU parts that no row asks for are skipped by conditionals. On a GPU there are none: see `engine/variant`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jqserve.ops import sampling
from jqserve.ops.sampling import if_any

MAX_TOP_LOGPROBS = 20
#: Beyond it a token is not counted on. int16 wraps at 32,767: a step whose rows all hold one token, at most so many
#: (`config.MAX_CHUNK`), must not get there from here. At the least penalty that tells (0.001) it is worth 16 logits.
MAX_COUNT = 2**14


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
    return Sampled(sampling.argmax(logits))


def sample(logits: jax.Array, params: RowParams, *, scored: bool = True, plain: bool = False) -> Sampled:
    """logits float32 [R, V]; greedy rows (temperature 0) give what `greedy` gives unless penalties or biases say so.

    `scored`: with the most likely tokens and their logprobs. `plain`: no row has a penalty, a bias or less than all
    tokens to draw from, which saves most of the work.
    """
    if plain:
        tokens, total = _plain(logits, params)
    else:
        logits = biased(penalised(logits, params), params)
        cuts = (params.top_k, params.top_p, params.min_p)
        tokens, total, _ = sampling.sample(logits, params.temperature, *cuts, params.seed, params.position)
    logprob = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - total
    if not scored:
        return Sampled(tokens, logprob)
    count = min(MAX_TOP_LOGPROBS, logits.shape[-1])

    def top() -> tuple[jax.Array, jax.Array]:
        best, ids = lax.top_k(logits, count)
        return ids.astype(jnp.int32), best

    def nothing() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((logits.shape[0], count), jnp.int32), jnp.zeros((logits.shape[0], count), jnp.float32)

    top_ids, best = if_any(params.top_logprobs > 0, top, nothing)
    return Sampled(tokens, logprob, top_ids, best - total[:, None])


def _plain(logits: jax.Array, params: RowParams) -> tuple[jax.Array, jax.Array]:
    """tokens int32 [R] and the logits' logsumexp float32 [R]: what `sampling.sample` gives where nothing is cut. Its
    kernel is faster than this too (64 rows: 40 us against 67); XLA's search for thresholds is not."""
    rows = logits.shape[0]
    uncut = jnp.zeros((rows,), jnp.int32), jnp.ones((rows,), jnp.float32), jnp.zeros((rows,), jnp.float32)
    try:
        asked = (params.temperature, *uncut, params.seed, params.position)
        return sampling.sample(logits, *asked, implementation="mosaic_sm90")[:2]
    except NotImplementedError:
        pass
    greedy_tokens = sampling.argmax(logits)

    def draw() -> jax.Array:
        scaled = sampling.scale(logits, jnp.where(params.temperature > 0, params.temperature, 1.0))
        noise = jax.vmap(sampling.gumbel, in_axes=(0, 0, None))(params.seed, params.position, logits.shape[-1])
        return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)

    drawn = if_any(params.temperature > 0, draw, lambda: greedy_tokens)
    tokens = jnp.where((params.temperature > 0) & (greedy_tokens >= 0), drawn, greedy_tokens)
    return tokens, jax.nn.logsumexp(logits, axis=-1)


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

    return if_any(params.bias_ids < logits.shape[-1], lambda: add(logits), lambda: logits)
