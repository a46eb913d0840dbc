"""From similarities to the numbers of a comparison: thresholds, verdicts, rates with intervals. Pure functions.

Pictures of one combination are alike: two pictures of the same hard pair say less than one picture of each of two pairs.
Intervals count that in, see :func:`effective` and :func:`paired_difference`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

Z95 = 1.959963984540054
SHARE = 0.1
"""Of pictures that lie beyond the ends the threshold is put between, see :func:`threshold_of`."""
FEWEST = 5
"""Combinations from which on a difference gets an interval: a bootstrap of fewer is too narrow."""

Verdict = Literal["kept", "confused", "lost"]


@dataclass(frozen=True)
class Seen:
    """One subject in one picture: similarity with its own references, and the largest with those of another subject."""

    own: float
    others: float

    def verdict(self, threshold: float) -> Verdict:
        """*kept*: its own, and enough of it; *confused*: rather another one, and enough of that; else *lost*."""
        if self.own > self.others and self.own >= threshold:
            return "kept"
        return "confused" if self.others > self.own and self.others >= threshold else "lost"


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0..1) of ``values`` lie below, with straight lines between neighbours.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to take a quantile of")
    return float(np.quantile(values, share))


def threshold_of(there: Sequence[float], absent: Sequence[float]) -> float:
    """From which similarity a subject counts as there: half way between what the best tenth of pictures without it reach and
    what the worst tenth of pictures of it alone fall short of. Those alone are easier than any with others, and so like each
    other that their worst tenth would ask too much.

    Args:
        there: similarities of pictures of single LoRAs. absent: of pictures of the base without LoRAs.

    Raises:
        ValueError: one of them is empty.
    """
    return (quantile(there, SHARE) + quantile(absent, 1 - SHARE)) / 2


def wilson(rate: float, n: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a rate (0..1) counted over ``n`` independent cases; ``n`` need not be whole."""
    if n <= 0:
        return 0.0, 1.0
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def effective(groups: Sequence[Sequence[bool]]) -> float:
    """How many independent outcomes those of ``groups`` are worth, between the number of groups and the number of outcomes.

    ``n_eff = p (1 - p) / var(p)``, with the variance of the rate over groups, ``C / (C - 1) sum (hits_c - p n_c)^2 / n^2``
    (Kish's design effect). Where all outcomes are alike, or there is one group, nothing is known of the variance: each group
    counts once.
    """
    filled = [group for group in groups if group]
    count, n = len(filled), sum(map(len, filled))
    if n == 0:
        return 0.0
    rate = sum(map(sum, filled)) / n
    if count < 2 or rate in (0, 1):
        return float(count)
    variance = count / (count - 1) * sum((sum(group) - rate * len(group)) ** 2 for group in filled) / n**2
    return float(n) if variance == 0 else min(max(rate * (1 - rate) / variance, count), n)


@dataclass(frozen=True)
class Rate:
    """The share of true outcomes and its 95 % interval, see :func:`effective`. ``n`` outcomes were counted."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]" if self.n else "-"


def rate(groups: Sequence[Sequence[bool]]) -> Rate:
    """The rate over all outcomes of ``groups`` (one for each combination) with its interval."""
    n = sum(map(len, groups))
    if n == 0:
        return Rate(math.nan, 0.0, 1.0, 0)
    value = sum(map(sum, groups)) / n
    return Rate(value, *wilson(value, effective(groups)), n)


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.0f} [{100 * self.low:+.0f}, {100 * self.high:+.0f}]"


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], resamples: int = 4000, seed: int = 0
) -> Difference | None:
    """The mean of ``a - b`` over the combinations both have, which are what is drawn again; None with too few of them."""
    pairs = [a[name] - b[name] for name in sorted(a.keys() & b.keys())]
    if len(pairs) < FEWEST:
        return None
    rng = random.Random(seed)
    means = [fmean(rng.choices(pairs, k=len(pairs))) for _ in range(resamples)]
    return Difference(fmean(pairs), quantile(means, 0.025), quantile(means, 0.975))


@dataclass(frozen=True)
class RowNumbers:
    """One line of the table.

    Args:
        kept, confused, lost: of all subjects of all pictures. all_kept: of all pictures.
        least, mean, most: the smallest, mean and largest similarity with the own references in a picture, over pictures.
        seconds: median of a picture. forwards: rows that went through the UNet for a picture, median.
        by_combination: share of subjects kept.
    """

    label: str
    pictures: int
    kept: Rate
    confused: Rate
    lost: Rate
    all_kept: Rate
    least: float
    mean: float
    most: float
    seconds: float
    forwards: float
    by_combination: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """One picture as the table counts it."""

    combination: str
    seen: tuple[Seen, ...]
    seconds: float
    forwards: float


def row_numbers(label: str, pictures: Sequence[Measured], threshold: float) -> RowNumbers:
    """The numbers of one row. Raises ValueError where there are no pictures."""
    groups: dict[str, list[tuple[Verdict, ...]]] = {}
    for one in pictures:
        groups.setdefault(one.combination, []).append(tuple(seen.verdict(threshold) for seen in one.seen))

    def share(wanted: Verdict) -> Rate:
        return rate([[kind == wanted for kinds in several for kind in kinds] for several in groups.values()])

    owns = [[seen.own for seen in one.seen] for one in pictures]
    return RowNumbers(
        label=label,
        pictures=len(pictures),
        kept=share("kept"),
        confused=share("confused"),
        lost=share("lost"),
        all_kept=rate([[all(kind == "kept" for kind in kinds) for kinds in several] for several in groups.values()]),
        least=fmean(map(min, owns)),
        mean=fmean(map(fmean, owns)),
        most=fmean(map(max, owns)),
        seconds=quantile([one.seconds for one in pictures], 0.5),
        forwards=quantile([one.forwards for one in pictures], 0.5),
        by_combination={name: fmean(kind == "kept" for kinds in several for kind in kinds) for name, several in groups.items()},
    )
