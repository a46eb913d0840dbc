"""How numbers are given: Wilson intervals for rates, a bootstrap paired by case for differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines import bench_numbers
from pipelines.bench_numbers import Z95


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n`` and the 95 % Wilson interval of the rate."""

    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    def __str__(self) -> str:
        if not self.n:
            return "none"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n {self.n})"


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a rate: ``(low, high)``; ``(0, 1)`` when nothing was counted.

    Raises:
        ValueError: more hits than cases, or a negative number.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} cases make no rate")
    return bench_numbers.wilson(hits / n if n else 0.0, n, z)


def rate(outcomes: Sequence[bool]) -> Rate:
    """The share of true outcomes with its interval."""
    hits, n = sum(map(bool, outcomes)), len(outcomes)
    return Rate(hits, n, *wilson(hits, n))


def rate_table(rates: Mapping[str, Rate], bars: Mapping[str, float]) -> list[str]:
    """Lines of markdown: every rate with its interval, beside its bar in per cent where it has one."""
    lines = ["| | rate | 95 % interval | n | bar |", "|---|---|---|---|---|"]
    for name, each in rates.items():
        middle, low, high = (f"{100 * share:.1f}" for share in (each.value, each.low, each.high))
        lines.append(f"| {name} | {middle} % | {low} - {high} | {each.n} | {bars.get(name, '')} |")
    return lines


@dataclass(frozen=True)
class Difference:
    """Mean of ``a - b`` over paired cases and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def sure(self) -> bool:
        """Whether the interval excludes 0: only then may one be called better."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (n {self.n})"


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    units: Sequence[object] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Bootstrap of the mean difference of paired cases.

    Args:
        a, b: outcomes of the two methods on the same cases (same seed, same prompt), equally long.
        units: what is resampled, one label a case (the concept or the combination); cases of one unit stay together. Without
            it every case is a unit of its own.

    Raises:
        ValueError: lengths differ or are 0.
    """
    if len(a) != len(b) or len(a) == 0 or (units is not None and len(units) != len(a)):
        raise ValueError(f"pairs need equally many cases, at least one: got {len(a)} and {len(b)}")
    difference = np.asarray(a, float) - np.asarray(b, float)
    labels = list(range(len(a))) if units is None else list(units)
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    member = np.array([order[label] for label in labels])
    sums = np.bincount(member, weights=difference)
    counts = np.bincount(member)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(order), (resamples, len(order)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(difference.mean()), float(low), float(high), len(a))
