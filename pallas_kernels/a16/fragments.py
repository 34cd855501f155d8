"""Weights in the order of the tensor core's registers: one 16-byte access per lane is one whole A operand.

A tile is 16 rows (n) by one block of k: 64 columns of 4-bit or 32 of 8-bit weights, 512 contiguous bytes. Lane
4 g + c of a warp owns its bytes 16 (4 g + c) .. + 15: the rows n = g and g + 8, of each 16 columns those with
k % 8 = 2 c and 2 c + 1, as mma.m16n8k16 and wgmma want operand A. Within a lane's 32-bit word the two elements of a
register are 16 bits apart, so that one shift, AND and OR turn them into two bf16 numbers.

Arrays are [N/16, K * 8] (4 bits) or [N/16, K * 16] (8 bits) bytes: axis 0 is N, to be sliced in steps of 16 rows.
Scales become [N/16, G, 8, 2]: of each group the 16 rows' values with rows g and g + 8 adjacent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.a16.stored import BLOCK_BYTES as BLOCK_BYTES
from pallas_kernels.a16.stored import ROWS as ROWS


def pack4(qweight: jax.Array) -> jax.Array:
    """uint8 [N, K/2], low nibble = even k -> uint8 [N/16, 8 K]; N % 16 == 0 and K % 64 == 0."""
    n, half = qweight.shape
    # axes: tile, h, g, block, step, j, c with row 8 h + g, column 64 block + 16 step + 8 j + 2 c + e, e = nibble
    b = qweight.reshape(n // 16, 2, 8, half // 32, 4, 2, 4)
    low, high = b & 15, b >> 4
    # The byte (e, j) of a word holds row g in its low nibble, row g + 8 in its high one.
    word = jnp.stack([a[:, 0] | (a[:, 1] << 4) for a in (low, high)], axis=-1)  # tile, g, block, step, j, c, e
    return word.transpose(0, 2, 1, 5, 3, 6, 4).reshape(n // 16, 16 * half)  # tile, block, g, c, step, e, j


def unpack4(packed: jax.Array) -> jax.Array:
    """The inverse of `pack4`."""
    tiles, size = packed.shape
    half = size // 16
    word = packed.reshape(tiles, half // 32, 8, 4, 4, 2, 2).transpose(0, 2, 1, 4, 6, 3, 5)
    rows = jnp.stack([word & 15, word >> 4], axis=1)  # tile, h, g, block, step, j, c, e
    return (rows[..., 0] | (rows[..., 1] << 4)).reshape(tiles * 16, half)


def pack8(qweight: jax.Array) -> jax.Array:
    """[N, K] of an 8-bit type -> [N/16, 16 K] of the same type; N % 16 == 0 and K % 32 == 0."""
    n, k = qweight.shape
    b = qweight.reshape(n // 16, 2, 8, k // 32, 4, 4, 2)  # tile, h, g, block, (step, j), c, e
    word = jnp.stack([b[:, 0], b[:, 1]], axis=-1)  # tile, g, block, (step, j), c, e, h
    return word.transpose(0, 2, 1, 4, 3, 5, 6).reshape(n // 16, 16 * k)


def unpack8(packed: jax.Array) -> jax.Array:
    """The inverse of `pack8`."""
    tiles, size = packed.shape
    k = size // 16
    word = packed.reshape(tiles, k // 32, 8, 4, 4, 4)  # tile, block, g, c, (step, j), (e, h)
    # Not as one transpose of eight axes: XLA's CPU compiler takes minutes for that.
    b = jnp.stack([word[..., 0::2], word[..., 1::2]], axis=1)  # tile, h, block, g, c, (step, j), e
    return b.transpose(0, 1, 3, 2, 5, 4, 6).reshape(tiles * 16, k)


def pack_groups(a: jax.Array) -> jax.Array:
    """[N, G] scales or zeros -> [N/16, G, 8, 2]."""
    n, groups = a.shape
    return a.reshape(n // 16, 2, 8, groups).transpose(0, 3, 2, 1)


def unpack_groups(a: jax.Array) -> jax.Array:
    """The inverse of `pack_groups`."""
    tiles, groups = a.shape[:2]
    return a.transpose(0, 3, 2, 1).reshape(tiles * 16, groups)
