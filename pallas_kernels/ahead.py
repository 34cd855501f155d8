"""Reading ahead: a kernel that leaves the memory idle asks for the weights of the next one to be brought into L2.

Kernels of a decoded token are short, and between two that stream weights (4.6 TB/s) stands one that reads next to
nothing: a norm, SiLU, the rotary embedding, attention of few tokens. With Hopper's `cp.async.bulk.prefetch.L2` the
memory goes on reading meanwhile: nobody waits for it, nothing is written, no result changes. It works from within a
command buffer, where an early launch does not (see `scaled_matmul.mosaic_sm90`).

Every row of the weight (axis 0: what one block of the next kernel streams) is asked for from its beginning, all rows
alike, so that no block is served from L2 while another one waits for HBM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.a16 import ptx
from pallas_kernels.a16.ptx import Int

LINE = 128  # bytes: what L2 brings at once
BLOCKS = 128  # that ask, of a kernel that has fewer: one a multiprocessor, nearly
LANES = 128  # threads of a block that ask
PIECE = 16384  # bytes of one request


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """What to ask for: the first `size` bytes of `weight` in all, spread over its rows (axis 0).

    weight  an array of the next kernel, of any shape and dtype, in HBM
    size    bytes; cut to whole lines a row, and to the array
    piece   bytes of one request, a multiple of `LINE`
    """

    weight: jax.Array
    size: int = dataclasses.field(metadata={"static": True})
    piece: int = dataclasses.field(default=PIECE, metadata={"static": True})

    def request(self) -> Request | None:
        """None where there is nothing to ask for: too few bytes, or rows that are no whole lines."""
        if self.weight.size == 0:
            return None
        rows = self.weight.shape[0] if self.weight.ndim > 1 else 1
        stride = self.weight.size * self.weight.dtype.itemsize // rows
        take = min(self.size // rows // LINE * LINE, stride)
        return None if stride % LINE or take <= 0 else Request(rows, stride, take, min(self.piece, take))


@dataclasses.dataclass(frozen=True)
class Request:
    """`take` bytes at the beginning of each of `rows` that are `stride` bytes apart, in pieces."""

    rows: int
    stride: int
    take: int
    piece: int

    @property
    def pieces(self) -> int:
        return self.rows * self._each

    @property
    def _each(self) -> int:
        return -(-self.take // self.piece)

    def place(self, index: Any, smaller: Callable[[Any, int], Any]) -> tuple[Any, Any, Any]:
        """(row, bytes into the row, bytes) of a piece; for numbers of any kind."""
        start = index % self._each * self.piece
        return index // self._each, start, smaller(start * -1 + self.take, self.piece)


def spare_blocks(blocks: int) -> int:
    """Blocks to add to a kernel of so many, which do nothing else."""
    return max(0, BLOCKS - blocks)


def ask(request: Request, blocks: int) -> Any:
    """A function of the weight's reference, to be called by every thread of each of a kernel's `blocks`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def asking(_: Any, ref: Any) -> None:
        base = ptx.global_address(ref)
        block = ptx.special("%ctaid.z") * ptx.special("%nctaid.y") + ptx.special("%ctaid.y")
        block = block * ptx.special("%nctaid.x") + ptx.special("%ctaid.x")
        thread = ptx.special("%tid.x")
        for first in range(0, request.pieces, blocks * LANES):
            index = block * LANES + thread + first
            with ptx.when(arith.andi(thread.lt(LANES), index.lt(request.pieces))):
                row, start, size = request.place(index, Int.min)
                distance = arith.muli(row.i64(), ptx.const64(request.stride))
                ptx.bulk_prefetch(ptx.offset(base, distance, start.i64()), size)

    return asking
