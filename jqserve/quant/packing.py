"""Packing of 4-bit values: canonical is two a byte along K, the low nibble first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jqserve.quant.namespace import namespace

if TYPE_CHECKING:
    import jax


def pack_uint4[Array: (jax.Array, np.ndarray)](q: Array) -> Array:
    """[N, K] of values 0..15 -> uint8 [N, ceil(K/2)]; an odd K leaves the last high nibble 0."""
    xp = namespace(q)
    q = q.astype(xp.uint8)
    if q.shape[-1] % 2:
        q = xp.pad(q, ((0, 0), (0, 1)))
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_uint4[Array: (jax.Array, np.ndarray)](packed: Array, k: int) -> Array:
    """uint8 [N, ceil(K/2)] -> uint8 [N, K] of values 0..15."""
    xp = namespace(packed)
    pairs = xp.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :k]
