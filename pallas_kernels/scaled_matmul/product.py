"""A product of 128 of K that overwrites its accumulator, as Pallas' own cannot.

`plgpu.wgmma` adds to an accumulator that it has zeroed. ptxas makes an overwriting product of that, into registers that
it chooses anew: of two products one after the other it issues the second before the first is promoted, which two
accumulators pay for (spills, where a warpgroup holds the sums of 128 rows). Here both names are the same registers,
and whether a product adds is a number that ptxas does not know. The descriptors are one multiplication and one sum
(Mosaic's chain of divisions and shifts stands between a full barrier and the first product).

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


def multiply(acc: jax.Array, operands: Any, x_row: Any, w_row: Any, adds: Any, k0: int, tile_k: int) -> jax.Array:
    """Issues acc = x w^T (+ acc where the number `adds` is not 0), and commits; to be awaited by `wait`.

    acc       float32 [64, N] in the layout WGMMA
    operands  shared memory [rows, tile_k] fp8 in tiles of 8 x 128, swizzled; x's 64 rows begin at x_row, w's N at w_row
    k0        where the 128 columns begin
    """
    n = acc.shape[1]
    group = ROW_BYTES * 8 * (tile_k // ROW_BYTES)  # bytes from eight rows to the next eight

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType(transforms(128, jnp.float8_e4m3fn)), SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA),
    )
    def issue(ctx: Any, acc: Any, operands: Any, x_row: Any, w_row: Any, adds: Any) -> Any:
        del ctx
        base = ptx.shared_address(operands)
        number = lambda scalar: ptx.Int(scalar.registers.item())  # noqa: E731
        high = ptx.Int(ptx.const(1 << 30 | group >> 4))  # the swizzle of 128 bytes; the distance of row groups

        def descriptor(row: Any, k: int) -> Any:
            low = ((base + row * tile_k + k0 * 8) >> 4 & 0x3FFF) + (k >> 4)
            words = "mov.b64 $0, {$1, $2};"
            return ptx.asm(words, low | 1 << 16, high, results=[ptx.i64_type()])[0]

        held = fragments.optimization_barrier(acc.to_layout(fragments.WGMMA_LAYOUT_ACC_32BIT))
        ptx.wgmma_fence()
        registers = held.registers.copy()
        values = list(registers.flat)
        names = ", ".join(f"${i}" for i in range(len(values)))
        at = 2 * len(values)
        constraints = ["=f"] * len(values) + [str(i) for i in range(len(values))] + ["l", "l", "r"]
        struct = llvm.StructType.get_literal([values[0].type] * len(values))
        for k in range(0, ROW_BYTES, 32):
            condition = f"setp.ne.b32 p, ${at + 2}, 0;"
            product = f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3"
            text = f"{{ .reg .pred p; {condition} {product} {{{names}}}, ${at}, ${at + 1}, p, 1, 1; }}"
            flag = number(adds) if k == 0 else ptx.Int(ptx.const(1))
            inputs = [*values, descriptor(number(x_row), k), descriptor(number(w_row), k), flag.value]
            out = llvm.inline_asm(struct, inputs, text, ",".join(constraints), has_side_effects=True)
            values = [llvm.extractvalue(values[0].type, out, [i]) for i in range(len(values))]
        ptx.wgmma_commit()
        registers.flat = values
        result = fragments.FragmentedArray(_registers=registers, _layout=held.layout, _is_signed=None)
        return result.to_layout(fragments.WGMMA_LAYOUT)

    return issue(acc, operands, x_row, w_row, adds)


def wait(acc: jax.Array, pending: int) -> jax.Array:
    """acc, once at most `pending` committed products are still running."""

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA))
    def finish(ctx: Any, acc: Any) -> Any:
        del ctx
        ptx.wgmma_wait(pending)
        return fragments.optimization_barrier(acc)

    return finish(acc)
