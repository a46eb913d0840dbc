"""The numbers of a comparison, by hand."""

from __future__ import annotations

import math

import pytest

from pipelines.bench_numbers import (
    Measured,
    Seen,
    effective,
    paired_difference,
    quantile,
    rate,
    row_numbers,
    threshold_of,
    wilson,
)


@pytest.mark.parametrize(
    ("own", "others", "kind"),
    [
        (0.5, 0.1, "kept"),
        (0.3, 0.1, "kept"),
        (0.29, 0.1, "lost"),
        (0.1, 0.5, "confused"),
        (0.1, 0.2, "lost"),
        (0.5, 0.5, "lost"),
    ],
)
def test_a_verdict_needs_more_than_the_others_and_enough(own: float, others: float, kind: str) -> None:
    assert Seen(own, others).verdict(0.3) == kind


def test_quantile_lies_on_straight_lines() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert quantile([0.0, 1.0], 0.1) == pytest.approx(0.1)
    assert quantile([4.0], 0.9) == 4
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.1)


def test_the_threshold_lies_half_way() -> None:
    assert threshold_of([0.9, 0.7, 0.8], [0.1, 0.3, 0.2]) == pytest.approx((0.72 + 0.28) / 2)
    with pytest.raises(ValueError, match="no values"):
        threshold_of([], [0.1])


def test_wilson_as_in_tables() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1, 12) == pytest.approx((0.7575, 1), abs=1e-4)
    assert wilson(0.5, 0) == (0, 1)


def test_alike_outcomes_of_a_combination_count_once() -> None:
    alike = [[True] * 4, [False] * 4, [True] * 4, [False] * 4]
    mixed = [[True, False, True, False]] * 4
    assert effective(alike) == pytest.approx(4)
    assert effective(mixed) == 16
    assert effective([[True] * 4, [True] * 4]) == 2, "no spread between combinations tells nothing"
    assert effective([[True, False, True]]) == 1
    assert effective([[], []]) == 0
    # hits 4, 2, 0, 2 of 4: rate 1/2, variance 4/3 * (4 + 0 + 4 + 0) / 256 = 1/24, so n_eff = 6
    some = [[True] * 4, [True, True, False, False], [False] * 4, [True, True, False, False]]
    assert effective(some) == pytest.approx(6)
    assert rate(some).low == pytest.approx(wilson(0.5, 6)[0])
    assert rate(some).high - rate(some).low > rate(mixed).high - rate(mixed).low
    assert math.isnan(rate([]).value)


def test_difference_is_over_combinations_both_have() -> None:
    a = dict.fromkeys("abcdef", 1.0)
    b = dict.fromkeys("bcdefg", 0.5)
    told = paired_difference(a, b)
    assert told is not None
    assert (told.mean, told.low, told.high) == (0.5, 0.5, 0.5)
    b["c"] = 1.0
    wider = paired_difference(a, b)
    assert wider is not None
    assert (wider.mean, wider.low < 0.4 < wider.high) == (0.4, True)
    assert wider == paired_difference(a, b), "drawn by seed"
    assert paired_difference(a, dict.fromkeys("abcd", 0.5)) is None


def test_a_row_by_hand() -> None:
    pictures = [
        Measured("a + b", (Seen(0.8, 0.1), Seen(0.6, 0.2)), 1.0, 40),
        Measured("a + b", (Seen(0.8, 0.1), Seen(0.1, 0.7)), 3.0, 40),
        Measured("a + c", (Seen(0.1, 0.0), Seen(0.3, 0.4)), 2.0, 60),
    ]
    row = row_numbers("merge", pictures, 0.35)
    assert (row.pictures, row.kept.n, row.kept.value) == (3, 6, 0.5)
    assert row.confused.value == pytest.approx(2 / 6)
    assert row.lost.value == pytest.approx(1 / 6)
    assert row.all_kept.value == pytest.approx(1 / 3)
    assert row.by_combination == {"a + b": 0.75, "a + c": 0.0}
    assert (row.least, row.most) == (pytest.approx((0.6 + 0.1 + 0.1) / 3), pytest.approx((0.8 + 0.8 + 0.3) / 3))
    assert row.mean == pytest.approx((0.7 + 0.45 + 0.2) / 3)
    assert (row.seconds, row.forwards) == (2.0, 40)
