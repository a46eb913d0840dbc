"""Strengths from votes, against closed forms, a slow oracle and simulated voters."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.strength import (
    LEAST,
    Numbers,
    chance,
    curvature,
    even_prior,
    fit_strengths,
    islands,
    log_likelihood,
    resampled_strengths,
    sigmoid,
    slope,
)


def some_wins(count: int = 5, seed: int = 0) -> Numbers:
    wins = np.random.default_rng(seed).integers(0, 9, (count, count)).astype(float)
    np.fill_diagonal(wins, 0)
    return wins


def simulated(strengths: Numbers, groups: int, rng: np.random.Generator, copies: int = 1) -> Numbers:
    """Everybody against everybody once in each group; ``copies`` voters who are all of one mind."""
    chances = sigmoid(strengths[:, None] - strengths[None, :])
    upper = np.triu(rng.random((groups, *chances.shape)) < chances, 1)
    lower = np.triu(~upper, 1).transpose(0, 2, 1)
    return copies * (upper + lower).astype(float)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 0), (7, 3), (2.5, 0.5), (400, 1)])
def test_one_against_the_average_is_the_closed_form(won: float, lost: float) -> None:
    (strength,) = fit_strengths(np.zeros((1, 1)), np.array([[won + 0.5, lost + 0.5]]))
    assert sigmoid(strength) == pytest.approx((won + 0.5) / (won + lost + 1), abs=1e-9)


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (5, 0), (7, 3), (3, 7), (400, 1)])
def test_two_methods_solve_their_cubic(won: float, lost: float) -> None:
    """With b_2 = -b_1 and x = e^b_1 the slope is 0 where (l + 1/2) x^3 + (l - 1/2) x^2 + (1/2 - w) x - (w + 1/2) = 0."""
    roots = np.roots([lost + 0.5, lost - 0.5, 0.5 - won, -won - 0.5])
    (x,) = (root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 0)
    fitted = fit_strengths(np.array([[0, won], [lost, 0]], float))
    np.testing.assert_allclose(fitted, [np.log(x), -np.log(x)], atol=1e-8)


def test_without_a_prior_worth_naming_two_methods_have_their_rate() -> None:
    first, second = fit_strengths(np.array([[0, 7.0], [3, 0]]), np.full((2, 2), 1e-6))
    assert sigmoid(first - second) == pytest.approx(0.7, abs=1e-6)


def test_the_fit_is_that_of_hunters_slow_iteration() -> None:
    """Minorisation and maximisation (Hunter, 2004): pi_i <- (W_i + 1/2) / (sum_j N_ij / (pi_i + pi_j) + 1 / (pi_i + 1))."""
    wins, skill = some_wins(), np.ones(5)
    for _ in range(3000):
        for i in range(5):
            shares = sum((wins[i, j] + wins[j, i]) / (skill[i] + skill[j]) for j in range(5) if j != i)
            skill[i] = (wins[i].sum() + 0.5) / (shares + 1 / (skill[i] + 1))
    np.testing.assert_allclose(fit_strengths(wins), np.log(skill), atol=1e-8)


def test_slope_and_curvature_are_the_derivatives() -> None:
    wins, prior = some_wins(4), np.random.default_rng(1).random((4, 2)) + 0.1
    at, small = np.array([0.3, -1.0, 0.5, 2.0]), 1e-5
    steps = small * np.eye(4)
    risen = [log_likelihood(at + s, wins, prior) - log_likelihood(at - s, wins, prior) for s in steps]
    bent = [slope(at + s, wins, prior) - slope(at - s, wins, prior) for s in steps]
    np.testing.assert_allclose(slope(at, wins, prior), np.array(risen) / (2 * small), atol=1e-6)
    np.testing.assert_allclose(curvature(at, wins, prior), -np.array(bent) / (2 * small), atol=1e-6)
    fitted = fit_strengths(wins, prior)
    np.testing.assert_allclose(slope(fitted, wins, prior), 0, atol=1e-9)


def test_order_and_company_do_not_matter() -> None:
    wins, order = some_wins(), np.array([3, 0, 4, 1, 2])
    fitted = fit_strengths(wins)
    np.testing.assert_allclose(fit_strengths(wins[np.ix_(order, order)]), fitted[order], atol=1e-9)
    several = np.stack([some_wins(seed=seed) for seed in range(3)])
    np.testing.assert_allclose(fit_strengths(several)[0], fitted, atol=1e-9)
    np.testing.assert_allclose(fit_strengths(wins.T), -fitted, atol=1e-9)


@pytest.mark.parametrize("prior", [0.5, LEAST])
def test_one_that_won_everything_stays_finite(prior: float) -> None:
    chain = np.triu(np.full((6, 6), 500.0), 1)
    fitted = fit_strengths(chain, np.full((6, 2), prior))
    assert np.isfinite(fitted).all()
    assert (np.diff(fitted) < 0).all()
    np.testing.assert_allclose(slope(fitted, chain, np.full((6, 2), prior)), 0, atol=1e-6)


def test_ties_pull_together() -> None:
    votes = np.array([[0, 6.0], [2, 0]])
    tied = votes + 5 * np.array([[0, 0.5], [0.5, 0]])
    assert 0 < fit_strengths(tied)[0] < fit_strengths(votes)[0]


def test_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(3)
    truth = np.array([1.2, 0.3, -0.4, -1.1])
    held = []
    for copies in (1, 4):  # also where four voters are of one mind: the groups are what is independent
        for _ in range(40):
            wins = simulated(truth, 40, rng, copies)
            fitted, resampled = fit_strengths(wins.sum(0)), resampled_strengths(wins, 200)
            for one, rivals in ((0, [1]), (2, [3]), (1, [0, 1, 2, 3])):
                found = chance(fitted, resampled, one, rivals)
                held.append(found.low <= sigmoid(truth[one] - truth[rivals].mean()) <= found.high)
    assert 0.89 <= np.mean(held) <= 0.99


def test_votes_of_one_group_count_together() -> None:
    rng = np.random.default_rng(0)
    wins = simulated(np.array([0.5, 0.0]), 30, rng)
    widths = []
    for votes in (wins, 4 * wins, np.repeat(wins, 4, 0)):
        found = chance(fit_strengths(votes.sum(0)), resampled_strengths(votes), 0, [1])
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    assert widths[2] < 0.7 * widths[1]


def test_few_votes_have_wide_intervals_and_one_seed() -> None:
    wins = np.array([[[0, 1.0], [0, 0]]] * 3)
    fitted = fit_strengths(wins.sum(0))
    found = chance(fitted, resampled_strengths(wins), 0, [1])
    assert found.low < 0.75 < found.value < found.high < 1
    assert found == chance(fitted, resampled_strengths(wins), 0, [1])
    assert found != chance(fitted, resampled_strengths(wins, seed=1), 0, [1])
    assert chance(fitted, resampled_strengths(wins), 0, [0]).value == 0.5


def test_what_was_never_compared_is_apart() -> None:
    games = np.zeros((5, 5))
    games[0, 3] = games[3, 4] = games[2, 1] = 1
    assert islands(games) == [[0, 3, 4], [1, 2]]
    assert islands(games + np.eye(5, k=1)) == [[0, 1, 2, 3, 4]]
    assert islands(np.zeros((0, 0))) == []
    np.testing.assert_allclose(fit_strengths(np.zeros((3, 3)), even_prior(3)), 0)
