"""full_attention: block by block equals all at once, with and without a window, in the shape of grouped heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.ops import attention


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None) -> np.ndarray:
    """[S, H, Dh] in float64, one query at a time."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        first = 0 if window is None else max(0, i - window + 1)
        for h in range(q.shape[1]):
            scores = k[first : i + 1, h // group].astype(np.float64) @ q[i, h] * scale
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ v[first : i + 1, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_equals_the_definition(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(29, h, 8)).astype(np.float32) for h in (6, 2, 2))
    expected = naive(q, k, v, 0.3, window)
    for block in (1024, 8):
        monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
        got = attention.full_attention(jnp.array(q), jnp.array(k), jnp.array(v), sm_scale=0.3, window=window)
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_batches_and_maps() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (jnp.array(rng.normal(size=(2, 3, 7, h, 8)).astype(np.float32)) for h in (4, 2, 2))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.full_attention(q, k, v, sm_scale=0.3, window=4)

    np.testing.assert_allclose(attend(q, k, v), jax.vmap(jax.vmap(attend))(q, k, v), atol=1e-6)
