"""quantize_rows, rms_norm_quantize, silu_mul_quantize against numpy float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KNOWN_DEVICES, explain, quantize_rows, rms_norm_quantize, silu_mul_quantize, use_device
from pallas_kernels.quantize import mosaic_sm90, reference
from pallas_kernels.quantize.cases import CASES, OPS, Case
from tests.pallas_kernels.aot import compile_for_h200

IMPLEMENTATIONS = ["xla"]


def make(case: Case, seed: int = 0):
    rng = np.random.default_rng(seed)
    width = 2 * case.k if case.op == "silu_mul_quantize" else case.k
    x = rng.normal(size=(case.m, width)) * 10.0 ** rng.uniform(-2, 2, size=(case.m, 1))
    return jnp.asarray(x, case.dtype)


def run(case: Case, x, implementation):
    """(xq, scale, new_residual or None, the float64 values that were to be quantized)."""
    common = dict(block=case.block, divisor=case.divisor, implementation=implementation)
    wide = np.asarray(x).astype(np.float64)
    if case.op == "quantize_rows":
        return *quantize_rows(x, case.qdtype, **common), None, wide
    if case.op == "silu_mul_quantize":
        gate, up = np.split(wide, 2, axis=1)
        return *silu_mul_quantize(x, qdtype=case.qdtype, **common), None, gate / (1 + np.exp(-gate)) * up
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=case.k) + 1, case.dtype)
    residual = jnp.asarray(rng.normal(size=x.shape), case.dtype) if case.op == "residual_rms_norm_quantize" else None
    out = rms_norm_quantize(x, weight, residual, eps=1e-5, qdtype=case.qdtype, **common)
    if residual is not None:
        wide = np.asarray((x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(case.dtype)).astype(np.float64)
    np.testing.assert_array_equal(np.asarray(out[2]).astype(np.float64), wide)
    normed = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-5) * np.asarray(weight).astype(np.float64)
    return *out, normed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, implementation):
    xq, scale, _, want = run(case, make(case), implementation)
    assert xq.dtype == jnp.dtype(case.qdtype) and scale.dtype == jnp.float32
    check_quantized(case, np.asarray(xq).astype(np.float64), np.asarray(scale).astype(np.float64), want)


def check_quantized(case: Case, xq, scale, want):
    m, k = want.shape
    block = case.block or max(k, 1)
    blocks = -(-k // block)
    assert xq.shape == (m, k) and scale.shape == (m, blocks)
    padded = np.zeros((m, blocks * block))
    padded[:, :k] = np.abs(want)
    absmax = padded.reshape(m, blocks, block).max(axis=2) if m else padded.reshape(0, blocks)
    np.testing.assert_allclose(scale, np.where(absmax == 0, 1, absmax / case.divisor), rtol=1e-5)
    expanded = np.repeat(scale, block, axis=1)[:, :k]
    steps = np.abs(xq * expanded - want) / expanded
    if case.qdtype == "int8":
        # Half a step of rounding plus 1e-4 for float32 on the way; divisor 127.5 clamps 127.5 to 127.
        assert (steps <= 0.5 + 1e-2 * (case.op != "quantize_rows") + 1e-4).all(), steps.max()
    else:
        # e4m3 has 3 mantissa bits: half an ulp is 2^-4 of the value; below 2^-6 the step is 2^-9.
        assert (steps <= np.maximum(np.abs(want / expanded) * (2.0**-4 + 1e-4), 2.0**-10 * 1.01)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("qdtype, divisor", [("int8", 127.0), ("float8_e4m3fn", 448.0)])
def test_extremes(qdtype, divisor, implementation):
    x = np.ones((6, 256), np.float32)
    x[0] = 0
    x[1, 3] = np.nan
    x[2, 5] = np.inf
    x[3] = 1e-30
    x[4] = 1e30
    xq, scale = quantize_rows(jnp.asarray(x), qdtype, divisor=divisor, implementation=implementation)
    with np.errstate(invalid="ignore"):
        back = np.asarray(xq).astype(np.float32) * np.asarray(scale)
    assert scale[0, 0] == 1 and (back[0] == 0).all()
    assert np.isnan(back[1]).any() and np.isnan(np.asarray(scale)[1]).all()
    assert not np.isfinite(back[2]).all() and np.isinf(np.asarray(scale)[2]).all()
    np.testing.assert_allclose(back[3:], x[3:], rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_static_scale_clamps(implementation):
    x = jnp.asarray([[1.0, -300.0, 300.0, 0.5]])
    xq, scale = quantize_rows(x, "int8", divisor=127, static_scale=jnp.float32(0.5), implementation=implementation)
    assert scale.shape == (1, 1) and np.asarray(xq).tolist() == [[2, -128, 127, 1]]
    xq, _ = quantize_rows(x, jnp.float8_e4m3fn, divisor=448, static_scale=0.5, implementation=implementation)
    assert np.asarray(xq).astype(np.float32).tolist() == [[2, -448, 448, 1]]


def test_wrong_arguments_are_named():
    x = jnp.ones((2, 8))
    with pytest.raises(ValueError, match="qdtype must be"):
        quantize_rows(x, "int4", divisor=7)
    with pytest.raises(ValueError, match="takes no block"):
        quantize_rows(x, "int8", block=4, divisor=127, static_scale=1.0)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm_quantize(x, jnp.ones(4), eps=1e-5, qdtype="int8", divisor=127)
    with pytest.raises(ValueError, match="2F"):
        silu_mul_quantize(jnp.ones((2, 7)), qdtype="int8", divisor=127)


# --- the Hopper kernels: numbers in interpret mode, machine code without a device ---


def hopper(case: Case, module, *, seed: int = 0, divisor: float | None = None, **options):
    """What `module` (mosaic_sm90 or reference) makes of the case: (xq, scale, ...) as numpy."""
    common = dict(block=case.block, divisor=divisor or case.divisor, **options)
    rng = np.random.default_rng(seed)
    x, residual, weight = make(case, seed), make(case, seed + 1), jnp.asarray(rng.normal(size=case.k) + 1, case.dtype)
    if case.op == "quantize_rows":
        out = module.quantize_rows(x, case.qdtype, **common)
    elif case.op == "silu_mul_quantize":
        out = module.silu_mul_quantize(x, qdtype=case.qdtype, **common)
    else:
        residual = residual if case.op == "residual_rms_norm_quantize" else None
        out = module.rms_norm_quantize(x, weight, residual, eps=1e-5, qdtype=case.qdtype, **common)
    return [np.asarray(o).astype(np.float32) for o in out]


HOPPER_CASES = (
    *(Case(op, 3, 1024, qdtype, block) for op in OPS for qdtype, block in (("int8", None), ("float8_e4m3fn", 128))),
    Case("quantize_rows", 2, 1536, "float8_e4m3fn", 128),  # runs of 4 elements a lane
    Case("residual_rms_norm_quantize", 2, 3584),  # seven warpgroups
    Case("quantize_rows", 2, 1024, "int8", dtype="float32"),
)


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_kernel_interpreted(case):
    """Against the XLA reference, which the tests above hold against float64."""
    divisor = 127.5 if case.qdtype == "int8" else None  # the divisor of vLLM's; it needs the clamp
    with use_device(KNOWN_DEVICES["h200"]), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = hopper(case, mosaic_sm90, divisor=divisor, interpretable=True)
    want = hopper(case, reference, divisor=divisor)
    assert [g.shape for g in got] == [w.shape for w in want]
    if case.op == "quantize_rows":
        for g, w in zip(got, want):
            np.testing.assert_array_equal(g, w)
        return
    # A sum in another order moves a value by an ulp, and a quotient over the edge between two codes now and then.
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    differs = got[0] != want[0]
    assert differs.mean() < 2e-3 and (np.abs(got[0] - want[0]) <= np.maximum(1, np.abs(want[0]) / 8)).all()
    for g, w in zip(got[2:], want[2:]):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("op", OPS)
def test_rows_in_turns_interpreted(op, monkeypatch):
    """A block that walks over rows, with the next one's loads in flight: what one block a row gives."""
    case = Case(op, 5, 1024, "float8_e4m3fn")
    monkeypatch.setitem(KNOWN_DEVICES, "h200", dataclasses.replace(KNOWN_DEVICES["h200"], core_count=2))
    with use_device(KNOWN_DEVICES["h200"]), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        want = hopper(case, mosaic_sm90, interpretable=True, config=mosaic_sm90.Split(1, 2, 1))
        got = hopper(case, mosaic_sm90, interpretable=True, config=mosaic_sm90.Split(1, 2, 1, persistent=True))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("split", [mosaic_sm90.Split(1, 2, 2, 2), mosaic_sm90.Split(1, 2, 4, persistent=True)], ids=str)
