"""Public op: sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sample import mosaic_sm90, reference


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seed: jax.Array,
    position: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a token of each row: top-k, then top-p of what it left, then min-p, ties at a threshold all kept.

    With x = logits / temperature, the token is the argmax (the first of equals) of x + Gumbel noise over the kept ones,
    the noise a function of (seed, position) and the token alone. So one seed gives one token, whatever the batch.

    Args:
      logits: float32 [R, V], R may be 0; -inf and below -1e31 count as masked.
      temperature: float32 [R]; below 1e-6 the row is greedy: the argmax of its logits, as where all are masked.
      top_k: int32 [R], 0 (or V and above) for off. top_p: float32 [R] in (0, 1], 1 for off. min_p: float32 [R], 0 off.
      seed: uint32 [R, 2], position: int32 [R]; the noise is jax.random.gumbel of fold_in(key(seed), position).
      implementation: name of one implementation (see `pallas_kernels.explain`), None chooses.

    Returns: (tokens int32 [R], -1 for a row with NaN; totals float32 [R], the logsumexp of the logits; thresholds
    float32 [R], the least x that was kept or a bound below it, -inf for none and of no meaning in greedy rows). Kernels
    sum in other orders: a token at which the mass above is within 3e-6 of top_p may be kept by one and not by another.
    Raises ValueError for other shapes or dtypes.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != jnp.float32:
        raise ValueError(f"sample: logits must be float32 [R, V] with V > 0, got {logits.dtype}{logits.shape}")
    rows = logits.shape[:1]
    wanted = {
        "temperature": (temperature, rows, jnp.float32),
        "top_k": (top_k, rows, jnp.int32),
        "top_p": (top_p, rows, jnp.float32),
        "min_p": (min_p, rows, jnp.float32),
        "seed": (seed, (*rows, 2), jnp.uint32),
        "position": (position, rows, jnp.int32),
    }
    for name, (array, shape, dtype) in wanted.items():
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"sample: {name} must be {jnp.dtype(dtype)}{shape}, got {array.dtype}{array.shape}")
    return dispatch.call("sample", implementation, logits, temperature, top_k, top_p, min_p, seed, position)


dispatch.register(
    "sample",
    [
        dispatch.Implementation("mosaic_sm90", mosaic_sm90.sample, dispatch.hopper_only),
        dispatch.Implementation("xla", reference.sample),
    ],
)
