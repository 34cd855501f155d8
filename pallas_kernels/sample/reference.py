"""The draw in XLA: runs anywhere, and is the oracle of the kernel's tests.

On a CPU the parts that no row asks for are skipped by conditionals. On a GPU there are none, for the host would have to
wait for their predicates.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import current_device

#: A row of a lower temperature is greedy: a logit divided by it may overflow float32.
LEAST_TEMPERATURE = 1e-6
LEAST_MIN_P = 1e-30
_HIGH_BIT = np.uint32(0x80000000)
_GPU_BITS = 4  # bits of a threshold found per pass over the row: 8 passes of 15 candidates each
_PART = 256  # columns whose weights are summed first


def sample(logits, temperature, top_k, top_p, min_p, seed, position):
    """See api.sample."""
    best = argmax(logits)
    drawing = (temperature >= LEAST_TEMPERATURE) & (best >= 0)

    def draw() -> tuple[jax.Array, jax.Array]:
        scaled = scale(logits, jnp.where(drawing, temperature, 1.0))
        least = threshold(scaled, top_k, top_p, min_p)
        noise = jax.vmap(gumbel, in_axes=(0, 0, None))(seed, position, logits.shape[-1])
        return argmax(jnp.where(scaled >= least[:, None], scaled + noise, -jnp.inf)), least

    drawn, least = if_any(drawing, draw, lambda: (best, jnp.full(best.shape, -jnp.inf, jnp.float32)))
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(drawing, drawn, best), total, least


def if_any[T](asked: jax.Array, some: Callable[[], T], none: Callable[[], T]) -> T:
    """`some()` where a row asks, else `none()`, which must be what `some` gives then; a GPU always takes `some`."""
    if current_device().platform != "cpu":
        return some()
    return lax.cond(jnp.any(asked), some, none)


def argmax(logits: jax.Array) -> jax.Array:
    """[R, V] -> int32 [R], the first of equals; -1 for a row with NaN."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the first NaN, when there is one
    return jnp.where(jnp.isnan(jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]), -1, best)


def scale(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """logits [R, V] / temperature [R], rounded once in every batch: XLA turns a division by one number for all, as in a
    batch of one row, into a multiplication by its rounded inverse, unless the divisor depends on the dividend."""
    return logits / jnp.where(logits == 0, 1.0, temperature[:, None])


def gumbel(seed: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """[count] float32 noise from the key of a row: fold_in(key(seed), position)."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (count,), jnp.float32)


def threshold(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The least that may be drawn, float32 [R]; -inf where nothing is asked. Ties at it are all kept, as Hugging Face
    does. No sort: that of top-k and of top-p is found bit by bit, in a few passes over the row, exactly.
    """
    order = sortable(scaled)
    rows, vocabulary = scaled.shape
    everything = jnp.zeros((rows, 1), jnp.uint32)

    def by_count() -> jax.Array:
        k = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
        return jnp.where(top_k[:, None] > 0, _greatest(order, 1, k), 0)

    least = if_any(top_k > 0, by_count, lambda: everything)

    def by_mass() -> jax.Array:
        weight = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        weight = jnp.where(order >= least, weight, 0.0)
        found = _greatest(order, weight, top_p * jnp.sum(weight, axis=-1))
        return jnp.where(top_p[:, None] < 1, jnp.maximum(found, least), least)

    least = if_any(top_p < 1, by_mass, lambda: least)[:, 0]
    log_floor = jnp.log(jnp.maximum(min_p, LEAST_MIN_P))
    floor = jnp.where(min_p > 0, jnp.max(scaled, axis=-1) + log_floor, -jnp.inf)
    return jnp.maximum(jnp.where(least > 0, _as_float(least), -jnp.inf), floor)


def sortable(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order (both zeros equal)."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >= _HIGH_BIT, ~bits, bits | _HIGH_BIT)


def _as_float(order: jax.Array) -> jax.Array:
    """`sortable` undone."""
    return lax.bitcast_convert_type(jnp.where(order >= _HIGH_BIT, order ^ _HIGH_BIT, ~order), jnp.float32)


def _greatest(order: jax.Array, weight: jax.Array | int, wanted: jax.Array) -> jax.Array:
    """The greatest t per row for which the weights ([R, V] or all 1) of `order >= t` still sum to `wanted` [R]; [R, 1].

    A CPU finds one bit a pass. A GPU, where a pass costs its launches and 0.5 MB of traffic a row, finds `_GPU_BITS`:
    the sums for all candidates of a pass come out of one reading of the row. They are taken in two stages written out
    here, for XLA would split a sum over 128k columns itself, and then finish each candidate in a kernel of its own. The
    loop's trip count is static, so that the host does not wait for it; unrolled, it compiles for a minute.
    """
    bits = 1 if current_device().platform == "cpu" else _GPU_BITS
    rows, vocabulary = order.shape
    fill = ((0, 0), (0, -vocabulary % _PART))
    parts = (rows, -(-vocabulary // _PART), _PART)
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