def test_silu_that_tells_nobody_anything_interpreted(split):
    """Block scales, and no scale at all: a row over several blocks, and a block that walks over rows."""
    case = Case("silu_mul_quantize", 3, 4096, "float8_e4m3fn", 128)
    with use_device(KNOWN_DEVICES["h200"]), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        want = hopper(case, mosaic_sm90, interpretable=True, config=mosaic_sm90.Split(1, 2, 4))
        got = hopper(case, mosaic_sm90, interpretable=True, config=split)
        x = make(case, 0)
        plain = mosaic_sm90.silu_mul(x, interpretable=True, config=split)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    rounded = (gate / (1 + np.exp(-gate))).astype(x.dtype).astype(np.float64)  # as Hugging Face's tensors are
    np.testing.assert_allclose(np.asarray(plain, np.float64), rounded * up, rtol=2.0**-6, atol=1e-30)


COMPILED = (
    *((op, 4096, 4096, block) for op in OPS for block in (None, 128)),
    ("residual_rms_norm_quantize", 1, 4096, None),
    ("silu_mul_quantize", 4096, 14336, None),
)


@pytest.mark.parametrize("op, m, k, block", COMPILED)
def test_hopper_kernel_compiles(op, m, k, block):
    S = jax.ShapeDtypeStruct
    common = dict(qdtype=jnp.float8_e4m3fn, block=block, divisor=448.0)
    x, weight = S((m, 2 * k if op == "silu_mul_quantize" else k), jnp.bfloat16), S((k,), jnp.bfloat16)
    norm = functools.partial(mosaic_sm90.rms_norm_quantize, eps=1e-5, **common)
    compiled = {
        "quantize_rows": lambda: compile_for_h200(lambda x: mosaic_sm90.quantize_rows(x, **common), x),
        "silu_mul_quantize": lambda: compile_for_h200(lambda x: mosaic_sm90.silu_mul_quantize(x, **common), x),
        "rms_norm_quantize": lambda: compile_for_h200(lambda x, w: norm(x, w)[:2], x, weight),
        "residual_rms_norm_quantize": lambda: compile_for_h200(norm, x, weight, x),
    }[op]()
    # 96 registers let five warpgroups share a multiprocessor: loads in flight hide the memory's latency.
    assert compiled.spill_bytes == 0 and compiled.registers <= 96
    assert "div." not in compiled.ptx  # neither the inexact division nor a slow one
    assert compiled.hlo.count("custom-call(") == 1  # one pass: nothing before or behind the kernel
    assert "fusion(" not in compiled.hlo


