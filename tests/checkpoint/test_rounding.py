"""Rounding to nearest, against what torchao and bitsandbytes themselves make of the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint import rounding
from jqserve.checkpoint.online import ONLINE, TORCHAO
from jqserve.quant import QuantizedTensor, codebook, dequantize
from jqserve.quant.packing import unpack_uint4

PEERS = Path(__file__).parents[1] / "data" / "peer_rounding" / "rounding.npz"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
RULES: dict[str, Any] = {
    "int8": rounding.int8_torchao,
    "fp8_row": rounding.fp8_row,
    "fp8_tensor": rounding.fp8_tensor,
    "int4_32": lambda w: rounding.int4_tinygemm(w, 32),
    "int4_128": lambda w: rounding.int4_tinygemm(w, 128),
    "nf4": lambda w: rounding.codebook(w, "nf4"),
    "fp4": lambda w: rounding.codebook(w, "fp4"),
}


def run(rule: Any, weight: np.ndarray, where: str) -> list[np.ndarray | None]:
    found = rule(weight) if where == "host" else jax.jit(rule)(jnp.asarray(weight))
    return [None if x is None else np.asarray(x) for x in found]


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_as_the_peer_rounds(rule: str, kind: str, where: str) -> None:
    peers = np.load(PEERS)
    weight = peers[f"{kind}/weight"].astype(DTYPES[kind])
    qvalue, scale, zero = run(RULES[rule], weight, where)
    assert qvalue is not None and scale is not None
    if rule in ("nf4", "fp4"):
        np.testing.assert_array_equal(scale, peers[f"{kind}/{rule}/absmax"])
        value = codebook.decode(unpack_uint4(qvalue, 256), rule) * scale.repeat(64, 1)
        np.testing.assert_array_equal(value, peers[f"{kind}/{rule}/value"])
        return
    expected = peers[f"{kind}/{rule}/q"]
    got = unpack_uint4(qvalue, 256) if rule.startswith("int4") else qvalue
    if kind != "bfloat16" and where == "device":  # XLA divides by a constant by multiplying: one bit of the scale
        np.testing.assert_allclose(scale.reshape(-1), peers[f"{kind}/{rule}/scale"].reshape(-1), rtol=2e-3)
        return
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))
    np.testing.assert_array_equal(scale.astype(np.float32).reshape(-1), peers[f"{kind}/{rule}/scale"].reshape(-1))
    if zero is not None:
        np.testing.assert_array_equal(zero.astype(np.float32).reshape(-1), peers[f"{kind}/{rule}/zero"].reshape(-1))


def test_the_peers_table_of_codes() -> None:
    """Values that bitsandbytes decoded take no other levels than ours."""
    peers = np.load(PEERS)
    for name in ("nf4", "fp4"):
        packed = peers[f"float32/{name}/packed"]
        codes = np.stack([packed >> 4, packed & 15], -1).reshape(24, 256)
        value = codebook.CODEBOOKS[name][codes] * peers[f"float32/{name}/absmax"].repeat(64, 1)
        np.testing.assert_array_equal(value, peers[f"float32/{name}/value"])


BOUNDS = {  # largest |w - dequantized| in units of the group's absmax: half a step of the grid
    "fp8": 16 / 448 * 1.01,  # the steps between 256 and 448 are 32
    "w8a8_fp8": 16 / 448 * 1.01,
    "fp8_block": 16 / 448 * 1.01,
    "w8a8_int8": 0.5 / 127 * 1.01,
    "int8": 0.5 / 127 * 1.01,
    **{name: 0.5 / 7.5 + 2**-8 for name in ONLINE if name.startswith("int4")},
    "bitsandbytes": 0.16,
}


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("shape", [(40, 256), (130, 384), (8, 96)])
@pytest.mark.parametrize("name", ONLINE)
def test_half_a_step(name: str, shape: tuple[int, int], where: str) -> None:
    """Ragged blocks and groups included; a row of zeros stays zero."""
    n, k = shape
    weight = np.random.default_rng(0).normal(0, 0.05, shape).astype(ml_dtypes.bfloat16)
    weight[2] = 0
    quantized = ONLINE[name].quantize(weight if where == "host" else jnp.asarray(weight))
    if ONLINE[name].spec(n, k) is None:
        assert name == "bitsandbytes" and k % 64 and quantized.dtype == weight.dtype
        return
    assert isinstance(quantized, QuantizedTensor)
    assert quantized.scale.shape == quantized.spec.grid and quantized.qvalue.shape[0] == n
    value = np.asarray(dequantize(jax.tree.map(jnp.asarray, quantized)))
    gn, gk = quantized.spec.group_shape
    absmax = np.zeros(shape, np.float32)
    for i in range(0, n, gn):
        for j in range(0, k, gk):
            absmax[i : i + gn, j : j + gk] = np.abs(weight[i : i + gn, j : j + gk].astype(np.float32)).max()
    error = np.abs(value - weight.astype(np.float32))
    assert not value[2].any()
    assert (error <= BOUNDS[name] * absmax).all(), (error / np.maximum(absmax, 1e-9)).max()


def test_modules_that_torchao_leaves_alone() -> None:
    """Its group must divide K, and fp8 x fp8 wants 16 to divide both sides."""
    assert TORCHAO["int4wo-128"].spec(64, 192) is None and TORCHAO["int4wo-64"].spec(64, 192) is not None
    assert TORCHAO["fp8dq-per_row"].spec(8, 256) is None and TORCHAO["fp8dq-per_tensor"].spec(16, 40) is None
    assert TORCHAO["fp8wo"].spec(8, 256) is not None and TORCHAO["int8wo"].spec(8, 256) is not None
