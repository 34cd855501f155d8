"""linear against dequantize-then-matmul, for every scheme; its gradient; its behaviour under vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.errors import UnsupportedError
from jqserve.ops.activations import fusible_activation, quantize_input
from jqserve.ops.layouts import check_supported, needs_generic
from jqserve.ops.linear import linear
from jqserve.ops.relayout import relayout_leaf, to_canonical
from jqserve.quant import ActivationSpec, QuantizedTensor, QuantSpec, dequantize
from pallas_kernels import KNOWN_DEVICES
from tests.models.tiny import FP8_BLOCK, FP8_STATIC, FP8_TOKEN, INT8_TOKEN, Scheme, random_weight

N, K = 160, 192

WEIGHT_ONLY = {
    "dense": Scheme(),
    "uint4": Scheme("uint4"),
    "uint4_zero": Scheme("uint4", zero="int"),
    "uint4_offset": Scheme("uint4", zero="offset"),
    "uint4_channel": Scheme("uint4", (1, -1)),
    "uint4_perm": Scheme("uint4", zero="int", perm=True),
    "uint8": Scheme("uint8", zero="int"),
    "uint8_symmetric": Scheme("uint8", (1, 64)),
    "int8_channel": Scheme("int8", (1, -1)),
    "fp8_channel": Scheme("float8_e4m3fn", (1, -1)),
    "fp8_tensor": Scheme("float8_e4m3fn", (-1, -1)),
    "fp8_block_ragged": Scheme("float8_e4m3fn", (128, 128)),
    # no packed kernel: dequantized inside the step
    "uint8_offset": Scheme("uint8", (1, 32), zero="offset"),
    "nf4": Scheme("nf4", (1, 64)),
    "fp4": Scheme("fp4", (1, 64)),
}
ACTIVATIONS = {
    "fp8_token": Scheme("float8_e4m3fn", (1, -1), activation=FP8_TOKEN),
    "fp8_token_perm": Scheme("float8_e4m3fn", (1, -1), activation=FP8_TOKEN, perm=True),
    "fp8_static": Scheme("float8_e4m3fn", (-1, -1), activation=FP8_STATIC),
    "fp8_block": Scheme("float8_e4m3fn", (128, 128), activation=FP8_BLOCK),
    "int8_token": Scheme("int8", (1, -1), activation=INT8_TOKEN),
}


def case(scheme: Scheme, *lead: int):
    rng = np.random.default_rng(3)
    weight, bias = random_weight(rng, N, K, scheme), jnp.asarray(rng.normal(size=N).astype(np.float32))
    return jnp.asarray(rng.normal(size=(*lead, K)).astype(np.float32)), weight, bias


def dense(weight) -> jax.Array:
    return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only(name: str) -> None:
    x, weight, bias = case(WEIGHT_ONLY[name], 2, 5)
    got = linear(x, weight, bias)
    expected = np.einsum("abk,nk->abn", x, np.asarray(dense(weight), np.float64)) + np.asarray(bias)
    # float32 products and sums over 192 terms of size about 1 / sqrt(192)
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_quantized_activations(name: str) -> None:
    """The result is that of the dequantized activations times the dequantized weight, up to float32 sums."""
    x, weight, bias = case(ACTIVATIONS[name], 7)
    got = linear(x, weight, bias)
    stored = x if weight.perm is None else x[:, weight.perm]
    rows = quantize_input(stored, weight)
    scale = rows.scale if rows.scale.shape[1] == 1 else jnp.repeat(rows.scale, 128, axis=1)[:, :K]
    xdq = rows.values.astype(jnp.float32) * scale
    plain = np.asarray(dense(weight.replace(perm=None)), np.float64)
    expected = np.asarray(xdq, np.float64) @ plain.T + np.asarray(bias)
    np.testing.assert_allclose(got, expected, atol=4e-6 * np.abs(expected).max())
    assert not np.allclose(got, np.asarray(x) @ np.asarray(dense(weight)).T + np.asarray(bias), atol=1e-4)
    if weight.perm is None:
        np.testing.assert_array_equal(got, linear(rows, weight, bias))  # quantized by the norm before


def test_int8_divisor_is_the_spec_s() -> None:
    """With 127.5 a row's largest value becomes 127.5, rounds to 128 and is clamped to 127; -128 does occur."""
    x = jnp.array([[-3.0, 1.0, 2.5, 3.0] + [0.25] * 12])
    for divisor, expected in ((127.5, [-128, 42, 106, 127]), (127.0, [-127, 42, 106, 127])):
        scheme = Scheme("int8", (1, -1), activation=ActivationSpec("dynamic_token", "int8", divisor))
        rows = quantize_input(x, random_weight(np.random.default_rng(0), 8, 16, scheme))
        assert rows.values[0, :4].tolist() == expected
        np.testing.assert_allclose(rows.scale, [[3.0 / divisor]], rtol=1e-7)


