"""The wgmmas that prefill emits for P V, executed in numpy from the MLIR: the registers and the descriptor of each.

Follows the PTX manual: fragment layout of A (m64k16), matrix descriptor (start, leading and stride offsets in units of
16 bytes, swizzle mode), swizzle = XOR of the 16-byte chunk with the 128-byte line. Mosaic's interpreter takes no
A operand in registers, and an H200 found what this test is for: blocks of 160 keys whose last 32 were multiplied by
nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, func

from pallas_kernels.paged_attention.config import PrefillConfig, prefill_search_space
from pallas_kernels.paged_attention.mosaic_prefill_sm90 import prefill_attention
from pallas_kernels.paged_attention.prefill_attend import wgmma_registers
from tests.pallas_kernels.aot import compile_for_h200

ROWS = 64


def columns_of(head_dim: int) -> int:
    """Of a swizzled tile: 128 bytes where the head dim allows it, 64 otherwise."""
    return 64 if head_dim % 64 == 0 else 32


def evaluate(value: ir.Value) -> int:
    """Integer arithmetic of a descriptor; pointers are 0."""
    op = value.owner
    if op.name in ("arith.constant", "llvm.mlir.constant"):
        return int(op.attributes["value"])
    two = {
        "llvm.or": lambda x, y: x | y,
        "llvm.and": lambda x, y: x & y,
        "llvm.add": lambda x, y: x + y,
        "llvm.lshr": lambda x, y: (x % 2**64) >> y,
        "arith.addi": lambda x, y: x + y,
        "arith.shli": lambda x, y: x << y,
    }
    if op.name == "llvm.ptrtoint":
        return 0
    return two[op.name](*map(evaluate, op.operands)) % 2**64


def argument(value: ir.Value) -> int:
    """Number of the function's argument that a register was before bit casts."""
    while not isinstance(value, ir.BlockArgument):
        value = value.owner.operands[0]
    return ir.BlockArgument(value).arg_number


