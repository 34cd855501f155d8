"""Reading ahead: what is asked for, and that the kernels which ask compile to asking and to no more registers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import rms_norm, rms_norm_quantize, silu_mul
from pallas_kernels.ahead import BLOCKS, Ahead, Request, spare_blocks
from pallas_kernels.quantize import mosaic_sm90
from pallas_kernels.rope_write import mosaic_sm90 as rope_write
from tests.pallas_kernels.aot import compile_for_h200

S = jax.ShapeDtypeStruct
ASKS = "cp.async.bulk.prefetch.L2"


@pytest.mark.parametrize(
    "shape, dtype, size, wanted",
    [
        ((28672, 4096), jnp.float8_e4m3fn, 8 << 20, Request(28672, 4096, 256, 256)),  # 292 a row
        ((28672, 4096), jnp.float8_e4m3fn, 1 << 40, Request(28672, 4096, 4096, 4096)),
        ((256, 64, 512), jnp.uint8, 8 << 20, Request(256, 32768, 32768, 16384)),
        ((256, 64, 512), jnp.uint8, 256 * 20000, Request(256, 32768, 19968, 16384)),
        ((4096,), jnp.bfloat16, 1000, Request(1, 8192, 896, 896)),
        ((28672, 4096), jnp.float8_e4m3fn, 1 << 20, None),  # less than a line a row
        ((64, 100), jnp.bfloat16, 1 << 20, None),  # rows begin within a line
    ],
)
def test_what_is_asked_for(shape, dtype, size, wanted):
    assert Ahead(S(shape, dtype), size).request() == wanted


@pytest.mark.parametrize(
    "request_", [Request(5, 4096, 4096, 1024), Request(3, 1024, 896, 384), Request(1, 512, 128, 128)]
)
def test_each_byte_once(request_):
    """The first `take` bytes of every row, each once, nothing else; a copy engine wants multiples of 16."""
    seen = [0] * (request_.rows * request_.stride)
    for index in range(request_.pieces):
        row, start, size = request_.place(index, min)
        assert size > 0 and start % 16 == size % 16 == 0
        for at in range(row * request_.stride + start, row * request_.stride + start + size):
            seen[at] += 1
    row = [1] * request_.take + [0] * (request_.stride - request_.take)
    assert seen == row * request_.rows


@pytest.mark.parametrize("m", [1, 64, BLOCKS])
def test_the_kernels_that_ask_compile(m):
    x, norm, weight = S((m, 4096), jnp.bfloat16), S((4096,), jnp.bfloat16), S((28672, 4096), jnp.float8_e4m3fn)
    size = 8 << 20

    def plain(x, norm, weight, ahead):
        return mosaic_sm90.rms_norm(x, norm, x, eps=1e-5, ahead=ahead)

    def quantized(x, norm, weight, ahead):
        return mosaic_sm90.rms_norm_quantize(x, norm, x, eps=1e-5, qdtype=jnp.int8, divisor=127.0, ahead=ahead)

    def silu(x, norm, weight, ahead):
        y = jnp.concatenate([x] * 7, axis=1)
        return mosaic_sm90.silu_mul_quantize(y, qdtype=jnp.float8_e4m3fn, divisor=448.0, ahead=ahead)

    def asked(kernel, x, norm, weight):
        return kernel(x, norm, weight, Ahead(weight, size))

    for kernel in (plain, quantized, silu):
        without = compile_for_h200(functools.partial(kernel, ahead=None), x, norm, weight)
        asking = compile_for_h200(functools.partial(asked, kernel), x, norm, weight)
        assert without.count(ASKS) == 0 and asking.count(ASKS) >= 1
        assert asking.spill_bytes == 0 and asking.registers <= without.registers + 8


def test_the_rotary_embedding_asks():
    pages, angles = S((64, 8, 64, 128), jnp.bfloat16), S((1, 64), jnp.float32)
    args = S((1, 6144), jnp.bfloat16), angles, angles, S((1,), jnp.int32), pages, pages, S((4096, 2048), jnp.uint8)
    asking = compile_for_h200(lambda *a: rope_write.rope_write(*a[:-1], ahead=Ahead(a[-1], 8 << 20)), *args)
    assert asking.count(ASKS) >= 1 and asking.spill_bytes == 0


def test_many_rows_do_not_ask():
    """A kernel with more blocks than multiprocessors is no idle one."""
    assert [spare_blocks(blocks) for blocks in (1, BLOCKS, 1000)] == [BLOCKS - 1, 0, 0]
    x, norm, weight = S((BLOCKS + 1, 4096), jnp.bfloat16), S((4096,), jnp.bfloat16), S((512, 4096), jnp.uint8)
    compiled = compile_for_h200(
        lambda x, n, w: mosaic_sm90.rms_norm(x, n, eps=1e-5, ahead=Ahead(w, 1 << 20)), x, norm, weight
    )
    assert compiled.count(ASKS) == 0


def test_elsewhere_it_changes_nothing():
    x, norm, weight = jnp.ones((2, 512), jnp.bfloat16), jnp.ones(512, jnp.bfloat16), jnp.ones((64, 512), jnp.int8)
    ahead = Ahead(weight, 1 << 20)
    assert rms_norm(x, norm, eps=1e-5, ahead=ahead)[0].shape == x.shape
    assert silu_mul(x, ahead=ahead).shape == (2, 256)
    assert rms_norm_quantize(x, norm, eps=1e-5, qdtype=jnp.int8, divisor=127.0, ahead=ahead)[0].shape == x.shape
