"""What is known when the kernel is built: how a row lies over a cluster's blocks, and a block's shared memory."""

from __future__ import annotations

import dataclasses

CLUSTER = 8  # blocks that share a row: the most that every Hopper launches
WARPS = 16
THREADS = 32 * WARPS
SLOTS = CLUSTER * WARPS  # one a warp of the cluster; a warp reads four a lane
CAPACITY = 1024  # candidates that one block takes over
IN_FLIGHT = 8  # loads of a thread: 64 KB of a block
MOST_SMEM = 227 * 1024 - 1024  # bytes of a block; Mosaic itself takes a few

#: Logits up to FLOOR count as masked; PAD, behind the row's end, is below every logit and BOTTOM between the two.
#: Divided by the least temperature they are finite.
FLOOR, BOTTOM, PAD = -1e31, -1.5e31, -2e31


@dataclasses.dataclass(frozen=True)
class Problem:
    vocabulary: int

    @property
    def width(self) -> int:
        """Elements of one load: 16 bytes where every row begins at a multiple of them."""
        return 4 if self.vocabulary % 4 == 0 else 1

    @property
    def slice(self) -> int:
        """Elements of a row that a block takes; the last one may have fewer."""
        return -(-self.vocabulary // (CLUSTER * self.width)) * self.width

    @property
    def loads(self) -> int:
        """Of a thread, `width` elements each."""
        return -(-self.slice // (THREADS * self.width))

    @property
    def full_loads(self) -> int:
        """Those of them that lie inside the row in every block."""
        shortest = self.vocabulary - (CLUSTER - 1) * self.slice
        return max(0, shortest) // (THREADS * self.width)

    # Shared memory, in bytes from its beginning: the scaled logits, then these.
    @property
    def maxima(self) -> int:
        """int32 [SLOTS]: each warp's largest logit."""
        return self.loads * THREADS * self.width * 4

    @property
    def slots(self) -> int:
        """[2 turns, 2 planes, SLOTS, 4 words]: what warps tell each other."""
        return self.maxima + SLOTS * 4

    @property
    def keys(self) -> int:
        """[3, CAPACITY]: the candidates' keys, weights and tokens."""
        return self.slots + 2 * TURN

    @property
    def rounds(self) -> int:
        """[2 turns, WARPS, 2 words]: what the warps of the block that finishes tell each other."""
        return self.keys + 3 * CAPACITY * 4

    @property
    def smem_bytes(self) -> int:
        return self.rounds + 2 * ROUND


PLANE = SLOTS * 16
TURN = 2 * PLANE
ROUND = WARPS * 8


def problem(rows: int, vocabulary: int) -> Problem:
    """Raises NotImplementedError, with the reason, for what the kernel does not take."""
    p = Problem(vocabulary)
    if rows == 0:
        raise NotImplementedError("takes no empty batch")
    if vocabulary <= CAPACITY:
        raise NotImplementedError(f"takes vocabularies of more than {CAPACITY} tokens, not {vocabulary}")
    if p.smem_bytes > MOST_SMEM:
        raise NotImplementedError(f"an eighth of {vocabulary} logits does not fit a block's shared memory")
    return p
