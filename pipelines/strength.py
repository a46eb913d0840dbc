"""How strong methods are, from votes between two of them: Bradley and Terry, "Rank analysis of incomplete block designs", 1952.

    P(i is preferred to j) = s(b_i - b_j),      s(x) = 1 / (1 + e^-x)
    L(b) = sum_ij W_ij log s(b_i - b_j) + sum_i (a_i log s(b_i) + c_i log s(-b_i))

``W_ij`` counts how often i was preferred to j; a tie is half a win for both. The second sum is a weak prior: every method has
half a win (``a_i``) and half a loss (``c_i``) against a virtual average one at b = 0. It makes L strictly concave and keeps a
method that won everything finite.

Votes on one group of pictures (one prompt and seed) hang together, so groups and not votes are resampled, by Rubin's Bayesian
bootstrap (1981): the votes of a group get one weight from Exp(1). The prior's halves get theirs from Gamma(1/2), or a method
that won everything would have an interval of no width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

PRIOR = 0.5
"""Wins, and losses, of every method against the virtual average method."""
LEAST = 1e-3
"""Least weight of the prior's halves in a resample: strengths stay finite numbers."""
RESAMPLES = 1000
STEPS = 100
CLOSE = 1e-10
"""A Newton step shorter than this ends the fit."""


@dataclass(frozen=True)
class Chance:
    """A chance to be preferred, 0..1, and its 95 % interval."""

    value: float
    low: float
    high: float


def sigmoid(x: Numbers) -> Numbers:
    """``1 / (1 + e^-x)``, without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def even_prior(count: int) -> Numbers:
    """Half a win and half a loss against the average for each of ``count`` methods, ``[n, 2]``."""
    return np.full((count, 2), PRIOR)


def log_likelihood(strengths: Numbers, wins: Numbers, prior: Numbers) -> Numbers:
    """``L(b)`` as at the top of this file.

    Args:
        strengths: ``[..., n]``. wins: ``[..., n, n]``, row preferred to column. prior: ``[..., n, 2]``, wins and losses.
    """
    between = strengths[..., :, None] - strengths[..., None, :]
    average = prior[..., 0] * np.logaddexp(0, -strengths) + prior[..., 1] * np.logaddexp(0, strengths)
    return -(wins * np.logaddexp(0, -between)).sum((-2, -1)) - average.sum(-1)


def slope(strengths: Numbers, wins: Numbers, prior: Numbers) -> Numbers:
    """The gradient: ``sum_j (W_ij - N_ij s(b_i - b_j)) + a_i - (a_i + c_i) s(b_i)``, ``N = W + W^T``; ``[..., n]``."""
    chances = sigmoid(strengths[..., :, None] - strengths[..., None, :])
    games = wins + wins.swapaxes(-2, -1)
    return (wins - games * chances).sum(-1) + prior[..., 0] - prior.sum(-1) * sigmoid(strengths)


def curvature(strengths: Numbers, wins: Numbers, prior: Numbers) -> Numbers:
    """Minus the Hessian, positive definite with a prior: ``N_ij s s'`` summed on the diagonal, with minus beside it."""
    chances = sigmoid(strengths[..., :, None] - strengths[..., None, :])
    weights = (wins + wins.swapaxes(-2, -1)) * chances * (1 - chances)
    weights *= 1 - np.eye(wins.shape[-1])
    alone = sigmoid(strengths)
    diagonal = weights.sum(-1) + prior.sum(-1) * alone * (1 - alone)
    return np.eye(wins.shape[-1]) * diagonal[..., None] - weights


def fit_strengths(wins: Numbers, prior: Numbers | None = None) -> Numbers:
    """The strengths that maximise ``L``, by Newton's method with halved steps where a whole one would lead down.

    Args:
        wins: ``[..., n, n]``, finite, not negative; the diagonal is 0. prior: ``[..., n, 2]``, over 0; None: half and half.

    Returns:
        ``b``, ``[..., n]``: 0 is the average method.
    """
    prior = even_prior(wins.shape[-1]) if prior is None else prior
    strengths = np.zeros(wins.shape[:-1])
    reached = log_likelihood(strengths, wins, prior)
    for _ in range(STEPS):
        step = np.linalg.solve(curvature(strengths, wins, prior), slope(strengths, wins, prior)[..., None])[..., 0]
        length = np.ones(wins.shape[:-2])
        for _ in range(STEPS):
            there = log_likelihood(strengths + length[..., None] * step, wins, prior)
            worse = there < reached - CLOSE * np.abs(reached)
            if not worse.any():
                break
            length = np.where(worse, length / 2, length)
        strengths, reached = strengths + length[..., None] * step, there
        if np.abs(step).max(initial=0) < CLOSE:
            break
    return strengths


def islands(games: Numbers) -> list[list[int]]:
    """Sets of methods that were compared with each other, directly or through others; one set: all can be ranked.

    Args:
        games: ``[n, n]``, over 0 where two methods were compared.
    """
    left = list(range(len(games)))
    found = []
    while left:
        reached, fresh = {left[0]}, [left[0]]
        while fresh:
            one = fresh.pop()
            new = [other for other in left if other not in reached and games[one, other] + games[other, one] > 0]
            reached.update(new)
            fresh += new
        found.append(sorted(reached))
        left = [one for one in left if one not in reached]
    return found


def resampled_strengths(wins: Numbers, resamples: int = RESAMPLES, seed: int = 0) -> Numbers:
    """Strengths with groups weighted at random, ``[resamples, n]``.

    Args:
        wins: of each group of pictures, ``[groups, n, n]``.
    """
    rng = np.random.default_rng(seed)
    groups, count = wins.shape[:2]
    weights = rng.exponential(size=(resamples, groups))
    prior = np.maximum(rng.gamma(PRIOR, size=(resamples, count, 2)), LEAST)
    return fit_strengths(np.tensordot(weights, wins, 1), prior)


def chance(strengths: Numbers, resampled: Numbers, one: int, rivals: Sequence[int]) -> Chance:
    """The chance that a method is preferred to another, or to the average of several: ``s(b_i - mean of the rivals' b)``.

    Only differences of strengths count: what all have in common is the prior's alone.

    Args:
        strengths: ``[n]``. resampled: ``[resamples, n]``, whose quantiles are the interval. one, rivals: indices of methods.
    """
    rivals = list(rivals)
    value = sigmoid(strengths[one] - strengths[rivals].mean())
    low, high = np.quantile(sigmoid(resampled[:, one] - resampled[:, rivals].mean(1)), [0.025, 0.975])
    return Chance(float(value), float(low), float(high))
