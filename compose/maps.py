"""Attention maps made ready to be compared: the mean over layers, smoothing, one range; and places found from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

from compose.attention import Map

SIGMA = 0.5
_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Seen:
    """What forwards attend to, the mean over layers and ``readings``.

    Args:
        words: how much each cell attends to words, ``[..., h, w]``.
        selves: how much each cell (query) attends to each other (key), ``[n, N, N]``, where anybody asked.
    """

    words: Tensor
    selves: Tensor | None = None
    readings: int = 1

    def then(self, other: Seen) -> Seen:
        """With one reading more."""
        share = 1 / (self.readings + 1)
        selves = None if self.selves is None or other.selves is None else torch.lerp(self.selves, other.selves, share)
        return Seen(torch.lerp(self.words, other.words, share), selves, self.readings + 1)


class SecondHalf:
    """What the first ``share`` of a run's ``steps`` attends to in its second half: in the first half there are no subjects yet.

    Attributes: ``steps``: how many are run, at least two where there are. ``seen``: the mean of what was added; None before.
    """

    def __init__(self, share: float, steps: int) -> None:
        self.steps = min(steps, max(2, round(share * steps)))
        self.seen: Seen | None = None

    def reads(self, index: int) -> bool:
        """Whether the step ``index``, from 0, is one of those."""
        return index >= self.steps // 2

    def add(self, seen: Seen) -> None:
        self.seen = seen if self.seen is None else self.seen.then(seen)


def mean_values(maps: Sequence[Map]) -> Tensor:
    """The mean over layers ``[rows, h * w, S]``; all must have the same cells, as a family's map layers do."""
    return torch.stack([each.values for each in maps]).mean(0)


def mean_map(maps: Sequence[Map]) -> Tensor:
    """:func:`mean_values` as pictures ``[rows, S, h, w]``."""
    return mean_values(maps).transpose(1, 2).unflatten(2, maps[0].cells)


@cache
def smoothing_kernel(sigma: float = SIGMA) -> Tensor:
    """``[3, 3]``, summing to 1. ``exp(-(x / 2 sigma)^2)`` as Attend-and-Excite has it, which is wider than a Gaussian."""
    line = torch.tensor([exp(-((x / (2 * sigma)) ** 2)) for x in (-1, 0, 1)])
    line = line / line.sum()
    return line[:, None] * line[None, :]


def smoothed(maps: Tensor, sigma: float = SIGMA) -> Tensor:
    """``maps [..., h, w]`` with the edges mirrored; sides of at least 2."""
    kernel = smoothing_kernel(sigma).to(maps)[None, None]
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="reflect"), kernel).view_as(maps)


def min_max(maps: Tensor) -> Tensor:
    """``[..., D]`` brought to 0..1. Without their common offset, maps of different words are no longer nearly parallel.

    A map that is constant becomes zero.
    """
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low + _EPS)


def found_masks(words: Tensor, selves: Tensor, seeds: float, threshold: float) -> Tensor:
    """The cells of each LoRA ``[K, h, w]``, no cell of two; each LoRA has at least its best one.

    Args:
        words: how much each cell attends to each LoRA's words, ``[K, h, w]``.
        selves: how much each cell (query) attends to each other (key), ``[N, N]``.
    """
    count, height, width = words.shape
    wanted = smoothed(words).flatten(1)
    wanted = wanted / wanted.amax(1, keepdim=True).clamp(min=1e-12)
    # A cell may be loud for every word: what counts is by how much a word is louder than the others.
    lead = wanted - wanted.sum(0) / (count + 1)
    most = max(1, round(seeds * height * width))
    alike = torch.stack([selves[:, own.topk(most).indices].mean(1) for own in lead])
    alike = smoothed(alike.unflatten(1, (height, width))).flatten(1)
    alike = alike / alike.amax(1, keepdim=True).clamp(min=1e-12)
    best = alike.argmax(0)
    masks = torch.stack([(best == index) & (alike[index] >= threshold) for index in range(count)])
    for index in range(count):
        if not bool(masks[index].any()):
            only = masks[masks.sum(1) == 1].any(0)  # not the last cell of another
            cell = int(lead[index].masked_fill(only, float("-inf")).argmax())
            masks[:, cell] = False
            masks[index, cell] = True
    return masks.unflatten(1, (height, width))