@pytest.mark.parametrize("lean", [False, True])
def test_rows_in_turns_fit_a_multiprocessor(lean):
    """896 threads may have 72 registers each."""
    config = mosaic_sm90.Split(7, 2, 2, persistent=True, lean=lean)
    call = functools.partial(mosaic_sm90.silu_mul_quantize, qdtype=jnp.int8, divisor=127.0, config=config)
    compiled = compile_for_h200(call, jax.ShapeDtypeStruct((4096, 28672), jnp.bfloat16))
    assert compiled.spill_bytes == 0 and compiled.registers <= 72


@pytest.mark.parametrize("op", ["rows", "silu", "norm", "residual_norm"])
def test_the_chosen_split_holds_the_row(op):
    for k in (512, 896 * 8, 4096, 8192, 12288, 14336, 28672):
        for m in (1, 64, 256, 257, 4096):
            s = mosaic_sm90.split(op, m, k)
            assert s.blocks * s.wgs * 4 * s.repeats * s.runs * 128 == k and s.per_thread <= 64
            assert (s.blocks > 1 or s.persistent) <= (op == "silu") and not (s.blocks > 1 and s.persistent)
    assert mosaic_sm90.split("silu", 64, 14336).blocks == 7 and mosaic_sm90.split("silu", 4096, 14336).persistent


