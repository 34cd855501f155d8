"""Single matrices as the peers' own code packs, quantizes and dequantizes them, bit for bit.

tests/data/peer_tensors/make_*.py made the files: torchao 0.18.0, bitsandbytes 0.50.2, IST-DASLab's marlin.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.online import TORCHAO
from jqserve.checkpoint.readers.bitsandbytes import Bnb4, Bnb8
from jqserve.checkpoint.readers.marlin import Marlin
from jqserve.checkpoint.readers.torchao import TorchaoPlan
from jqserve.checkpoint.scheme import Scheme
from jqserve.errors import CheckpointError, UnsupportedError
from jqserve.quant import QuantizedTensor, dequantize
from jqserve.quant.packing import unpack_uint4
from pallas_kernels.quantize.api import quantize_rows

DATA = Path(__file__).parents[1] / "data" / "peer_tensors"
AO = dict(np.load(DATA / "torchao.npz"))
BNB = dict(np.load(DATA / "bitsandbytes.npz"))
MARLIN = dict(np.load(DATA / "marlin.npz"))
ZERO_ROW, TINY_ROW = 1, 9  # of the weight and of the input


def tensors(found: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


def read(scheme: Scheme, raw: dict[str, np.ndarray], n: int, k: int) -> QuantizedTensor:
    """As a load does it: tensors checked against what the scheme needs, prepared, decoded."""
    needs = scheme.needs(n, k)
    raw = {suffix: raw[suffix] for suffix, need in needs.items() if need.required or suffix in raw}
    for suffix, value in raw.items():
        assert value.shape in needs[suffix].shapes, (suffix, value.shape)
    spec = scheme.spec(n, k)
    assert spec is not None
    decoded = scheme.decode(scheme.prepare("m", raw, n, k).arrays, n, k)
    return QuantizedTensor(*(None if x is None else jnp.asarray(x) for x in decoded), None, None, spec)


def torchao_scheme(name: str) -> Scheme:
    config = json.loads(AO[f"{name}/config"].tobytes())
    plan = TorchaoPlan(Fields({"quant_type": {"default": config}, "modules_to_not_convert": None}, "config.json"))
    return plan.scheme("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("name", [key.removesuffix("/value") for key in AO if key.endswith("/value")])
def test_torchao_serialized(name: str) -> None:
    """int4's value is (q + 8) * s + (z - 8 * s) in torchao and q * s + z here: a few units of the last place."""
    raw, (n, k) = tensors(AO, name), AO["weight"].shape
    expected = raw["value"]
    if name.startswith("fp8"):
        raw["_weight_qdata"] = raw["_weight_qdata"].view(ml_dtypes.float8_e4m3fn)
    else:
        assert raw["_weight_qdata"].dtype == np.int8
    got = np.asarray(dequantize(read(torchao_scheme(name), raw, n, k)))
    if name == "fp8wo":
        assert np.isnan(expected[ZERO_ROW]).all() and np.isnan(got[ZERO_ROW]).all()  # 0 / 0 in torchao: so in its file
        got, expected = np.delete(got, ZERO_ROW, 0), np.delete(expected, ZERO_ROW, 0)
    if name.startswith("int4wo"):
        steps = np.abs(raw["_weight_scale"]).T.repeat(k // len(raw["_weight_scale"]), 1)
        largest = np.abs(expected) + 16 * steps
        assert (np.abs(got - expected) <= 2**-22 * largest).all()
    else:
        np.testing.assert_array_equal(got, expected)


def test_torchao_leaves_a_k_that_no_group_divides() -> None:
    """Its quantize_ skips the Linear; so the file holds a plain weight, and that is what the reader asks for."""
    scheme = torchao_scheme("int4wo-256-plain")
    assert list(scheme.needs(16, 320)) == ["weight"] and scheme.spec(16, 320) is None


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_config_online(name: str, where: str) -> None:
    """Codes and scales as torchao's quantize_ makes them, with ties, outliers, constant and tiny rows.

    In a row of zeros torchao's fp8 has scale 0 and NaN codes: there, and nowhere else, it is not followed."""
    weight, rule = AO["weight"].astype(ml_dtypes.bfloat16), TORCHAO[name]
    n, k = weight.shape
    decode = lambda w: rule.decode({"weight": w}, n, k)  # noqa: E731
    made = decode(weight) if where == "host" else jax.jit(decode)(jnp.asarray(weight))
    codes, scale, zero = (None if x is None else np.asarray(x) for x in made)
    assert codes is not None and scale is not None
    if zero is not None:
        np.testing.assert_array_equal(unpack_uint4(codes, k), AO[f"{name}/codes"])
        np.testing.assert_array_equal(scale.astype(np.float32), AO[f"{name}/scale"])
        np.testing.assert_array_equal(zero.astype(np.float32), AO[f"{name}/zero"])
        return
    expected, its_scale = AO[f"{name}/_weight_qdata"].view(np.uint8), AO[f"{name}/_weight_scale"].copy()
    codes = codes.view(np.uint8)
    if name in ("fp8wo", "fp8dq-per_row"):
        assert its_scale[ZERO_ROW] == 0 and (expected[ZERO_ROW] & 127 == 127).all()
        assert scale[ZERO_ROW] == 1 and not codes[ZERO_ROW].any()
        codes, expected, scale, its_scale = (np.delete(x, ZERO_ROW, 0) for x in (codes, expected, scale, its_scale))
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scale, its_scale)


