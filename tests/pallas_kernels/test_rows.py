"""rms_norm and silu_mul: XLA against float64, the Hopper kernels interpreted against XLA, and compiled."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KNOWN_DEVICES, explain, rms_norm, silu_mul, use_device
from pallas_kernels.quantize import mosaic_sm90
from pallas_kernels.rows import reference
from tests.pallas_kernels.aot import compile_for_h200


def data(m, k, dtype=jnp.bfloat16, count=2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(m, k)), dtype) for _ in range(count)], jnp.asarray(rng.normal(size=k), dtype)


def wide(a):
    return np.asarray(a).astype(np.float64)


@pytest.mark.parametrize("dtype, step", [(jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11), (jnp.float32, 1e-6)])
def test_against_float64(dtype, step):
    (x, r), w = data(5, 200, dtype)
    y, total = rms_norm(x, w, r, eps=1e-5)
    assert y.dtype == total.dtype == dtype
    np.testing.assert_allclose(wide(total), wide(x) + wide(r), rtol=step)
    want = wide(total) / np.sqrt(np.mean(wide(total) ** 2, axis=1, keepdims=True) + 1e-5) * wide(w)
    np.testing.assert_allclose(wide(y), want, rtol=2 * step)  # two roundings
    gate, up = np.split(wide(x), 2, axis=1)
    np.testing.assert_allclose(wide(silu_mul(x)), gate / (1 + np.exp(-gate)) * up, rtol=2 * step, atol=1e-7)


@pytest.mark.parametrize("residual", [False, True])
def test_hopper_norm_interpreted(residual):
    (x, r), w = data(3, 1024)
    args = (x, w, r if residual else None)
    with use_device(KNOWN_DEVICES["h200"]), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = mosaic_sm90.rms_norm(*args, eps=1e-5, interpretable=True)
    want = reference.rms_norm(*args, eps=1e-5)
    np.testing.assert_array_equal(wide(got[1]), wide(want[1]))
    np.testing.assert_allclose(wide(got[0]), wide(want[0]), rtol=2.0**-7)  # a sum in another order: one step at most
    assert (wide(got[0]) != wide(want[0])).mean() < 1e-2


def test_hopper_silu_interpreted():
    (x, _), _ = data(2, 2048)
    with use_device(KNOWN_DEVICES["h200"]), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = mosaic_sm90.silu_mul(x, interpretable=True)
    np.testing.assert_allclose(wide(got), wide(reference.silu_mul(x)), rtol=2.0**-7)
    assert (wide(got) != wide(reference.silu_mul(x))).mean() < 1e-2


@pytest.mark.parametrize("m", [1, 4096])
def test_hopper_kernels_compile(m):
    S = jax.ShapeDtypeStruct
    x, w = S((m, 4096), jnp.bfloat16), S((4096,), jnp.bfloat16)
    norm = compile_for_h200(functools.partial(mosaic_sm90.rms_norm, eps=1e-5), x, w, x)
    silu = compile_for_h200(mosaic_sm90.silu_mul, S((m, 28672), jnp.bfloat16))
    for compiled in (norm, silu):
        assert compiled.spill_bytes == 0 and compiled.registers <= 96
        assert compiled.hlo.count("custom-call(") == 1 and "fusion(" not in compiled.hlo


def test_choice_and_errors():
    S = jax.ShapeDtypeStruct
    h200 = KNOWN_DEVICES["h200"]
    assert explain("silu_mul", S((7, 28672), jnp.bfloat16), device=h200).chosen == "mosaic_sm90"
    refused = explain("rms_norm", S((7, 896), jnp.bfloat16), S((896,), jnp.bfloat16), eps=1e-5, device=h200)
    assert refused.chosen == "xla" and "512" in dict(refused.refused)["mosaic_sm90"]
    assert rms_norm(jnp.ones((0, 512)), jnp.ones(512), eps=1e-5)[0].shape == (0, 512)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(jnp.ones((2, 8)), jnp.ones(4), eps=1e-5)
    with pytest.raises(ValueError, match="residual must be"):
        rms_norm(jnp.ones((2, 8)), jnp.ones(8), jnp.ones((1, 8)), eps=1e-5)
    with pytest.raises(ValueError, match="2F"):
        silu_mul(jnp.ones((2, 7)))