def emitted(block: int, head_dim: int) -> list[tuple[list[int], int]]:
    """(numbers of the registers of A, descriptor of B) of each wgmma of a block's P V, in order."""
    columns = columns_of(head_dim)
    with mlir.make_ir_context(), ir.Location.unknown():
        smem = ir.Attribute.parse("#gpu.address_space<workgroup>")
        tile = (block // 8, head_dim // columns, 8, columns)
        values = ir.MemRefType.get(tile, ir.BF16Type.get(), memory_space=smem)
        shape = fa.WGMMA_LAYOUT.registers_shape((ROWS, block))
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):

            @func.FuncOp.from_py_func(*[pair] * int(np.prod(shape)), values)
            def program(*args: Any) -> None:
                registers = np.empty(len(args) - 1, dtype=object)
                registers[:] = args[:-1]
                weights = fa.FragmentedArray(
                    _registers=registers.reshape(shape), _layout=fa.WGMMA_LAYOUT, _is_signed=None
                )
                zero = arith.constant(ir.F32Type.get(), 0.0)
                acc = fa.FragmentedArray.splat(zero, (ROWS, head_dim), fa.WGMMA_LAYOUT_ACC_32BIT)
                wgmma_registers(acc, weights, args[-1], 2 * columns)

        found = []
        for op in program.func_op.entry_block.operations:
            if op.name == "llvm.inline_asm":
                assert f"wgmma.mma_async.sync.aligned.m64n{head_dim}k16.f32.bf16.bf16" in str(
                    op.attributes["asm_string"]
                )
                operands = list(op.operands)[head_dim // 2 :]  # behind the accumulator
                found.append(([argument(v) for v in operands[:4]], evaluate(operands[4])))
    return found


def stored(values: np.ndarray) -> np.ndarray:
    """[keys, Dh] as TMA leaves it in shared memory: tiles of 8 rows, 16-byte chunks swizzled."""
    keys, head_dim = values.shape
    columns = columns_of(head_dim)
    out = np.zeros((keys // 8, head_dim // columns, 8, columns), values.dtype)
    for key in range(keys):
        for chunk in range(head_dim // 8):
            tile, within = divmod(chunk, columns // 8)
            at = within ^ (key % 8 if columns == 64 else key % 8 // 2)
            out[key // 8, tile, key % 8, 8 * at : 8 * at + 8] = values[key, 8 * chunk : 8 * chunk + 8]
    return out.reshape(-1)


def operand_b(smem: np.ndarray, descriptor: int, head_dim: int) -> np.ndarray:
    """[16, head_dim] that a wgmma with a transposed B reads through its descriptor."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = {1: 128, 2: 64}[descriptor >> 62]
    k, n = np.arange(16)[:, None], np.arange(head_dim)[None]
    across, column = n // (swizzle // 2), n % (swizzle // 2)
    address = start + k // 8 * stride + across * leading + k % 8 * swizzle + 2 * column
    address ^= (address >> 7 & (swizzle // 16 - 1)) << 4
    return smem[address // 2]


@pytest.mark.parametrize("block, head_dim", [(64, 256), (128, 96), (128, 128), (160, 128), (176, 128), (80, 96)])
def test_every_key_of_a_block_meets_its_weight(block, head_dim):
    rng = np.random.default_rng(0)
    weights, values = rng.integers(-8, 8, (ROWS, block)), rng.integers(-8, 8, (block, head_dim))
    smem = stored(values)
    # Register r of A holds columns 8 (r / 2) .. + 8; of each warp's 16 rows the first 8 (r even) or the last 8.
    rows = np.arange(ROWS).reshape(4, 2, 8)
    out = np.zeros((ROWS, head_dim), int)
    for registers, descriptor in emitted(block, head_dim):
        a = np.zeros((ROWS, 16), int)
        for i, r in enumerate(registers):  # a0, a1: columns 0..7; a2, a3: 8..15; odd ones the lower 8 rows
            to, of = rows[:, i % 2].ravel(), rows[:, r % 2].ravel()
            a[to, 8 * (i // 2) : 8 * (i // 2) + 8] = weights[of, 8 * (r // 2) : 8 * (r // 2) + 8]
        out += a @ operand_b(smem, descriptor, head_dim)
    np.testing.assert_array_equal(out, weights @ values)


def test_search_space_has_what_the_kernel_takes():
    for head_dim in (32, 64, 96, 128, 256):
        for page in (8, 16, 32, 64, 128):
            for config in prefill_search_space(head_dim, page):
                assert config.block_kv % page == 0 and config.block_kv % 16 == 0
                assert config.block_kv * head_dim % 2048 == 0  # the loops of 128 threads by 16 bytes, fp8 too
    assert {PrefillConfig(160), PrefillConfig(176)} <= set(prefill_search_space(128, 16))
    assert PrefillConfig(160) in prefill_search_space(128, 32)


@pytest.mark.parametrize(("tiles", "flags"), [(33, 0), (1, 1)])
def test_nothing_runs_beside_the_kernel(tiles, flags):
    """Without scales no array of ones is made for them: one kernel a call. A last round that is split (4 items, not
    132) has flags, which are zeroed once a program."""
    S = jax.ShapeDtypeStruct
    pages, few = S((64, 2, 16, 128), jnp.bfloat16), S((tiles,), jnp.int32)
    attend = functools.partial(prefill_attention, sm_scale=0.1)
    call = lambda q, *rest: attend(attend(q, *rest), *rest)  # noqa: E731
    q, table = S((tiles, 128, 4, 128), jnp.bfloat16), S((tiles, 16), jnp.int32)
    hlo = compile_for_h200(call, q, pages, pages, table, few, few).hlo
    assert hlo.count("custom-call(") == 2 and hlo.count(" fusion(") == flags
