from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jqserve.engine.prefix import extend, page_name

TOKENS = st.lists(st.integers(0, 3), min_size=0, max_size=24)


def names(tokens: list[int], page_size: int = 4) -> list[bytes]:
    found: list[bytes] = []
    extend(found, tokens, page_size, len(tokens) // page_size)
    return found


@settings(max_examples=200, deadline=None)
@given(TOKENS, TOKENS)
def test_names_are_equal_exactly_as_far_as_the_tokens_are(a: list[int], b: list[int]) -> None:
    for i, (x, y) in enumerate(zip(names(a), names(b)), 1):
        assert (x == y) == (a[: 4 * i] == b[: 4 * i])


@given(TOKENS, st.integers(0, 6))
def test_names_may_be_made_bit_by_bit(tokens: list[int], first: int) -> None:
    grown: list[bytes] = []
    extend(grown, tokens, 4, min(first, len(tokens) // 4))
    extend(grown, tokens, 4, len(tokens) // 4)
    assert grown == names(tokens)


def test_the_same_tokens_elsewhere_are_another_page() -> None:
    page = [1, 2, 3, 4]
    assert page_name(None, page) != page_name(page_name(None, page), page)
    assert len(page_name(None, page)) == 16
