"""Perplexity, KL and agreement against plain numpy; windows of text."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jqserve
from jqserve.errors import RequestError
from jqserve.evaluate import likelihood
from jqserve.evaluate.likelihood import predict
from jqserve.evaluate.windows import read_windows
from tests.checkpoint import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[jqserve.Model, dict]]:
    folder = tmp_path_factory.mktemp("models")
    made = [tiny.make(folder / str(seed), seed=seed, num_hidden_layers=1).path for seed in (0, 1)]
    loaded = [jqserve.load(path, dtype="float32") for path in made]
    for _, params in loaded:  # random logits are nearly uniform: stretched, so that there is something to measure
        params["final_norm"]["weight"] = params["final_norm"]["weight"] * 10
    return loaded


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_against_numpy(models: list, monkeypatch: pytest.MonkeyPatch) -> None:
    (base, base_params), (model, params) = models
    windows = np.random.default_rng(0).integers(0, 64, (3, 20)).astype(np.int32)
    p, q = (
        log_softmax(np.asarray(m(w, windows), np.float64))[:, :-1] for m, w in ((base, base_params), (model, params))
    )
    following = windows[:, 1:, None]
    expected = -np.take_along_axis(q, following, -1)[..., 0]
    monkeypatch.setattr(likelihood, "LOGITS", 20 * 64 * 2)  # two batches, the second one short
    found = predict(model, params, windows, (base, base_params))
    assert np.allclose(found.nll, expected.mean(0), atol=1e-5)
    assert found.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-5)
    assert found.base_perplexity == pytest.approx(np.exp(-np.take_along_axis(p, following, -1).mean()), rel=1e-5)
    assert found.mean_kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert found.agree == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.tokens == 57
    alone = predict(model, params, windows)
    assert alone.perplexity == pytest.approx(found.perplexity, rel=1e-6) and alone.kl is None


def test_a_model_does_not_diverge_from_itself(models: list) -> None:
    model, params = models[0]
    windows = jnp.arange(32).reshape(2, 16)
    found = predict(model, params, np.asarray(windows), (model, params))
    assert found.mean_kl == 0 and found.agree == 1


def test_windows(tmp_path: Path) -> None:
    ids = np.arange(10, dtype=np.uint16)
    ids.tofile(tmp_path / "x.bin")
    np.save(tmp_path / "x.npy", ids.reshape(2, 5))
    for name in ("x.bin", "x.npy"):
        assert read_windows(tmp_path / name, 9, 4, 10, list).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert read_windows(tmp_path / name, 1, 4, 10, list).shape == (1, 4)
        with pytest.raises(RequestError, match=r"no token id of the model, 0\.\.8"):
            read_windows(tmp_path / name, 9, 4, 9, list)
        with pytest.raises(RequestError, match="fewer than one window"):
            read_windows(tmp_path / name, 9, 11, 10, list)
    with pytest.raises(RequestError, match="no such file"):
        read_windows(tmp_path / "y.bin", 9, 4, 9, list)
