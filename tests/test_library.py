"""What a researcher does with `import jqserve`: logits under jit, vmap and grad, a look at packed weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqserve
from jqserve.library import greedy, logits
from jqserve.models.build import quantized_weights
from tests.models.tiny import TINY, Scheme, random_params

TOKENS = jnp.array([5, 17, 900, 33, 12, 4000, 1])


@pytest.fixture(scope="module")
def demo(demo_dir: Path):
    return jqserve.load(demo_dir, dtype="float32")


def test_batches_jit_and_vmap_agree(demo) -> None:
    model, params = demo
    one = model(params, TOKENS)
    assert one.shape == (7, model.config.vocab_size) and one.dtype == jnp.float32
    batch = jnp.stack([TOKENS, TOKENS[::-1]])
    np.testing.assert_allclose(model(params, batch)[0], one, atol=1e-4)
    mapped = jax.jit(jax.vmap(lambda tokens: model(params, tokens)))(batch)
    np.testing.assert_allclose(mapped, model(params, batch), atol=1e-4)


def test_gradient_towards_embeddings_is_the_slope(demo) -> None:
    """Through packed 4-bit weights; against a central difference, whose own error is about 1e-3."""
    model, params = demo
    embeddings = model.embeddings(params, TOKENS)
    np.testing.assert_allclose(model.from_embeddings(params, embeddings), model(params, TOKENS), atol=1e-5)

    def loss(e: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(model.from_embeddings(params, e)[-1])

    gradient = jax.jit(jax.grad(loss))(embeddings)
    direction = gradient / jnp.linalg.norm(gradient)
    step = 1e-2
    slope = (loss(embeddings + step * direction) - loss(embeddings - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=2e-2)
    several = jax.vmap(jax.grad(loss))(jnp.stack([embeddings, embeddings * 0.5]))
    np.testing.assert_allclose(several[0], gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [([], r"\[0\]"), (3, r"int32 \[\]"), ([[[1, 2]]], r"int32 \[1, 1, 2\]"), ([1.0, 2.0], r"float32 \[2\]")],
)
def test_what_are_no_tokens(demo, tokens: object, found: str) -> None:
    model, params = demo
    with pytest.raises(ValueError, match=rf"tokens: found .*{found}; expected integers \[S\] or \[B, S\]"):
        model(params, tokens)


def test_nothing_is_guessed_of_empty_prompts_and_integers(demo) -> None:
    model, params = demo
    with pytest.raises(ValueError, match="prompt: it is empty"):
        greedy(model, params, [], 4)
    with pytest.raises(ValueError, match="dtype: found int8; expected a float's"):
        jqserve.dequantize(params["layers"]["0"]["attn"]["qkv"]["weight"], "int8")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("float16"), np.float32, "float32"])
def test_a_dtype_by_any_name(demo_dir: Path, dtype: object) -> None:
    model, params = jqserve.load(demo_dir, dtype=dtype)
    assert params["embed"]["weight"].dtype == jnp.dtype(model.config.dtype) == jnp.dtype(dtype)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [jnp.int8, "float64", object()])
def test_a_dtype_that_is_none(demo_dir: Path, dtype: object) -> None:
    with pytest.raises(jqserve.JqserveError, match="is not supported; supported: auto, bfloat16, float16, float32"):
        jqserve.load(demo_dir, dtype=dtype)


def test_what_the_public_functions_take_return_and_raise_is_public() -> None:
    for name in jqserve.__all__:
        assert getattr(jqserve, name).__doc__, name
    assert {"EngineConfig", "Completion", "CheckpointError", "UnsupportedError", "RequestError"} < set(jqserve.__all__)
    assert sorted(jqserve.__all__) == sorted(jqserve._HOMES)


def test_the_plan_can_be_printed(demo) -> None:
    assert "layers.0-5.mlp.down" in demo[0].plan.to_text()


def test_logits_and_greedy_do_not_depend_on_padding(demo) -> None:
    model, params = demo
    np.testing.assert_allclose(logits(model, params, TOKENS), model(params, TOKENS), atol=1e-4)
    tokens = list(np.asarray(TOKENS))
    for _ in range(3):
        tokens.append(int(np.argmax(logits(model, params, tokens)[-1])))
    assert greedy(model, params, TOKENS, 3).tolist() == tokens[len(TOKENS) :]
    assert greedy(model, params, TOKENS, 0).shape == (0,)


def test_dequantize_gives_the_matrix_that_the_model_multiplies_by(demo) -> None:
    model, params = demo
    paths = dict(quantized_weights(params))
    assert "layers.0.attn.qkv.weight" in paths
    weight = paths["layers.0.attn.qkv.weight"]
    assert isinstance(weight, jqserve.QuantizedTensor)
    dense = jqserve.dequantize(weight)
    assert dense.shape == weight.shape and dense.dtype == jnp.float32
    unpacked = jax.tree.map(
        lambda leaf: jqserve.dequantize(leaf) if isinstance(leaf, jqserve.QuantizedTensor) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, jqserve.QuantizedTensor),
    )
    np.testing.assert_allclose(model(unpacked, TOKENS), model(params, TOKENS), atol=1e-3)


def test_canonical_layout_is_the_documented_one(demo_dir: Path) -> None:
    _, params = jqserve.load(demo_dir, dtype="float32", layout="canonical")
    for _, weight in quantized_weights(params):
        n, k = weight.shape
        assert weight.spec.layout == "canonical"
        assert weight.qvalue.shape == (n, k // 2) and weight.scale.shape == (n, k // 128)


def test_online_fp8(fixtures_dir: Path) -> None:
    """`quantization="fp8"` on an unquantized checkpoint: near the bf16 model, but not it."""
    model, params = jqserve.load(fixtures_dir / "base-bf16", dtype="float32", quantization="fp8")
    plain, dense = jqserve.load(fixtures_dir / "base-bf16", dtype="float32")
    assert {w.spec.qtype for _, w in quantized_weights(params)} == {"float8_e4m3fn"}
    difference = np.abs(model(params, TOKENS) - plain(dense, TOKENS)).max() / np.abs(plain(dense, TOKENS)).max()
    assert 1e-3 < difference < 0.2


def test_gradients_reach_dense_weights_of_a_model_built_by_hand() -> None:
    params = random_params(TINY, Scheme())
    model = jqserve.Model(TINY)

    def loss(scale: jax.Array) -> jax.Array:
        changed = params | {"final_norm": {"weight": params["final_norm"]["weight"] * scale}}
        return model(changed, jnp.array([1, 2, 3]))[-1, 0]

    # a final norm's weight scales the logits linearly
    assert float(jax.grad(loss)(1.0)) == pytest.approx(float(loss(jnp.float32(1.0))), rel=1e-4)


def test_names_are_lazy_and_typos_are_attribute_errors() -> None:
    assert set(jqserve.__all__) <= set(dir(jqserve))
    with pytest.raises(AttributeError, match="lod"):
        jqserve.lod  # noqa: B018


@pytest.mark.parametrize("option", [{"layout": "kernal"}, {"activations": "off"}, {"dtype": "fp32"}])
def test_options_that_do_not_exist_are_named(demo_dir: Path, option: dict[str, str]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(jqserve.JqserveError, match=f"{name} '{value}' is not supported"):
        jqserve.load(demo_dir, **option)


def test_a_path_that_is_nothing_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(jqserve.JqserveError, match="missing"):
        jqserve.load(tmp_path / "missing")
