"""jax.random's Gumbel noise, one token's at a time: bit for bit `reference.gumbel`, given the same logarithm.

Threefry-2x32 with 20 rounds is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). JAX hashes the counter (0, token) and takes the exclusive or of the two words; 23 bits of it are a uniform
number u in [0, 1), at least the smallest normal number, and the noise is -log(-log(u)).
"""

from __future__ import annotations

from typing import Any

TINY = 2.0**-126
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(ops: Any, key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two 32-bit words each."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ops.rotate_left(y, distance)
        x, y = x + keys[(block + 1) % 3], y + keys[(block + 2) % 3] + (block + 1)
    return x, y


def fold_in(ops: Any, seed: tuple[Any, Any], position: Any) -> tuple[Any, Any]:
    """The key of the row's next token."""
    return threefry(ops, seed, (position * 0, position))


def gumbel(ops: Any, key: tuple[Any, Any], token: Any) -> Any:
    x, y = threefry(ops, key, (token * 0, token))
    uniform = ops.as_float(((x ^ y) >> 9) | 0x3F800000) - 1.0
    return ops.log(ops.log(ops.max(uniform, ops.const_f32(TINY))) * -1.0) * -1.0
