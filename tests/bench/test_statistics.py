import numpy as np
import pytest

from tests.bench.statistics import paired_bootstrap, rate, wilson


def test_wilson_matches_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    table = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718))
    for hits, n, low, high in table:
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)


def test_wilson_covers_the_true_rate() -> None:
    rng = np.random.default_rng(0)
    draws = rng.binomial(80, 0.9, 2000)
    covered = [low <= 0.9 <= high for low, high in (wilson(int(hits), 80) for hits in draws)]
    assert 0.93 < np.mean(covered) < 0.98


def test_rate_prints_percent_and_count() -> None:
    assert str(rate([True, True, True, False])) == "75.0 % [30.1, 95.4] (n 4)"
    assert str(rate([])) == "none"


def test_bootstrap_pairs_cases() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(60)
    better = paired_bootstrap(hard + 0.1 + 0.02 * rng.standard_normal(60), hard)
    assert better.sure and better.low < 0.1 < better.high
    shuffled = paired_bootstrap(hard + 0.1, rng.permutation(hard))
    assert shuffled.high - shuffled.low > 5 * (better.high - better.low)
    assert not paired_bootstrap(rng.random(40), rng.random(40)).sure


def test_bootstrap_keeps_a_unit_together() -> None:
    rng = np.random.default_rng(2)
    per_concept = rng.standard_normal(8).repeat(20)
    alone = paired_bootstrap(per_concept, np.zeros(160))
    together = paired_bootstrap(per_concept, np.zeros(160), units=list(np.arange(8).repeat(20)))
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert paired_bootstrap([1.0, 0.0], [0.0, 0.0], seed=3) == paired_bootstrap([1.0, 0.0], [0.0, 0.0], seed=3)


def test_bootstrap_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
