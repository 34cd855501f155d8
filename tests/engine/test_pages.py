from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqserve.engine.pages import TRASH_PAGE, PagePool


def test_pages_are_distinct_and_never_the_trash_page() -> None:
    pool = PagePool(5)
    pages = pool.allocate(5)
    assert sorted(pages) == [1, 2, 3, 4, 5] and TRASH_PAGE not in pages
    assert pool.free == 0 and pool.used == 5


def test_too_many_takes_none() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(MemoryError, match="2 pages asked, 1 of 3 free"):
        pool.allocate(2)
    assert pool.free == 1


def test_a_shared_page_is_free_when_the_last_one_lets_go() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.share([page])
    pool.release([page])
    assert pool.references(page) == 1 and pool.free == 1
    pool.release([page])
    assert pool.free == 2


@pytest.mark.parametrize("page", [TRASH_PAGE, 1])
def test_a_free_page_can_neither_be_released_nor_shared(page: int) -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="more often"):
        pool.release([page])
    with pytest.raises(ValueError, match="not in use"):
        pool.share([page])


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 7)), max_size=60))
def test_counts_agree_whatever_happens(actions: list[tuple[str, int]]) -> None:
    pool, held = PagePool(6), []
    for action, n in actions:
        if action == "take" and n <= pool.free:
            held += pool.allocate(n)
        elif action == "share" and held:
            pool.share([held[n % len(held)]])
            held.append(held[n % len(held)])
        elif action == "release" and held:
            pool.release([held.pop(n % len(held))])
        assert pool.used == len(set(held)) and pool.free + pool.used == pool.total
        assert all(pool.references(p) == held.count(p) for p in set(held))
