"""scaled_matmul: every implementation against float64 arithmetic on the dequantized operands."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from bench.kernel_variants import CHECKS, MS, matmul_variants
from pallas_kernels import KNOWN_DEVICES, explain, scaled_matmul, use_device
from pallas_kernels.scaled_matmul import mosaic_sm90
from pallas_kernels.scaled_matmul.cases import (
    CASES,
    DEVICE_CASES,
    LLAMA_8B,
    LLAMA_70B,
    Case,
    error_bound,
    expected,
    make,
)
from pallas_kernels.scaled_matmul.choice import choose_config
from pallas_kernels.scaled_matmul.config import SMEM_BYTES, Config, fill_stages, heuristic, search_space
from tests.pallas_kernels.aot import compile_for_h200


def check(case: Case, out, operands):
    want, magnitude = expected(*operands)
    got = np.asarray(out).astype(np.float64)
    assert got.shape == want.shape and out.dtype == jnp.dtype(case.out_dtype)
    error = np.abs(got - want)
    bound = error_bound(case, want, magnitude)
    assert (error <= bound).all(), f"{case}: worst error/bound {np.max(error / bound):.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    operands = make(case)
    out = scaled_matmul(*map(as_jax, operands), out_dtype=case.out_dtype, implementation="xla")
    check(case, out, operands)


def as_jax(a):
    return None if a is None else jnp.asarray(a)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(xq=(4, 128)), "want xq"),
        (dict(x_scale=(4, 3)), "x_scale must be"),
        (dict(w_scale=(3, 1)), "w_scale must be"),
        (dict(bias=(7,)), "bias must be"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = dict(xq=(4, 256), wq=(256, 256), x_scale=(4, 1), w_scale=(256, 1), bias=(256,)) | change
    quantized = lambda name: jnp.zeros(shapes[name], jnp.int8)  # noqa: E731
    floats = lambda name: jnp.ones(shapes[name], jnp.float32)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        scaled_matmul(quantized("xq"), quantized("wq"), floats("x_scale"), floats("w_scale"), floats("bias"))


def test_nan_and_inf_stay_in_their_row():
    case = Case(4, 256, 256)
    xq, wq, x_scale, w_scale, _ = make(case)
    xq[1, 7] = np.nan
    x_scale[2] = np.inf
    out = np.asarray(scaled_matmul(*map(as_jax, (xq, wq, x_scale, w_scale)), out_dtype=jnp.float32))
    assert np.isnan(out[1]).all() and not np.isfinite(out[2]).any() and np.isfinite(out[[0, 3]]).all()


def test_int8_sums_beyond_int32():
    """The kernel refuses them; XLA's one product would wrap around to a negative number."""
    k = 2**17 + 128
    x, w, one = jnp.full((1, k), -128, jnp.int8), jnp.full((8, k), -128, jnp.int8), jnp.ones((1, 1))
    assert (np.asarray(scaled_matmul(x, w, one, one, out_dtype=jnp.float32)) == 128 * 128 * float(k)).all()


def test_jit_and_grad_free_trace():
    case = CASES[0]
    xq, wq, x_scale, w_scale, _ = map(as_jax, make(case))
    shape = jax.eval_shape(scaled_matmul, xq, wq, x_scale, w_scale)
    assert shape.shape == (case.m, case.n) and shape.dtype == jnp.bfloat16


# --- the Hopper kernel: numbers in interpret mode (whose sums are float32), machine code without a device ---


def interpret(fn, *args):
    """fn(*args) with Mosaic GPU kernels interpreted, as for an H200."""
    with use_device(KNOWN_DEVICES["h200"]), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return fn(*args)