@pytest.mark.parametrize("m", [16, 4096])
@pytest.mark.parametrize("options", [None, {"qdtype": "float8_e4m3fn", "divisor": 448.0, "block": 128}])
def test_silu_of_an_8b_model_compiles(m, options):
    """Unquantized (in front of 4-bit weights) and with block scales: no other block has to be told anything."""
    call = mosaic_sm90.silu_mul if options is None else functools.partial(mosaic_sm90.silu_mul_quantize, **options)
    compiled = compile_for_h200(call, jax.ShapeDtypeStruct((m, 28672), jnp.bfloat16))
    assert compiled.spill_bytes == 0 and "barrier.cluster" not in compiled.ptx and compiled.count("st.async") == 0


@pytest.mark.parametrize("qdtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("op, blocks, wgs, runs", [("silu", 7, 2, 2), ("silu", 4, 7, 1), ("rows", 4, 1, 2)])
def test_cluster_of_blocks_compiles(op, blocks, wgs, runs, qdtype):
    """A row shared by a cluster: every warp sends its number to every block, without a fence that waits for loads."""
    config = mosaic_sm90.Split(wgs, runs, 1, blocks, lean=True)
    common = dict(qdtype=qdtype, divisor=127.0 if qdtype == "int8" else 448.0, config=config)
    fn = mosaic_sm90.silu_mul_quantize if op == "silu" else mosaic_sm90.quantize_rows
    k = 28672 if op == "silu" else 4096
    compiled = compile_for_h200(lambda x: fn(x, **common), jax.ShapeDtypeStruct((16, k), jnp.bfloat16))
    assert compiled.spill_bytes == 0 and compiled.registers <= 48
    assert compiled.count("st.async") == 1 and compiled.count("mbarrier.arrive.expect_tx") == 1
    assert "fence.acq_rel" not in compiled.ptx and "MEMBAR" not in compiled.sass
    # Every block's barrier waits for the bytes of all warps of the cluster.
    assert compiled.count(f", {4 * blocks * wgs * 4};") == 2  # where the barrier lies, and what it expects
    assert compiled.hlo.count("custom-call(") == 1 and "fusion(" not in compiled.hlo


def test_blocks_with_scales_of_their_own_need_no_cluster():
    config = mosaic_sm90.Split(2, 2, 1, 7, lean=True)
    call = functools.partial(
        mosaic_sm90.silu_mul_quantize, qdtype=jnp.float8_e4m3fn, block=128, divisor=448.0, config=config
    )
    compiled = compile_for_h200(call, jax.ShapeDtypeStruct((16, 28672), jnp.bfloat16))
    assert compiled.spill_bytes == 0 and "barrier.cluster" not in compiled.ptx


def test_lean_saves_a_quarter_of_the_instructions():
    """SiLU of 14336 is bound by issue slots: 408 instructions of 28 warps take a multiprocessor 1.6 us a row."""
    x = jax.ShapeDtypeStruct((4096, 28672), jnp.bfloat16)
    count = {}
    for lean in (False, True):
        config = mosaic_sm90.Split(7, 2, 2, lean=lean)
        call = functools.partial(mosaic_sm90.silu_mul_quantize, qdtype=jnp.float8_e4m3fn, divisor=448.0, config=config)
        count[lean] = compile_for_h200(call, x).ptx.count(";")
    assert count[True] < 0.8 * count[False], count


def test_bits_of_magnitudes_order_as_integers():
    """What `exchange` reduces: |y| as unsigned integers, NaN on top."""
    values = np.array([0, 1e-45, 1e-38, 1, 1.5, 3e38, np.inf, np.nan], np.float32)
    assert (np.diff(values.view(np.uint32).astype(np.int64)) > 0).all()


def fused(a, b, c):
    """fma in float32: the product is exact in float64."""
    return np.float32(a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64))


