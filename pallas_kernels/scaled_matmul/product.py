"""A product of 128 of K that overwrites its accumulator, as Pallas' own cannot.

`plgpu.wgmma` adds to an accumulator that it has zeroed. ptxas makes an overwriting product of that, into registers of
its own choice: of two products one after the other it issues the second before the first is promoted, which takes two
accumulators (1,056 bytes of spills where a warpgroup holds the sums of 128 rows by 128 columns). Here both products
name the same registers. The descriptors are a product and a sum, in place of Mosaic's divisions and shifts: 17
instructions between a full barrier and the first product, where there were 27.

Not for interpret mode.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jaxlib.mlir.dialects import llvm

from pallas_kernels.a16 import ptx
from pallas_kernels.scaled_matmul.problem import transforms

SCALAR = plgpu.Layout.WG_SPLAT(())
WGMMA = plgpu.Layout.WGMMA
ROW_BYTES = 128  # of a swizzled tile of shared memory: 128 of K, a byte each


def multiply(acc: jax.Array, operands: Any, x_row: Any, w_row: Any, k0: int, tile_k: int) -> jax.Array:
    """Issues acc = x w^T, whatever acc holds, and commits it as a group; `wait` must follow before acc is used.

    acc           float32 [64, N] in the layout WGMMA
    operands      shared memory [rows, tile_k] fp8 in swizzled tiles of 8 x 128
    x_row, w_row  where x's 64 rows and w's N begin: multiples of 8
    k0            where the 128 columns begin
    """
    n = acc.shape[1]
    group_bytes = 8 * tile_k  # from eight rows to the next eight

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType(transforms(ROW_BYTES, jnp.float8_e4m3fn)), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA),
    )
    def issue(ctx: Any, acc: Any, operands: Any, x_row: Any, w_row: Any) -> Any:
        del ctx
        base = ptx.shared_address(operands)
        high = ptx.Int(ptx.const(1 << 30 | group_bytes >> 4))  # 1 << 30: the swizzle of 128 bytes

        def descriptor(row: Any, k: int) -> Any:
            address = base + ptx.Int(row.registers.item()) * tile_k + k0 * 8
            low = (address >> 4 & 0x3FFF) + (k >> 4) | 1 << 16
            return ptx.asm("mov.b64 $0, {$1, $2};", low, high, results=[ptx.i64_type()])[0]

        held = fragments.optimization_barrier(acc.to_layout(fragments.WGMMA_LAYOUT_ACC_32BIT))
        ptx.wgmma_fence()
        values = list(held.registers.flat)
        count, kind = len(values), values[0].type
        names = ", ".join(f"${i}" for i in range(count))
        constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l", "l"])
        for k in range(0, ROW_BYTES, 32):
            text = (
                f"{{ .reg .pred adds; setp.ne.b32 adds, {int(k > 0)}, 0; "
                f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{names}}}, "
                f"${2 * count}, ${2 * count + 1}, adds, 1, 1; }}"
            )
            inputs = [*values, descriptor(x_row, k), descriptor(w_row, k)]
            struct = llvm.StructType.get_literal([kind] * count)
            out = llvm.inline_asm(struct, inputs, text, constraints, has_side_effects=True)
            values = [llvm.extractvalue(kind, out, [i]) for i in range(count)]
        ptx.wgmma_commit()
        registers = held.registers.copy()
        registers.flat = values
        issued = fragments.FragmentedArray(_registers=registers, _layout=held.layout, _is_signed=None)
        return issued.to_layout(fragments.WGMMA_LAYOUT)

    return issue(acc, operands, x_row, w_row)


def wait(acc: jax.Array, pending: int) -> jax.Array:
    """acc, once at most `pending` groups committed after its own are still running."""

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA))
    def finish(ctx: Any, acc: Any) -> Any:
        del ctx
        ptx.wgmma_wait(pending)
        return fragments.optimization_barrier(acc)

    return finish(acc)