INTERPRETED = (
    (Case(5, 384, 640, scales="tensor"), None),
    (Case(3, 200, 96, "int8"), None),  # N of half a store tile, K of less than one step
    (Case(130, 64, 256, "int8", bias=True), None),  # M of 130 rows in tiles of 128
    (Case(9, 128, 640, scales="block"), None),
    (Case(9, 128, 640, scales="x block"), Config(32, tile_k=128, stages=3, epilogue_n=16)),
    # Two tiles a block, whose chunks of x scales end early (5 steps); columns that straddle two scale blocks; 2 groups
    # of warpgroups that split K.
    (Case(8, 384, 640, scales="block"), Config(48, tile_k=128, stages=3, epilogue_n=16)),
    (Case(8, 192, 512, bias=True), Config(48, wgs_k=2, tile_k=128, stages=2, epilogue_n=16, promote=True)),
)

# Structures that no heuristic chooses at these sizes (bench/kernel_variants.py): 3 multiprocessors, so that teams take
# turns and rings wrap around between tiles.
MANY_ROWS = Config(
    64, 2, m_groups=2, stages=3, epilogue_n=16, out_slots=4, one_commit=True, overwrite=True, late_release=True
)
MANY_ROWS_112 = dataclasses.replace(MANY_ROWS, wg_n=112, out_slots=7)
INTERPRETED_VARIANTS = (
    # ping-pong: an odd number of tiles and of K steps
    (Case(200, 336, 384, bias=True), Config(48, teams=2, stages=4, epilogue_n=16, out_slots=3)),
    (Case(200, 336, 384, scales="block"), Config(48, teams=2, stages=2, epilogue_n=16)),
    (Case(16, 384, 384, bias=True), Config(64, stages=2, epilogue_n=32, late_scales=True)),
    (Case(70, 448, 512, scales="block"), Config(112, stages=3, epilogue_n=16)),
    (Case(16, 400, 512, scales="block"), Config(192, stages=2, epilogue_n=32)),
    (Case(70, 224, 1024, scales="block"), Config(112, stages=3, epilogue_n=16, overlap=4)),
    # stores in the next tile's first steps: five tiles for three blocks, the last of one still to be stored
    (Case(70, 320, 512, bias=True), Config(64, 2, stages=3, epilogue_n=32, deferred=True)),
    (Case(70, 320, 512, "int8", bias=True), Config(64, 2, stages=3, epilogue_n=32, deferred=True, late_scales=True)),
    (Case(70, 320, 512, out_dtype="float32"), Config(64, 2, stages=3, epilogue_n=32, deferred=True)),
    (Case(200, 160, 640, scales="block", bias=True), Config(32, 2, stages=2, epilogue_n=16, deferred=True)),
    (Case(200, 320, 384, scales="block"), Config(64, 2, stages=2, epilogue_n=16, turns=True)),
    (
        Case(200, 128, 512, scales="block"),
        Config(32, 2, tile_k=256, stages=2, epilogue_n=16, turns=True, deferred=True),
    ),
    (Case(16, 400, 384), Config(64, stages=2, epilogue_n=16, out_slots=4, one_commit=True)),
    # stages given back late, and 64 rows of a warpgroup after the other: several tiles a block, columns of two scales
    (Case(200, 320, 384, scales="block"), Config(64, 2, stages=2, epilogue_n=16, late_release=True)),
    (Case(300, 448, 384, scales="block", bias=True), MANY_ROWS_112),
    (Case(300, 256, 384, scales="w block"), dataclasses.replace(MANY_ROWS, turns=True)),
    (Case(300, 256, 512, scales="x block"), dataclasses.replace(MANY_ROWS, tile_k=256, stages=2, one_commit=False)),
)


@pytest.mark.parametrize("case, config", INTERPRETED + INTERPRETED_VARIANTS, ids=str)
def test_hopper_kernel_interpreted(case, config, monkeypatch):
    operands = make(case)
    few = dataclasses.replace(KNOWN_DEVICES["h200"], core_count=3)  # so that a block walks over several tiles
    monkeypatch.setitem(KNOWN_DEVICES, "h200", few)
    call = functools.partial(mosaic_sm90.scaled_matmul, out_dtype=case.out_dtype, config=config, interpretable=True)
    check(case, interpret(call, *map(as_jax, operands)), operands)


