"""Problems shared by the tests and the bench: rows of logits of every kind, and what is asked of them."""

from __future__ import annotations

import dataclasses

import numpy as np

NEVER = -1e30  # what the engine writes over a logit that a grammar forbids


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str  # one of KINDS
    vocabulary: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def _normal(rng: np.random.Generator, v: int) -> np.ndarray:
    return rng.normal(size=v) * 2.5


def _peaked(rng: np.random.Generator, v: int) -> np.ndarray:
    """As a language model's: a few tokens far above the others."""
    x = _normal(rng, v)
    x[rng.integers(0, v, 20)] += rng.uniform(5, 16, 20)
    return x


def _masked(keep: int, value: float = -np.inf):  # type: ignore[no-untyped-def]
    def make(rng: np.random.Generator, v: int) -> np.ndarray:
        x = np.full(v, value)
        at = rng.permutation(v)[:keep]
        x[at] = _normal(rng, keep)
        return x

    return make


def _one(value: float):  # type: ignore[no-untyped-def]
    def make(rng: np.random.Generator, v: int) -> np.ndarray:
        x = _normal(rng, v)
        x[v * 2 // 3] = value
        return x

    return make


def _plateau(rng: np.random.Generator, v: int) -> np.ndarray:
    """Most of the mass in more equal tokens than one block takes."""
    x = _normal(rng, v) - 30
    x[rng.permutation(v)[: v // 2]] = 3.25
    x[5] = 4
    return x


KINDS = {
    "normal": _normal,
    "peaked": _peaked,
    "flat": lambda rng, v: np.full(v, 1.5),
    "narrow": lambda rng, v: rng.normal(size=v) * 1e-3,
    "ties": lambda rng, v: np.round(_normal(rng, v)),
    "two": lambda rng, v: np.where(rng.uniform(size=v) < 0.5, 0.0, -0.0) - 1e-30 * (rng.uniform(size=v) < 0.1),
    "rising": lambda rng, v: np.sort(_normal(rng, v)),
    "falling": lambda rng, v: -np.sort(_normal(rng, v)),
    "plateau": _plateau,
    "large": lambda rng, v: _normal(rng, v) * 1e4,
    "tails": lambda rng, v: rng.standard_cauchy(v),
    "below": lambda rng, v: _normal(rng, v) - 1e6,
    "masked": _masked(40),
    "masked one": _masked(1),
    "masked all": _masked(0),
    "never": _masked(300, NEVER),
    "never all": _masked(0, NEVER),
    "nan": _one(np.nan),
    "inf": _one(np.inf),
}

#: (temperature, top_k, top_p, min_p)
ASKED = (
    (0.6, 0, 0.9, 0.0),  # Llama 3's defaults
    (0.7, 20, 0.8, 0.0),  # Qwen's
    (1.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 50, 1.0, 0.0),
    (0.0, 5, 0.5, 0.1),
)
CASES = (
    *(Case(kind, 5001, *asked) for kind in KINDS for asked in ASKED[:2]),
    *(Case(kind, 5001, *asked) for kind in ("normal", "ties", "flat", "masked", "plateau") for asked in ASKED[2:]),
    *(Case("normal", v, 0.6, 0, 0.95) for v in (1025, 1028, 32000, 50257, 128256)),
    *(Case("normal", 5001, 1.0, k) for k in (1, 2, 127, 128, 129, 1024, 1025, 4000, 5001, 9999)),
    *(Case("normal", 5001, 1.0, 0, p) for p in (1e-7, 0.01, 0.5, 0.99, 0.9999, 0.999999)),
    *(Case("normal", 5001, 1.0, 0, 1.0, m) for m in (1e-35, 1e-6, 0.5, 1.0)),
    *(Case("normal", 5001, t, 0, 0.9) for t in (1e-6, 1e-3, 100.0)),
    Case("normal", 5001, 1e-40, 0, 0.9),
    Case("peaked", 128256, 0.6, 0, 0.9),
    Case("peaked", 128256, 1.0, 40, 0.95, 0.02),
    Case("normal", 128256, 2.0, 0, 0.95),  # tens of thousands in the nucleus
    Case("normal", 128256, 1.0, 3000, 0.9),
    Case("plateau", 128256, 1.0, 0, 0.9),
    Case("plateau", 5001, 1.0, 2000, 0.9),  # top-k keeps more than one block takes, by ties; top-p of those
    Case("ties", 128256, 0.8, 0, 0.9),
    Case("rising", 128256, 1.0, 50, 0.9),
)


def logits(case: Case, seed: int = 0) -> np.ndarray:
    """float32 [V]."""
    return KINDS[case.kind](np.random.default_rng(seed), case.vocabulary).astype(np.float32)
