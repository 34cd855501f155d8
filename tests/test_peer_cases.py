"""Small checkpoints by the peers' own tools, for the formats that ../shared/fixtures does not hold.

tests/data/make_peer_cases/README.md says what made each of them; the bounds are those of test_reference_logits.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_reference_logits import QDQ_BOUND, QDQ_KL, WDQ_BOUND, check_greedy, distance, jqserve_logits

CASES = Path(__file__).resolve().parent / "data" / "peer_cases"
NAMES = sorted(path.parent.name for path in CASES.glob("*/ref.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_weights_as_the_peer_dequantizes_them(name: str, tmp_path: Path) -> None:
    reference, got = jqserve_logits(CASES / name, tmp_path, "--activations", "none")
    difference, _ = distance(reference, got, "wdq")
    assert difference <= WDQ_BOUND
    check_greedy(reference, got, "wdq", WDQ_BOUND)
    if "logits_qdq_0" in reference:
        left_out, kl = distance(reference, got, "qdq")
        assert left_out > QDQ_BOUND and kl > QDQ_KL  # else the test below would pass without any quantization

        reference, got = jqserve_logits(CASES / name, tmp_path)
        difference, kl = distance(reference, got, "qdq")
        assert difference <= QDQ_BOUND and kl <= QDQ_KL, (difference, kl)
        check_greedy(reference, got, "qdq", QDQ_BOUND)
