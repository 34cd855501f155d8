from __future__ import annotations

import pytest

from jqserve.engine.buckets import Bucket, Buckets, make_buckets


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize(("running", "tiles"), [(1, 1), (4, 2), (16, 4), (64, 32), (256, 32), (500, 128)])
def test_every_step_that_can_be_planned_has_a_bucket(running: int, tiles: int, fine: bool) -> None:
    buckets = make_buckets(running, tiles, fine=fine)
    everything = set(buckets.all())
    for rows in range(running + 1):
        for count in {0, 1, tiles // 2, tiles}:
            bucket = buckets.choose(rows, count, 64)
            assert bucket in everything and bucket.decode_rows >= rows and bucket.tiles >= count
    assert len(everything) == len(buckets.all()) <= (27 if fine else 7)


def test_the_smallest_fitting_bucket_is_taken() -> None:
    buckets = Buckets((4, 16), (Bucket(4, 1), Bucket(4, 4), Bucket(16, 1), Bucket(16, 4)))
    cases = {(1, 0): Bucket(4, 0), (5, 0): Bucket(16, 0), (0, 1): Bucket(4, 1), (5, 1): Bucket(16, 1)}
    cases |= {(4, 2): Bucket(4, 4), (16, 4): Bucket(16, 4), (0, 3): Bucket(4, 4)}
    for (rows, tiles), expected in cases.items():
        assert buckets.choose(rows, tiles, 32) == expected


def test_a_step_beyond_the_largest_bucket_is_an_error() -> None:
    with pytest.raises(ValueError, match="no bucket holds 5 decode rows and 3 tiles"):
        make_buckets(4, 2, fine=False).choose(5, 3, 8)


def test_rows_and_sampled() -> None:
    assert Bucket(4, 2).rows(16) == 36
    assert Bucket(4, 2).sampled == 6


@pytest.mark.parametrize(
    ("decodes", "wanted", "taken"),
    [
        (0, 5, 5),  # nobody else needs a next step
        (200, 0, 0),
        (200, 1, 1),
        (200, 3, 2),
        (200, 4, 4),
        (200, 7, 4),
        (200, 8, 8),
        (5, 3, 3),  # beside 8 rows there are 1, 4 and 16: one of three would be too few
        (5, 6, 4),
        (5, 9, 9),
        (5, 16, 16),
    ],
)
def test_steps_are_filled_and_not_padded(decodes: int, wanted: int, taken: int) -> None:
    assert make_buckets(256, 16, fine=True).fill(decodes, wanted) == taken
