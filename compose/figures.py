"""What a method can show of a run: plain numbers with names, for others to draw (:mod:`pipelines.figures`).

Methods return these from :meth:`compose.run.Method.explain`. What is costly to keep, such as maps of every step, is only kept
while ``run.explaining``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Figure:
    """Base of all. ``title`` names it, ``text`` says in a sentence or two how to read it."""

    title: str
    text: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule(Figure):
    """How strongly each of several things acts at each step.

    Args:
        rows: a number per step for each name; 0 does not act.
        marks: (name, step) that are set apart, such as whole forwards among shallow ones.
        steps: what the columns stand for, if not the steps 1, 2, 3, ...
    """

    rows: Mapping[str, Sequence[float]]
    marks: Collection[tuple[str, int]] = ()
    steps: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves(Figure):
    """Numbers over steps, such as losses: one line per name, from the first step on."""

    lines: Mapping[str, Sequence[float]]
    across: str = "step"


@dataclass(frozen=True, kw_only=True, eq=False)
class Maps(Figure):
    """Maps or masks ``[h, w]`` of any sizes: a row per name, a column per moment.

    Args:
        rows: the maps of each name.
        columns: what the columns stand for.
        top: the value drawn brightest; None: each map's own largest.
    """

    rows: Mapping[str, Sequence[Tensor]]
    columns: Sequence[str] = ()
    top: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Boxes(Figure):
    """Boxes ``(x0, y0, x1, y1)`` as shares of the picture, by name; drawn over the finished picture."""

    boxes: Mapping[str, tuple[float, float, float, float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Words(Figure):
    """A prompt as the text encoder has it, and which of its ``tokens`` (by position) are whose."""

    tokens: Sequence[str]
    found: Mapping[str, Sequence[int]]
