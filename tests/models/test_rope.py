"""Rotary frequencies against figures of the published formulas, and what a rotation must keep."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.errors import UnsupportedError
from jqserve.models.config import RopeConfig
from jqserve.models.rope import inverse_frequencies, rope_table, rotate

LLAMA3 = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    plain, _ = inverse_frequencies(RopeConfig(5e5), 128)
    scaled, factor = inverse_frequencies(LLAMA3, 128)
    wavelength = 2 * np.pi / plain
    assert factor == 1.0
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()  # the band between is smooth


def test_yarn_scales_attention_by_the_log_of_the_factor() -> None:
    _, factor = inverse_frequencies(RopeConfig(1e4, "yarn", 16.0, original_max_position=4096), 128)
    assert factor == pytest.approx(0.1 * np.log(16.0) + 1.0)
    given = RopeConfig(1e4, "yarn", 16.0, original_max_position=4096, extra=(("attention_factor", 0.7),))
    assert inverse_frequencies(given, 128)[1] == pytest.approx(0.7)
    both = RopeConfig(
        1e4, "yarn", 16.0, original_max_position=4096, extra=(("mscale", 0.707), ("mscale_all_dim", 0.707))
    )
    assert inverse_frequencies(both, 128)[1] == pytest.approx(1.0)


def test_unknown_kind_is_named() -> None:
    with pytest.raises(UnsupportedError, match="longrope"):
        inverse_frequencies(RopeConfig(kind="longrope"), 64)


def test_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 32)).astype(np.float32)) for _ in range(2))

    def score(i: int, j: int) -> float:
        (qc, qs), (kc, ks) = (rope_table(jnp.array([p]), RopeConfig(), 32) for p in (i, j))
        return float((rotate(q, qc, qs) * rotate(k, kc, ks)).sum())

    assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-3)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    assert rotate(q.astype(jnp.bfloat16), *rope_table(jnp.array([3]), RopeConfig(), 32)).dtype == jnp.bfloat16
