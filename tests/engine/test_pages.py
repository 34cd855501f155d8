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


def test_a_named_page_is_found_until_its_room_is_wanted() -> None:
    pool = PagePool(3)
    a, b = pool.allocate(2)
    pool.name(a, b"a")
    pool.name(b, b"ab")
    assert pool.find([b"a", b"ab", b"abc"]) == [a, b] and pool.find([b"x", b"a"]) == []
    pool.release([a, b])
    assert pool.free == 3 and pool.cached == 2 and pool.used == 0
    assert pool.idle([a, b]) == 2
    pool.take([a])
    assert pool.references(a) == 1 and pool.cached == 1 and pool.free == 2
    pool.allocate(2)
    assert pool.evictions == 1 and pool.find([b"a", b"ab"]) == [a]


def test_the_end_of_a_prefix_goes_first_and_the_longest_unused_before_the_others() -> None:
    pool = PagePool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for pages, names in ((old, [b"o", b"oo"]), (new, [b"n", b"nn"])):
        for page, name in zip(pages, names):
            pool.name(page, name)
        pool.release(pages)
    gone = []
    for _ in range(4):
        before = {name for name in (b"o", b"oo", b"n", b"nn") if pool.find([name])}
        pool.allocate(1)
        gone += before - {name for name in before if pool.find([name])}
    assert gone == [b"oo", b"o", b"nn", b"n"]


def test_forgetting() -> None:
    pool = PagePool(3)
    a, b, c = pool.allocate(3)
    for page, name in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.name(page, name)
    pool.release([c])
    pool.forget([a])
    assert pool.find([b"a"]) == [] and pool.find([b"b"]) == [b] and pool.references(a) == 1
    pool.forget()
    assert pool.cached == 0 and pool.free == 1
    pool.release([a, b])
    assert pool.free == 3


def test_names_are_for_pages_in_use_and_the_first_of_a_name_keeps_it() -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="cannot be named"):
        pool.name(1, b"x")
    a, b = pool.allocate(2)
    pool.name(a, b"x")
    pool.name(b, b"x")
    assert pool.find([b"x"]) == [a]
    pool.release([b])
    assert pool.cached == 0
    with pytest.raises(ValueError, match="has no name"):
        pool.take([b])


ACTIONS = st.sampled_from(["take", "share", "release", "name", "find", "forget"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ACTIONS, st.integers(0, 9)), max_size=80))
def test_the_prefix_cache_against_a_model(actions: list[tuple[str, int]]) -> None:
    """The model: which names a page may be found under. A page that is found holds what its name says."""
    pool, held = PagePool(5), []
    holds: dict[int, bytes] = {}  # page -> the name of its contents, as long as nobody else has it
    for action, n in actions:
        name = b"%d" % (n % 7)
        if action == "take" and n <= pool.free:
            for page in pool.allocate(n):
                holds.pop(page, None)
                held.append(page)
        elif action == "share" and held:
            pool.share([held[n % len(held)]])
            held.append(held[n % len(held)])
        elif action == "release" and held:
            pool.release([held.pop(n % len(held))])
        elif action == "name" and held:
            page = held[n % len(held)]
            if page not in holds and not pool.find([name]):
                pool.name(page, name)
                holds[page] = name
        elif action == "find":
            for page in pool.find([name]):
                assert holds[page] == name
                pool.take([page])
                held.append(page)
        elif action == "forget":
            pool.forget()
            holds.clear()
        assert pool.used == len(set(held)) and pool.free + pool.used == pool.total and pool.cached <= pool.free
        assert all(pool.references(p) == held.count(p) for p in set(held))