def divide_as_kernel(y, scale, error):
    """`exact.divide` in numpy; `error`: of the hardware's reciprocal, in ulp (documented: at most 1)."""
    lift = np.where(scale < 2.0**-100, np.float32(2.0**64), np.float32(1))
    y, scale = y * lift, scale * lift
    rough = np.float32(1) / scale
    rough = rough + np.spacing(rough) * np.float32(error)
    r = fused(fused(-scale, rough, np.ones_like(scale)), rough, rough)
    first = y * r
    return fused(fused(-scale, first, y), r, first)


@pytest.mark.parametrize("error", [-1, 0, 1])
def test_quotient_is_rounded_once(error):
    rng = np.random.default_rng(0)
    count = 200_000
    magnitude = (rng.uniform(1, 2, count) * 2.0 ** rng.integers(-126, 100, count)).astype(np.float32)
    for divisor in (127.0, 127.5, 448.0):
        constant = np.full_like(magnitude, divisor)
        scale = divide_as_kernel(magnitude, constant, error)
        normal = magnitude > 1e-35  # the quotient itself is a normal number
        np.testing.assert_array_equal(scale[normal], (magnitude / constant)[normal])
        scale = (magnitude / constant)[normal]
        y = magnitude[normal] * rng.uniform(-1, 1, scale.size).astype(np.float32)
        np.testing.assert_array_equal(divide_as_kernel(y, scale, error), y / scale)
        # a row's extreme is where the codes' edge is: -127.5 rounds to -128, one ulp less to -127
        np.testing.assert_array_equal(divide_as_kernel(-magnitude[normal], scale, error), -magnitude[normal] / scale)


def test_product_with_the_reciprocal_keeps_codes():
    """`exact.reciprocal` in numpy: at most 2^-17 of the fp8 codes differ from those of the exact quotient, by one."""
    rng = np.random.default_rng(0)
    absmax = (rng.uniform(1, 2, 200) * 2.0 ** rng.integers(-60, 60, 200)).astype(np.float32)[:, None]
    scale = absmax / np.float32(448)
    y = (absmax * rng.uniform(-1, 1, (200, 5000))).astype(np.float32)
    for error in (-1, 0, 1):
        rough = np.float32(1) / scale
        rough = rough + np.spacing(rough) * np.float32(error)
        r = fused(fused(-scale, rough, np.ones_like(scale)), rough, rough)
        got, want = ((v).astype(jnp.float8_e4m3fn).astype(np.float32) for v in (y * r, y / scale))
        assert (got != want).mean() <= 2.0**-17 and (np.abs(got - want) <= np.abs(want) / 8 + 2.0**-9).all()
        extreme = (np.float32([-1, 1]) * absmax * r).astype(jnp.float8_e4m3fn).astype(np.float32)
        assert (np.abs(extreme) == 448).all()


def test_shared_reciprocal_of_two_sigmoids():
    """`exact.sigmoid` in numpy, over all pairs of gates that bf16 activations come with."""
    x = np.concatenate([np.linspace(-43, 43, 401), [-1e30, -100, 100, 1e30]]).astype(np.float32)
    a = (1 + np.exp(np.minimum(-x, 43))).astype(np.float32)
    product = a[:, None] * a[None, :]
    reciprocal = np.float32(1) / product
    assert np.isfinite(product).all() and (reciprocal >= np.finfo(np.float32).tiny).all()
    got = reciprocal * a[None, :]  # of the rows' x
    want = np.broadcast_to(1 / (1 + np.exp(-np.maximum(x, -43).astype(np.float64)))[:, None], got.shape)
    np.testing.assert_allclose(got, want, rtol=4e-7)


def test_refusals_give_the_reason():
    S = jax.ShapeDtypeStruct
    h200 = KNOWN_DEVICES["h200"]
    for shape, block, reason in (((4, 896), None, "512"), ((0, 1024), None, "M = 0"), ((4, 1024), 64, "block")):
        choice = explain(
            "quantize_rows", S(shape, jnp.bfloat16), qdtype=jnp.int8, block=block, divisor=127.0, device=h200
        )
        assert choice.chosen == "xla" and reason in dict(choice.refused)["mosaic_sm90"]
    choice = explain("silu_mul_quantize", S((7, 28672), jnp.bfloat16), qdtype=jnp.int8, divisor=127.0, device=h200)
    assert choice.chosen == "mosaic_sm90"