@pytest.mark.parametrize("name", ["dense", "uint4_perm", "uint8", "fp8_channel"])
def test_gradient_is_that_of_the_dequantized_weight(name: str) -> None:
    x, weight, bias = case(WEIGHT_ONLY[name], 6)
    towards = jnp.asarray(np.random.default_rng(5).normal(size=(6, N)).astype(np.float32))
    got = jax.grad(lambda x, b: (linear(x, weight, b) * towards).sum(), argnums=(0, 1))(x, bias)
    expected = jax.grad(lambda x, b: ((x @ dense(weight).T + b) * towards).sum(), argnums=(0, 1))(x, bias)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradient_passes_through_activation_rounding() -> None:
    x, weight, _ = case(ACTIVATIONS["fp8_token"], 6)
    got = jax.grad(lambda x: linear(x, weight).sum())(x)
    np.testing.assert_allclose(got, jnp.broadcast_to(dense(weight).sum(0), x.shape), atol=1e-5)


@pytest.mark.parametrize("name", ["uint4_perm", "uint8"])
def test_vmap_over_inputs_and_over_weights(name: str) -> None:
    x, weight, bias = case(WEIGHT_ONLY[name], 3, 4)
    one_by_one = jnp.stack([linear(row, weight, bias) for row in x])
    np.testing.assert_allclose(jax.vmap(lambda r: linear(r, weight, bias))(x), one_by_one, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(lambda r: linear(r, weight, bias).sum())))(x),
        jnp.broadcast_to(dense(weight).sum(0), x.shape),
        atol=1e-5,
    )
    several = jax.tree.map(lambda a: jnp.stack([a, a, a]), weight)
    np.testing.assert_allclose(jax.vmap(linear, in_axes=(0, 0, None))(x, several, bias), one_by_one, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "uint4", "fp8_token"])
def test_half_precision_in_half_precision_out(name: str) -> None:
    x, weight, bias = case((WEIGHT_ONLY | ACTIVATIONS)[name], 5)
    got = linear(x.astype(jnp.bfloat16), weight, bias)
    assert got.dtype == jnp.bfloat16
    expected = np.asarray(linear(x, weight, bias))
    # bfloat16 has 8 bits: inputs and weight rounded once each, summed in float32, rounded once
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=2e-2 * np.abs(expected).max())


def test_dense_bf16_makes_no_float32_copy_of_the_weight() -> None:
    x, w = jax.ShapeDtypeStruct((4, K), jnp.bfloat16), jax.ShapeDtypeStruct((N, K), jnp.bfloat16)
    text = jax.jit(linear).lower(x, w).as_text()
    assert "dot_general" in text and "f32" not in text and "transpose" not in text


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (QuantSpec("int8", (8, 64), (1, 32), activation=INT8_TOKEN), "per 1x32"),
        (QuantSpec("int8", (8, 64), (1, 64), activation=FP8_TOKEN), "float8_e4m3fn activations"),
        (QuantSpec("uint4", (8, 64), (1, 64), activation=INT8_TOKEN), "uint4 weights with quantized"),
    ],
)
def test_unsupported_schemes_are_named(spec: QuantSpec, words: str) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.3\.mlp\.down: no kernel for .*" + words):
        check_supported("layers.3.mlp.down", spec)


def test_one_fused_norm_serves_projections_of_one_scheme_only() -> None:
    rng = np.random.default_rng(0)
    fp8 = random_weight(rng, 8, 16, ACTIVATIONS["fp8_token"])
    assert fusible_activation(fp8, fp8) == FP8_TOKEN
    others = [
        random_weight(rng, 8, 16, s)
        for s in (Scheme(), WEIGHT_ONLY["int8_channel"], ACTIVATIONS["int8_token"], ACTIVATIONS["fp8_token_perm"])
    ]
    for other in others:
        assert fusible_activation(fp8, other) is None
    assert fusible_activation(random_weight(rng, 8, 16, ACTIVATIONS["fp8_static"])) is None


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ACTIVATIONS])
def test_relayout_and_back(name: str) -> None:
    """In the layout that a Hopper GPU prefers: the same product before and after, the same packed values on return."""
    x, weight, _ = case((WEIGHT_ONLY | ACTIVATIONS)[name], 4)
    relaid = relayout_leaf(weight, KNOWN_DEVICES["h200"])
    if isinstance(weight, QuantizedTensor):
        assert (relaid.spec.layout == "canonical") == (
            name in ACTIVATIONS or needs_generic(weight.spec, KNOWN_DEVICES["h200"])
        )
    np.testing.assert_allclose(linear(x, relaid), linear(x, weight), atol=1e-6)
    back = to_canonical(relaid) if isinstance(relaid, QuantizedTensor) else relaid
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(weight)):
        np.testing.assert_array_equal(a, b)