@pytest.mark.parametrize("name", ["int8dq", "fp8dq-per_row"])
def test_torchao_inputs(name: str) -> None:
    """Of float32 inputs the scales are torchao's, and the codes but for ties: it multiplies by the inverse of int8's
    scale, we divide (11 of 7,680 codes). Of bfloat16 ones it rounds the scale to bfloat16, by up to 2^-8, we do not."""
    activation: Any = TORCHAO[name].activation
    kept = [row for row in range(len(AO["input"])) if row not in (ZERO_ROW, TINY_ROW)]
    x = jnp.asarray(AO["input"][kept])
    dtype = jnp.int8 if name == "int8dq" else jnp.float8_e4m3fn
    values, scale = (np.asarray(a) for a in quantize_rows(x, dtype, divisor=activation.divisor))
    expected = AO[f"{name}/float32/codes"][kept].view(values.dtype)
    np.testing.assert_array_equal(scale, AO[f"{name}/float32/scale"][kept])
    differ = values.view(np.uint8) != expected.view(np.uint8)
    assert differ.sum() <= (11 if name == "int8dq" else 0)
    exact = np.asarray(x, np.float64)[differ] / np.broadcast_to(scale, x.shape)[differ]
    assert (np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 1e-5).all()
    rounded = AO[f"{name}/bfloat16/scale"][kept]
    assert (np.abs(rounded / scale - 1) <= 2**-8).all() and (rounded != scale).any()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-double", "fp4-double"])
def test_bitsandbytes_4_bit(kind: str) -> None:
    """Zeros, outliers and tiny rows; 320 blocks are no multiple of the 256 that share a nested scale."""
    raw, scheme = tensors(BNB, f"{kind}/plain"), Bnb4(kind[:3], kind.endswith("double"))  # type: ignore[arg-type]
    n, k = raw["value"].shape
    got = np.asarray(dequantize(read(scheme, raw, n, k)))
    if kind.endswith("double"):  # bitsandbytes adds the offset to the product with or without a fused multiply-add
        assert (np.abs(got - raw["value"]) <= 2e-7 * np.abs(raw["value"]).max()).all()
    else:
        np.testing.assert_array_equal(got, raw["value"])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-double", "fp4-double"])
def test_bitsandbytes_blocks_that_are_refused(kind: str) -> None:
    scheme = Bnb4(kind[:3], kind.endswith("double"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"down: 96 in features are not a multiple of 64: blocks that run over"):
        scheme.check("down", *BNB[f"{kind}/over_rows/value"].shape)
    raw = tensors(BNB, f"{kind}/block128")
    assert raw["weight.absmax"].shape not in scheme.needs(8, 256)["weight.absmax"].shapes  # the audit refuses it
    with pytest.raises(UnsupportedError, match=r"down\.weight.*blocksize: 128 is not supported; supported: 64"):
        scheme.prepare("down", raw, 8, 256)


def test_bitsandbytes_int8() -> None:
    """(code * row) / 127 there, code * (row / 127) here: a unit of the last place."""
    raw = tensors(BNB, "int8")
    n, k = raw["value"].shape
    np.testing.assert_allclose(dequantize(read(Bnb8(), raw, n, k)), raw["value"], rtol=2**-22, atol=0)


@pytest.mark.parametrize("group", [128, -1])
def test_marlin(group: int) -> None:
    raw = tensors(MARLIN, f"group{group}")
    n, k = raw["codes"].shape
    got = read(Marlin(group), raw, n, k)
    np.testing.assert_array_equal(unpack_uint4(np.asarray(got.qvalue), k), raw["codes"])
    np.testing.assert_array_equal(got.scale, raw["scale"])