def shapes_of(case: Case):
    small = make(dataclasses.replace(case, m=1 if case.m else 0, n=8, k=128))  # for the dtypes, without the numbers
    kb, nb = -(-case.k // 128), -(-case.n // 128)
    tensor = case.scales == "tensor"
    x_scale = (1, 1) if tensor else (case.m, kb if case.scales in ("block", "x block") else 1)
    w_scale = (1, 1) if tensor else (nb, kb) if case.scales in ("block", "w block") else (case.n, 1)
    wanted = ((case.m, case.k), (case.n, case.k), x_scale, w_scale, (case.n,))
    return [None if o is None else jax.ShapeDtypeStruct(shape, o.dtype) for o, shape in zip(small, wanted)]


# (case, config or None for the heuristic's): one of each structure; the largest of 8B with its 168 registers.
COMPILED = (
    (Case(16, 6144, 4096), None),
    (Case(64, 4096, 14336, scales="block"), None),
    (Case(256, 28672, 4096, "int8", bias=True), None),
    (Case(4096, 4096, 4096), None),
    (Case(4096, 6144, 4096, scales="block"), None),
    (Case(64, 6144, 4096, scales="block"), Config(48, wgs_k=2, tile_k=512, stages=2, epilogue_n=16, promote=True)),
    (Case(256, 4096, 4096, "int8"), Config(64, wgs_m=2, wgs_n=2, epilogue_n=32, cluster=2)),
)


@pytest.mark.parametrize("case, config", COMPILED, ids=str)
def test_hopper_kernel_compiles(case, config):
    shapes = [s for s in shapes_of(case) if s is not None]
    call = functools.partial(mosaic_sm90.scaled_matmul, out_dtype=case.out_dtype, config=config)
    compiled = compile_for_h200(call, *shapes)
    block = case.scales == "block"
    if config is None:
        config = heuristic(case.m, case.n, case.k, block=block)
    assert compiled.spill_bytes == 0 and "wgmma" in compiled.ptx
    if config.cluster > 1:
        # few threads arrive for a warpgroup on a cluster's barrier: its other warps must have read the slot
        before = compiled.ptx[: compiled.ptx.index("mbarrier.arrive.shared::cluster")]
        tail = before[before.rindex("wgmma.wait_group") :]
        assert "bar.sync" in tail or "barrier.sync" in tail
    if config.consumers > 1:
        # setmaxnreg waits for ever when the warpgroups ask for more registers than ptxas gave the block
        assert 40 + config.consumers * config.registers <= compiled.registers * (config.consumers + 1)


# Structures that wait for their measurement; the interpreter knows no peer's shared memory (split K).
COMPILED_VARIANTS = (
    (Case(4096, 6144, 4096), Config(192, m_groups=2, teams=2, epilogue_n=32, stages=4)),
    (Case(4096, 6144, 4096, scales="block"), Config(128, 2, epilogue_n=32, stages=6, overlap=4)),
    (Case(4096, 6144, 4096), None),  # the heuristic's own, for many rows
    (Case(4096, 6144, 4096, "int8"), None),
    (Case(4096, 4096, 14336, out_dtype="float32"), None),
    (Case(4096, 6144, 4096, scales="block"), None),
    (Case(4096, 4096, 4096, scales="block"), None),
    (
        Case(4096, 6144, 4096, scales="block"),
        Config(128, 2, epilogue_n=32, stages=6, stripe=16, turns=True, deferred=True),
    ),
    (Case(256, 4096, 14336, scales="block"), Config(128, 2, epilogue_n=32, stages=5, cluster=2, cluster_axis="k")),
    # several m_groups: two accumulators beside the sums would spill
    *((Case(4096, 4096, 4096, scales="block"), c) for c in matmul_variants("o", 4096, 4096, "block", 4096)),
    *((Case(256, 28672, 4096, scales="block"), c) for c in matmul_variants("gate_up", 28672, 4096, "block", 256)[:3]),
)


@pytest.mark.parametrize("case, config", COMPILED_VARIANTS, ids=str)
def test_variant_compiles(case, config):
    shapes = [s for s in shapes_of(case) if s is not None]
    compiled = compile_for_h200(functools.partial(mosaic_sm90.scaled_matmul, config=config), *shapes)
    assert compiled.spill_bytes == 0
    # C7510 to C7519: ptxas would wait for each wgmma by itself, which costs half of the speed.
    assert "wgmma.mma_async instructions are serialized" not in compiled.report


def test_variants_are_legal():
    """Every structure that bench.kernel_scaled --variants times fits, for each shape and M."""
    for mode in ("row", "block"):
        for shape, (n, k) in LLAMA_8B.items():
            for m in MS:
                for config in matmul_variants(shape, n, k, mode, m):
                    assert config.refusal(m, n, k, mode == "block") is None and config.stages >= 2
            assert 4 <= len(matmul_variants(shape, n, k, mode, 4096)) <= 8
            assert mode == "row" or 5 <= len(matmul_variants(shape, n, k, mode, 256)) <= 8
    for case, config in CHECKS:
        block = "block" in case.scales
        assert config.refusal(case.m, case.n, case.k, block) is None, (case, config)
        assert config.smem_bytes(case.m, case.k, 2, block) <= SMEM_BYTES


def test_refusals_give_the_reason():
    h200 = KNOWN_DEVICES["h200"]
    for case, reason in (
        (Case(9, 100, 48), "multiple of 8"),
        (Case(3, 200, 200), "multiple of 128"),
        (Case(0, 256, 256), "M = 0"),
    ):
        choice = explain("scaled_matmul", *shapes_of(case)[:4], device=h200)
        assert choice.chosen == "xla" and reason in dict(choice.refused)["mosaic_sm90"]
    for case in (CASES[0], CASES[8], CASES[14], *DEVICE_CASES[3:5]):  # a second of tracing each
        choice = explain("scaled_matmul", *shapes_of(case), device=h200, out_dtype=case.out_dtype)
        shape_fits = case.m and case.n % 8 == 0 and (case.k % 128 == 0 or case.k < 128)
        assert choice.chosen == ("mosaic_sm90" if shape_fits else "xla"), choice
    assert explain("scaled_matmul", *shapes_of(CASES[0]), device=KNOWN_DEVICES["l4"]).chosen == "xla"


@pytest.mark.parametrize("block", [False, True])
def test_heuristic_is_legal_and_fills_the_gpu(block):
    for n, k in {*LLAMA_8B.values(), *LLAMA_70B.values(), (1024, 4096), (151936, 896), (128, 128), (48, 7168)}:
        for m in (1, 2, 8, 16, 24, 64, 65, 128, 200, 256, 384, 512, 1000, 2048, 4096, 8192):
            config = fill_stages(heuristic(m, n, k, block=block), m, k, 2, block)
            assert config.smem_bytes(m, k, 2, block) <= SMEM_BYTES and config.stages >= 2, (m, n, k, config)
            assert config.wg_n % 16 == 0 and config.wg_n <= (192 if block else 256)
            assert config.refusal(m, n, k, block) is None, (m, n, k, config)
            tiles = -(-m // config.tile_m) * -(-n // config.tile_n) * config.split_k
            # No multiprocessor idles through most of the work: the last round is full, or there are many rounds.
            narrowest = -(-m // config.tile_m) * -(-n // 32)
            assert tiles > 0.6 * min(132, narrowest), (m, n, k, config)
            assert tiles / (132 * -(-tiles // 132)) > (0.5 if narrowest > 132 else 0), (m, n, k, tiles, config)


def test_search_space_is_legal():
    for m, least in ((16, 20), (4096, 8)):
        found = list(search_space(m, 6144, 4096, block=True))
        assert len(found) >= least and all(c.smem_bytes(m, 4096, 2, True) <= SMEM_BYTES for c in found)
        assert not any(c.refusal(m, 6144, 4096, True) for c in found)


def test_overwrite_is_for_fp8():
    with pytest.raises(NotImplementedError, match="for fp8"):
        choose_config(256, 4096, 4096, "int8", True, 2, MANY_ROWS)


def hopper_fp8_sum(x, w, interval, bits=13):
    """x [M, K] @ w [N, K]^T as Hopper's fp8 wgmma sums: 32 products and the accumulator are aligned to the largest of
    them and cut `bits` bits below; every `interval` of K the sum is added to a float32 one."""
    m, k = x.shape
    total = np.zeros((m, w.shape[0]), np.float32)
    for start in range(0, k, interval):
        acc = np.zeros(total.shape)
        for j in range(start, min(k, start + interval), 32):
            products = x[:, None, j : j + 32] * w[None, :, j : j + 32]
            largest = np.maximum(np.abs(products).max(-1), np.abs(acc))
            unit = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-300))) - bits)
            acc = (np.trunc(products / unit[..., None]).sum(-1) + np.trunc(acc / unit)) * unit
        total = total + acc.astype(np.float32)
    return total


# (K, promotion interval) -> relative Frobenius error, as `mosaic_sm90` states it for K = 14336; the first three were
# measured on an H200 (0.0028, 0.0005, 0.00025 after taking off the rounding to bf16).
STATED = (
    (14336, 14336, 0.0028),
    (14336, 1024, 0.0005),
    (14336, 512, 0.00033),
    (14336, 256, 0.00022),
    (4096, 512, 0.0004),
)


@pytest.mark.parametrize("k, interval, stated", STATED)
def test_error_of_fp8_sums(k, interval, stated):
    rng = np.random.default_rng(0)
    x, w = (np.asarray(rng.normal(size=(12, k)) * 64, jnp.float8_e4m3fn).astype(np.float64) for _ in range(2))
    want = x @ w.T
    error = np.abs(hopper_fp8_sum(x, w, interval) - want)
    relative = np.linalg.norm(error) / np.linalg.norm(want)
    assert 0.75 * stated < relative < 1.3 * stated, relative
    case = Case(12, 12, k, out_dtype="float32")
    assert (error <= error_bound(case, want, np.abs(x) @ np.abs(w).T, tensor_cores=True)).all()


def test_early_launch(monkeypatch):
    """The same numbers with the first weights fetched ahead (the interpreter knows no dependent launches)."""
    for name in ("griddepcontrol_wait", "griddepcontrol_launch_dependents"):
        monkeypatch.setattr(mosaic_sm90.plgpu, name, lambda: None)
    monkeypatch.setitem(KNOWN_DEVICES, "h200", dataclasses.replace(KNOWN_DEVICES["h200"], core_count=2))
    case = Case(8, 144, 640)
    config = Config(48, tile_k=128, stages=3, epilogue_n=16, early_launch=True)
    operands = make(case)
    call = functools.partial(mosaic_sm90.scaled_matmul, config=config, after=jnp.zeros(3))
    check(case, interpret(call, *map(as_jax, operands)), operands)


def test_early_launch_compiles():
    config = dataclasses.replace(fill_stages(heuristic(16, 4096, 4096, block=False), 16, 4096), early_launch=True)
    shapes = [s for s in shapes_of(Case(16, 4096, 4096)) if s is not None]
    compiled = compile_for_h200(functools.partial(mosaic_sm90.scaled_matmul, config=config), *shapes)
    assert compiled.count("griddepcontrol.wait") == compiled.count("griddepcontrol.launch_dependents") == 1
