"""Free places for a step's small buffers, so that its temporary buffer keeps its own.

A command buffer is updated before a launch wherever an address has changed since the last one. XLA gives a program
one temporary buffer, which every Mosaic call uses: when that lies elsewhere, hundreds of captures are exchanged, 3 to 5
ms where the step takes 3 (H200, FP8 8B, a prompt's step and a decode step in turns; bench/launch_trace). The allocator
(BFC) takes the smallest free chunk that holds a buffer and merges what becomes free with free neighbours, so outputs
and inputs of a few bytes, which come and go in another rhythm, are cut from where the temporary buffer was. Here each
size up to that of the logits gets a few chunks that nothing can merge with: what is small finds one, and the rest stays
in one piece.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

log = logging.getLogger(__name__)

SMALLEST = 8  # log2 of bytes: no chunk of BFC is smaller
LARGEST = 27  # 128 MiB: float32 logits of 256 rows and 128,256 tokens
SHARE = 100  # of the memory, the part that all places take at most: a hundredth


def places(memory_bytes: int) -> list[int]:
    """Sizes in bytes, for a device with so much memory; they take 0.6 GiB of the largest devices."""
    sizes: list[int] = []
    for power in range(SMALLEST, LARGEST + 1):
        more = [1 << power] * (16 if power < 20 else 4 if power < 25 else 2)
        if sum(sizes) + sum(more) > memory_bytes // SHARE:
            break
        sizes += more
    return sizes


def hold_places(device: Any) -> list[jax.Array]:
    """Makes them, where the device has an allocator that tells its size: not on a CPU. Returns what must be kept: the
    small buffers between the places. Where the memory does not suffice there are none, which is slower and no error."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return []
    sizes = places(int(stats["bytes_limit"]))
    content = np.zeros(max(sizes, default=0), np.uint8)
    between, free = [], []
    try:
        for size in sizes:
            between.append(jax.device_put(content[:1], device))
            free.append(jax.device_put(content[:size], device))
        between.append(jax.device_put(content[:1], device))
        jax.block_until_ready((between, free))
    except jax.errors.JaxRuntimeError as error:
        log.info("no places for small buffers, so that steps take longer to launch: %s", error)
        return []
    return between
