"""The largest magnitude of a row whose warps share a thread block or a cluster of blocks.

Magnitudes are not negative, so that their bits order as unsigned integers (a NaN's above infinity's): a warp reduces
them in one instruction. Each warp leaves its number in shared memory, and every lane reads one or two of all warps'.
In a cluster each warp sends its number to every block with `st.async`, counted in bytes by the receiver's mbarrier: one
way through the cluster's network and no fence. (A release to the cluster is a MEMBAR.ALL.GPU, which would also wait for
the row's loads.) Mosaic has initialised the barriers and let all blocks of the cluster meet before the kernel's first
line; a block has waited for all that is sent to it when it leaves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.quantize import exact

_WAIT = (
    "{ .reg .pred p; WAIT_${:uid}: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], 0; "
    "@p bra DONE_${:uid}; bra WAIT_${:uid}; DONE_${:uid}: }"
)


def words_of(blocks: int, warps: int) -> int:
    """uint32 words of shared memory: a number a warp of the cluster, and the mbarrier."""
    return blocks * warps + 2


def announce(words: Any, *, warps: int, blocks: int) -> None:
    """Makes this block's barrier ready for the numbers of `warps` warps of each of the cluster's `blocks`.

    Once a kernel, by all threads, in front of the loads; `row_maximum` waits for the other blocks to have come here.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(ctx: Any, ref: Any) -> None:
        ops = Ops()
        size = 4 * blocks * warps
        text = (
            f"{{ .reg .pred p; .reg .u32 t, b; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; add.u32 b, $0, {size}; "
            "@p mbarrier.init.shared::cta.b64 [b], 1; @p fence.mbarrier_init.release.cluster; "
            f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], {size}; }}"
        )
        ops.ptx(text, ops.address(ref))
        ops.ptx("barrier.cluster.arrive.relaxed.aligned;", convergent=True)

    start(words)


def row_maximum(y: jax.Array, words: Any, layout: Any, *, warps: int, blocks: int, rank: jax.Array | int) -> jax.Array:
    """max|y| over all warps of the row: a float32 number.

    y: float32, this warpgroup's part in `layout`. words: uint32 [words_of(...)] in shared memory, which `announce` has
    seen where there are several blocks. warps: of a block. rank: this block's place in the cluster. Does not run in
    interpret mode.
    """

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType(), exact.SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=exact.SCALAR),
    )
    def maximum(ctx: Any, y: Any, ref: Any, rank: Any) -> Any:
        from jax.experimental.mosaic.gpu import fragmented_array as fa
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        ops = Ops()
        address = ops.address(ref)
        largest = ops.warp_maximum(ops.largest_magnitude(y))
        # $0 the words, $1 this warp's number
        mine = "mov.u32 l, %laneid; mov.u32 t, %tid.x; shr.u32 t, t, 5; shl.b32 t, t, 2; add.u32 a, $0, t; "
        if blocks == 1:
            ops.ptx(
                f"{{ .reg .pred p; .reg .u32 l, t, a; {mine} setp.eq.u32 p, l, 0; @p st.shared.u32 [a], $1; }}",
                address,
                largest,
            )
            ops.ptx("bar.sync 0;", convergent=True)
        else:
            bar = arith.addi(address, arith.constant(ops.i32, 4 * blocks * warps))
            ops.ptx("barrier.cluster.wait.aligned;", convergent=True)
            ops.ptx(
                f"{{ .reg .pred p; .reg .u32 l, t, a, b; {mine} mad.lo.u32 a, $3, {4 * warps}, a; "
                f"setp.lt.u32 p, l, {blocks}; @p mapa.shared::cluster.u32 a, a, l; "
                "@p mapa.shared::cluster.u32 b, $2, l; "
                "@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], $1, [b]; }",
                address,
                largest,
                bar,
                rank.registers.flat[0],
            )
            ops.ptx(_WAIT, bar)
        row = None
        for first in range(0, blocks * warps, 32):
            text = (
                "{ .reg .pred p; .reg .u32 l, a; mov.u32 l, %laneid; "
                f"setp.lt.u32 p, l, {blocks * warps - first}; shl.b32 a, l, 2; add.u32 a, a, $1; mov.u32 $0, 0; "
                f"@p ld.shared.u32 $0, [a + {4 * first}]; }}"
            )
            word = ops.ptx(text, address, result=ops.i32)
            row = word if row is None else arith.maxui(row, word)
        return fa.FragmentedArray.splat(arith.bitcast(ir.F32Type.get(), ops.warp_maximum(row)), ())

    return maximum(y, words, jnp.int32(rank))


class Ops:
    """Inline PTX, within a kernel's lowering."""

    def __init__(self) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir

        self.inline = utils.inline_ptx
        self.i32 = ir.IntegerType.get_signless(32)

    def address(self, ref: Any) -> Any:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import llvm

        return llvm.ptrtoint(self.i32, utils.memref_ptr(ref))

    def ptx(self, text: str, *args: Any, result: Any = None, convergent: bool = False) -> Any:
        return self.inline(text, *args, result_types=result, has_side_effects=True, convergent=convergent)

    def warp_maximum(self, word: Any) -> Any:
        return self.ptx("redux.sync.max.u32 $0, $1, 0xffffffff;", word, result=self.i32, convergent=True)

    def largest_magnitude(self, y: Any) -> Any:
        """Of a lane's elements: four chains of maxima, the bits of the result."""
        from jaxlib.mlir.dialects import arith, math, vector

        values = [
            vector.extract(register, dynamic_position=[], static_position=[e])
            for register in y.registers.flat
            for e in range(register.type.shape[0])
        ]
        chains = [math.absf(v) for v in values[:4]]
        for i, value in enumerate(values[4:]):
            chains[i % 4] = arith.maximumf(chains[i % 4], math.absf(value))
        while len(chains) > 1:
            chains = [arith.maximumf(a, b) for a, b in zip(chains[::2], chains[1::2], strict=True)]
        return arith.bitcast(self.i32, chains[0])
