"""The held kernel: its device code on numpy against float64, its refusals, and what ptxas makes of it for an H200."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.a16 import dequant, held_sm90, row_scale
from pallas_kernels.a16.cases import LLAMA_8B, Case, worst
from pallas_kernels.a16.held_sm90 import Config, Plan
from pallas_kernels.a16.problem import DTYPES
from pallas_kernels.a16.stored import KIND_OF, KINDS
from tests.pallas_kernels.aot import compile_for_h200
from tests.pallas_kernels.test_a16 import FLOAT, Words, _halves, on_numpy, pack
from tests.pallas_kernels.warps import Block, run

assert on_numpy  # a fixture


def plan_of(case: Case, config: Config, sms: int) -> Plan:
    kind = KINDS["u4" if case.qtype == "uint4" else KIND_OF[case.qtype]]
    rows = case.scales != "group"
    return Plan(
        case.m,
        case.n,
        case.k,
        kind,
        DTYPES[case.x_dtype],
        DTYPES[case.scale_dtype],
        case.k if rows else case.group,
        rows,
        case.scales == "one",
        case.zero == "int",
        case.zero == "offset",
        sms,
        config,
    )


# Every branch: one and two eights of x, masked rows, groups in and over a warp's slice, scales of the sum, zero points,
# pieces, parts, idle warps, a ring that wraps, x over the ring; several tiles a block, an uneven number of them.
CASES = [
    (Case("uint4", 16, 112, 1024), Config(warps=4), 3),
    (Case("uint4", 16, 112, 1024), Config(warps=4, lift=True), 3),
    (Case("uint4", 9, 64, 1024, 256), Config(warps=8, stages=2), 1),
    (Case("uint4", 1, 80, 768, 64, "int"), Config(warps=6, pieces=2, stages=3), 2),
    (Case("uint4", 3, 64, 1024, 512), Config(warps=8, pieces=2, stages=2, lift=True), 1),
    (Case("uint4", 8, 64, 1024, x_dtype="float16", scale_dtype="float16"), Config(warps=4, parts=2, lift=True), 4),
    (Case("int8", 16, 96, 1024, scale_dtype="float32"), Config(warps=4, pieces=2), 2),
    (Case("int8", 5, 64, 512, scales="row"), Config(warps=16, pieces=4, stages=5), 1),
    (Case("uint8", 2, 64, 512, 64, "int"), Config(warps=8, parts=1), 2),
    (Case("float8_e4m3fn", 16, 64, 512, scales="one"), Config(warps=8, stages=2), 1),
    (Case("uint4", 15, 112, 1024), Config(warps=4), 5),
    (Case("int8", 1, 64, 1024), Config(warps=4, parts=2), 6),
    (Case("uint4", 16, 64, 1024, poison=True), Config(warps=4, lift=True), 2),
]


@pytest.mark.parametrize(("case", "config", "sms"), CASES, ids=str)
def test_device_code_on_numpy(monkeypatch, case: Case, config: Config, sms: int) -> None:
    data, _, packed, _, _ = pack(case)
    plan = plan_of(case, config, sms)
    plan.check()
    q, scale, zero, *_ = packed
    parts = config.parts
    y = np.zeros((parts * case.m, case.n), FLOAT[plan.x_dtype] if parts == 1 else np.float32)
    arrays = [data.x, q, scale, *([] if zero is None else [zero]), y]
    arrays = [np.ascontiguousarray(np.asarray(a)) for a in arrays]
    for index in range(plan.blocks * parts):
        block = Block(index, plan.block_warps + 4, plan.data_bytes + plan.barrier_bytes, arrays)
        with monkeypatch.context() as patched:
            run(patched, (held_sm90, row_scale, dequant), lambda *r: held_sm90._emit(plan, None, *r, None), block)
    got = arrays[-1].astype(np.float32)
    got = got if parts == 1 else got.reshape(parts, case.m, case.n).sum(0).astype(FLOAT[plan.x_dtype])
    assert worst(case, data, got) <= 1


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_raised_values_are_exact(on_numpy, dtype: str) -> None:
    """All nibbles in every place of a register come out as u - 8 + LIFT, which x's dtype holds exactly."""
    values = np.arange(16, dtype=np.uint32)
    for place in range(8):
        registers = dequant.raised_u4(dtype, [Words(values << np.uint32(4 * place))])
        got = _halves(registers[place % 4], dtype)[..., place // 4].astype(float)
        np.testing.assert_array_equal(got, values - 8.0 + dequant.LIFT[dtype])
    assert float(np.asarray(dequant.LIFT[dtype] + 7).astype(FLOAT[dtype])) == dequant.LIFT[dtype] + 7


@pytest.mark.parametrize(
    ("case", "config", "reason"),
    [
        (Case("uint4", 17, 64, 1024), Config(), "M = 17"),
        (Case("uint4", 1, 64, 1024), Config(warps=5), "K = 1024 is not a multiple of 1 x 5"),
        (Case("uint4", 16, 4096, 14336), Config(warps=14), "does not fit its registers"),
        (Case("uint4", 1, 64, 1024, 96), Config(warps=4), "groups of 96"),
        (Case("uint4", 1, 64, 1024, zero="offset"), Config(warps=4), "offsets"),
        (Case("int8", 1, 64, 1024), Config(warps=4, lift=True), "4 bits without"),
        (Case("uint4", 1, 64, 1024), Config(warps=4, pieces=3), "3 pieces for 4 warps"),
    ],
    ids=str,
)
def test_refuses(case: Case, config: Config, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        plan_of(case, config, 132).check()


@pytest.mark.parametrize(
    ("qtype", "layer", "config"), [("uint4", "gate_up", Config()), ("int8", "o", Config(pieces=2))]
)
def test_compiles_without_spills(qtype: str, layer: str, config: Config) -> None:
    n, k = LLAMA_8B[layer]
    plan = plan_of(Case(qtype, 16, n, k), config, 132)
    compiled = compile_for_h200(
        lambda *a: held_sm90.matmul(plan, *a),
        jax.ShapeDtypeStruct((16, k), jnp.bfloat16),
        jax.ShapeDtypeStruct((n // 16, k * 8 * plan.kind.words), jnp.uint8 if qtype == "uint4" else jnp.int8),
        jax.ShapeDtypeStruct((n // 16, plan.groups, 8, 2), ml_dtypes.bfloat16),
    )
    assert compiled.spill_bytes == 0
    pool = compiled.registers * (plan.block_warps // 4 + 1)
    assert plan.consumer_registers * (plan.block_warps // 4) + plan.producer_registers <= pool  # else it hangs
    # A tile's products, and nothing of x, are all that passes through the tensor core.
    assert compiled.count("mma.sync") % (plan.k_warp // 16 * plan.n_tiles) == 0
    assert compiled.count("ldmatrix") == plan.k_warp // 32 * plan.n_tiles
    assert dataclasses.replace(plan, m=8).x_registers == 32
    assert "BRA.U.ANY" not in compiled.sass  # ptxas knows that one lane alone copies
