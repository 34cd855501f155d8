"""A ring of whole rows in shared memory, filled by the copy engine: for blocks that walk over many rows.

A row cannot be on its way into registers while the one before is worked on: 896 threads have 72 each, and ptxas moves
such loads down behind half of the arithmetic. Here one thread asks for a row (57 KB of gate and up, one bulk copy) as
soon as all have read the one that had its place; two or three rows are always in flight. The place is free behind the
barrier of the row's maximum (`exchange.row_maximum`), in front of which every thread has used all that it read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize import exact
from pallas_kernels.quantize.exchange import Ops

_REF = plgpu.RefType()


def begin(barriers: Any, stages: int) -> None:
    """Initialises one barrier a place; `barriers`: uint32 [2 * stages] in shared memory. By all threads."""

    @plgpu.inline_mgpu(arg_types=(_REF,))
    def start(ctx: Any, ref: Any) -> None:
        ops = Ops()
        init = " ".join(f"@p mbarrier.init.shared::cta.b64 [$0 + {8 * i}], 1;" for i in range(stages))
        text = (
            f"{{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; {init} "
            "@p fence.mbarrier_init.release.cluster; }"
        )
        ops.ptx(text, ops.address(ref))
        ops.ptx("bar.sync 0;", convergent=True)

    start(barriers)


def fetch(x: Any, ring: Any, barriers: Any, row: jax.Array, slot: jax.Array, *, rows: int, size: int) -> None:
    """Asks for `row` (of x's `rows`, of `size` bytes each; beyond them for nothing) into place `slot`."""

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, exact.SCALAR, exact.SCALAR))
    def start(ctx: Any, x: Any, ring: Any, barriers: Any, row: Any, slot: Any) -> None:
        ops = Ops()
        text = (
            "{ .reg .pred p, q; .reg .u32 t, d, b; .reg .u64 s; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
            f"setp.lt.u32 q, $3, {rows}; and.pred p, p, q; "
            f"mul.wide.u32 s, $3, {size}; add.u64 s, s, $0; mad.lo.u32 d, $4, {size}, $1; mad.lo.u32 b, $4, 8, $2; "
            f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], {size}; "
            "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [d], [s], "
            f"{size}, [b]; }}"
        )
        scalars = (value.registers.flat[0] for value in (row, slot))
        ops.ptx(text, ops.global_address(x), ops.address(ring), ops.address(barriers), *scalars)

    start(x, ring, barriers, row, slot)


def wait(barriers: Any, slot: jax.Array, parity: jax.Array) -> None:
    """Until place `slot` has been filled an odd (parity 0) or even (1) number of times."""

    @plgpu.inline_mgpu(arg_types=(_REF, exact.SCALAR, exact.SCALAR))
    def block(ctx: Any, barriers: Any, slot: Any, parity: Any) -> None:
        ops = Ops()
        text = (
            "{ .reg .pred p; .reg .u32 b; mad.lo.u32 b, $1, 8, $0; "
            "WAIT_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [b], $2; "
            "@p bra DONE_${:uid}; bra WAIT_${:uid}; DONE_${:uid}: }"
        )
        ops.ptx(text, ops.address(barriers), *(value.registers.flat[0] for value in (slot, parity)))

    block(barriers, slot, parity)


def read(
    ring: Any, slot: jax.Array, layout: Any, shape: tuple[int, ...], dtype: Any, *, size: int, offset: int
) -> jax.Array:
    """This warpgroup's part [4, repeats, runs, 128] of 16-bit elements, of the row's bytes from `offset` on."""
    _, repeats, runs, _ = shape

    @plgpu.inline_mgpu(arg_types=(_REF, exact.SCALAR), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout))
    def part(ctx: Any, ring: Any, slot: Any) -> Any:
        from jax.experimental.mosaic.gpu import fragmented_array as fa
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector

        ops = Ops()
        words = 2 * runs  # of 4 bytes, which a lane reads at once
        step = 256 * runs  # bytes between a warp's repeats
        text = (
            "{ .reg .u32 l, t; mov.u32 l, %laneid; mov.u32 t, %tid.x; shr.u32 t, t, 5; "
            f"mad.lo.u32 t, t, {repeats * step}, $1; mad.lo.u32 t, l, {4 * words}, t; mad.lo.u32 $0, $2, {size}, t; }}"
        )
        base = ops.ptx(text, ops.address(ring), slot.registers.flat[0], result=ops.i32)
        element = utils.dtype_to_ir_type(jnp.dtype(dtype))
        names = ", ".join(f"${i}" for i in range(words))
        registers = np.empty(repeats, dtype=object)
        for i in range(repeats):
            load = f"ld.shared.v{words}.b32 {{{names}}}, [${words} + {offset + i * step}];"
            got = vector.from_elements(
                ir.VectorType.get((words,), ops.i32), list(ops.ptx(load, base, result=[ops.i32] * words))
            )
            registers[i] = vector.bitcast(ir.VectorType.get((2 * words,), element), got)
        tiled = layout.to_mgpu()
        return fa.FragmentedArray(
            _registers=registers.reshape(tiled.registers_shape(shape)), _layout=tiled, _is_signed=None
        )

    return part(ring, slot)
