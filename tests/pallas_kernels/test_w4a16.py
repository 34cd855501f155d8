"""w4a16: the XLA reference against numpy, the fragment layout, and the decode kernel compiled for an H200."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.a16 import decode_sm90, fragments, wgmma_sm90
from pallas_kernels.a16.stored import KINDS
from pallas_kernels.w4a16.api import w4a16_matmul
from tests.pallas_kernels.aot import compile_for_h200


@pytest.mark.parametrize("kind", ["none", "int", "offset"])
@pytest.mark.parametrize(("m", "k", "group"), [(1, 256, 128), (5, 200, 64), (3, 96, -1), (0, 128, 32)])
def test_reference_is_the_formula(m: int, k: int, group: int, kind: str) -> None:
    rng, n = np.random.default_rng(m), 24
    size = k if group == -1 else group
    groups = -(-k // size)
    x = rng.standard_normal((m, k)).astype(np.float32)
    u = rng.integers(0, 16, (n, k))
    scale, offset = (rng.standard_normal((n, groups)).astype(np.float32) for _ in range(2))
    zero = rng.integers(0, 16, (n, groups)).astype(np.uint8)
    columns = np.arange(k) // size
    w = (u - (zero[:, columns].astype(int) if kind == "int" else 8)) * scale[:, columns].astype(np.float64)
    w = w + (offset[:, columns] if kind == "offset" else 0)
    perm = rng.permutation(k).astype(np.int32)
    y = w4a16_matmul(
        x=jnp.asarray(x),
        qweight=jnp.asarray((u[:, ::2] | u[:, 1::2] << 4).astype(np.uint8)),
        scale=jnp.asarray(scale),
        zero=jnp.asarray(zero) if kind == "int" else None,
        offset=jnp.asarray(offset) if kind == "offset" else None,
        perm=jnp.asarray(perm),
        group_size=group,
    )
    # float32 sums of k products: far inside 1e-5 of the sum of magnitudes.
    np.testing.assert_array_less(np.abs(y - x[:, perm] @ w.T), 1e-5 * (np.abs(x[:, perm]) @ np.abs(w.T)) + 1e-6)


def test_act_order_in_bfloat16_sums_in_float32() -> None:
    rng, (m, n, k) = np.random.default_rng(0), (8, 64, 4096)
    x, perm = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16), rng.permutation(k)
    packed, scale = rng.integers(0, 256, (n, k // 2), dtype=np.uint8), np.full((n, k // 128), 0.125)
    w = (np.stack([packed & 15, packed >> 4], -1).reshape(n, k).astype(int) - 8) * 0.125
    arrays = jnp.asarray(packed), jnp.asarray(scale, jnp.bfloat16)
    y = w4a16_matmul(x, *arrays, perm=jnp.asarray(perm), group_size=128)
    want = np.asarray(x, np.float64)[:, perm] @ w.T
    assert np.linalg.norm(np.asarray(y, np.float64) - want) < 0.003 * np.linalg.norm(
        want
    )  # the result's rounding alone


def test_fragments_are_the_mma_operand_and_invertible() -> None:
    rng, n, k = np.random.default_rng(0), 32, 128
    q = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
    packed = np.asarray(fragments.pack4(jnp.asarray(q)))
    np.testing.assert_array_equal(fragments.unpack4(jnp.asarray(packed)), q)
    u = np.stack([q & 15, q >> 4], axis=-1).reshape(n, k)
    words = packed.reshape(n // 16, k // 64, 8, 4, 16).view("<u4")  # tile, block, g, c, step
    t, b, g, c, s, i, e = np.indices((n // 16, k // 64, 8, 4, 4, 4, 2))
    # Register a_i: row g (+ 8 for odd i), columns 2 c + e (+ 8 for i >= 2); nibble i + 4 e of the word.
    expected = u[16 * t + g + 8 * (i % 2), 64 * b + 16 * s + 8 * (i // 2) + 2 * c + e]
    np.testing.assert_array_equal(words[t, b, g, c, s] >> (4 * (i + 4 * e)).astype(np.uint32) & 15, expected)
    eight = rng.integers(0, 256, (n, k)).astype(np.uint8)
    np.testing.assert_array_equal(fragments.unpack8(fragments.pack8(jnp.asarray(eight))), eight)
    scale = rng.standard_normal((n, 3)).astype(np.float32)
    np.testing.assert_array_equal(fragments.unpack_groups(fragments.pack_groups(jnp.asarray(scale))), scale)


KERNELS = {
    "decode": (decode_sm90, 1, decode_sm90.Config(), 64),
    "decode 16": (decode_sm90, 16, decode_sm90.Config(1, 4, 4, 4, 2), 96),
    "wgmma 64": (wgmma_sm90, 64, wgmma_sm90.Config(2, 64, 128, 2), 168),
}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str) -> None:
    module, m, config, registers = KERNELS[name]
    n = k = 4096
    plan = module.Plan(m, n, k, KINDS["u4"], "bf16", "bf16", 128, False, False, False, False, 132, config)
    compiled = compile_for_h200(
        lambda *a: module.matmul(plan, *a),
        jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
        jax.ShapeDtypeStruct((n // 16, 8 * k), jnp.uint8),
        jax.ShapeDtypeStruct((n // 16, k // 128, 8, 2), jnp.bfloat16),
    )
    assert compiled.spill_bytes == 0
    assert compiled.registers <= registers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"layout": "x"}, "layout"),
        ({"layout": "sm90"}, r"sm90 layout, .* is \[ceil\(N/64\) \* 4, 2048\]"),  # of canonical arrays
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    kwargs = {"group_size": 64, **change}
    with pytest.raises(ValueError, match=message):
        w4a16_matmul(jnp.ones((1, 64)), jnp.ones((16, 32), jnp.uint8), jnp.ones((16, 1)), **kwargs)
