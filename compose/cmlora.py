"""CMLoRA (Zou et al., "Cached Multi-LoRA Composition", ICLR 2025): the LoRAs one by one, one dominant, deep parts kept.

    e = (1/n) sum_k w_k(i) e~_k,     w_non = n / (q + n - 1),   w_dom = q w_non        (their mean is always 1)
    I = {0, c1, 2 c1, .. < a T} + {.., c2 apart, .. < b T} + {.., c1 apart, .. < T}    refresh steps; c1, c2 = 2, 3
    q_0 = n - 1/2,   q_m = max(1, q_{m-1} - 2^-m)                                      dominance decays at each rotation m

``e~_k`` is a whole forward with LoRA k alone, or a shallow one (:mod:`compose.shallow`) on its kept feature. At a refresh step
the next LoRA becomes dominant and makes a whole forward; all others are shallow. Up to the share ``phase`` of the schedule
the high-frequency LoRAs take turns, then the low-frequency ones (:mod:`compose.profile`).

What the published code does not do, and this does: its non-uniform schedule makes every forward a whole one; its weights are
computed once, so that dominance never decays; late refreshes are lost; the two sets are hard-coded. Differences from the
paper: q is clamped at 1, below which the "dominant" LoRA would be the weakest; ``phase`` is a noise level rather than a
step; the cut of SDXL is deeper, because its outermost blocks have no attention; everything runs as two batched forwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compose.bank import Adapter, row_names
from compose.figures import Curves, Figure, Schedule
from compose.options import Count, Share, Strength, names, numbers
from compose.profile import profiled, stored
from compose.run import Options, Run, Step
from compose.separate import BASE, Mean, MeanOptions, known
from compose.shallow import captured, skipping, usable_cut
from studio.requests import Finite

Order = Literal["paper", "reversed", "random", "rotation"]


class CMLoRAOptions(MeanOptions):
    """Options of :class:`CMLoRA`; the defaults are the paper's.

    Args:
        order: which LoRAs dominate when. "paper": those of fine detail before the share ``phase``, those of broad shapes after
            it; "reversed": the other way round; "random": any, drawn anew at each turn; "rotation": all in turn.
        phase: share of the schedule at which the LoRAs of broad shapes take over; the paper has 0.6.
        intervals: c1,c2: steps from one whole forward of the dominant LoRA to the next, c1 early and late, c2 in between; the
            paper has 2,3. 1,1 makes one at every step.
        breaks: a,b: the shares of the schedule between which c2 counts; the paper has 0.375,0.875.
        dominance: q_0, how many times more than the others the dominant LoRA weighs at first. By default the paper's n - 1/2
            for n LoRAs; 1 gives all the same weight.
        decay: how fast dominance falls: it multiplies 2^-m at the m-th turn; the paper has 1, and 0 lets it stay.
        max_age: steps after which what was kept of a LoRA that does not dominate is renewed; 0: never, as in the paper.
        cache: whether deep features are kept; without them every forward is a whole one.
        cut: up blocks that a shallow forward computes. By default as few as have attention.
        high: names of the LoRAs of fine detail. By default their measured profiles decide.
        seed: seed of the order "random".
    """

    order: Order = "paper"
    phase: Share = 0.6
    intervals: tuple[Count, Count] = (2, 3)
    breaks: tuple[Share, Share] = (0.375, 0.875)
    dominance: Annotated[Finite, Field(ge=1)] | None = None
    decay: Strength = 1.0
    max_age: Annotated[int, Field(ge=0)] = 0
    cache: bool = True
    cut: Count | None = None
    high: tuple[str, ...] | None = None
    seed: int = 0

    _high = field_validator("high", mode="before")(names)
    _pairs = field_validator("intervals", "breaks", mode="before")(numbers)

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.breaks[0] > self.breaks[1]:
            raise ValueError(f"'breaks' are {self.breaks[0]:g},{self.breaks[1]:g}: the first must not be the larger")
        if self.order in ("random", "rotation"):
            for name in ("high", "phase"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"'{name}' does nothing with order='{self.order}', which knows no phases: leave it out")
        if self.order != "random" and self.seed:
            raise ValueError(f"'seed' does nothing with order='{self.order}', which draws nothing: take order=random")
        return self


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One step: who dominates with which q, and who makes a whole forward; by position among the concepts."""

    dominant: int
    q: float
    whole: tuple[int, ...]


def refresh_steps(steps: int, intervals: tuple[int, int] = (2, 3), breaks: tuple[float, float] = (0.375, 0.875)) -> list[int]:
    """``I``: the steps at which dominance moves on and its LoRA is computed whole."""
    a, b = int(breaks[0] * steps), int(breaks[1] * steps)
    near, far = intervals
    return sorted({*range(0, a, near), *range(a, b, far), *range(b, steps, near)} | {0})


def weights(count: int, dominant: int, q: float) -> list[float]:
    """``w_k``: ``q w_non`` for the dominant LoRA, ``w_non`` for the others; they sum to ``count``."""
    other = count / (q + count - 1)
    return [q * other if k == dominant else other for k in range(count)]


def turns(steps: int, high: Sequence[int], low: Sequence[int], options: CMLoRAOptions, skipped: int = 0) -> list[Turn]:
    """The whole course of a run of ``steps`` steps; ``skipped`` of the schedule lie before them.

    Args:
        high, low: positions of the two sets; together all concepts.
    """
    every = sorted([*high, *low])
    count = len(every)
    whole_schedule = refresh_steps(skipped + steps, options.intervals, options.breaks)
    fresh = {0} | {index - skipped for index in whole_schedule if index > skipped}
    q = options.dominance if options.dominance is not None else max(1.0, count - 0.5)
    dice = random.Random(options.seed)
    course: list[Turn] = []
    rotation, dominant = 0, every[0]
    ages = dict.fromkeys(every, 0)
    for index in range(steps):
        if index in fresh:
            early = ((skipped + index) / (skipped + steps) < options.phase) is (options.order != "reversed")
            some = every if options.order in ("random", "rotation") else [*(high if early else low)] or every
            dominant = dice.choice(some) if options.order == "random" else some[rotation % len(some)]
            q = max(1.0, q - options.decay * 0.5**rotation) if rotation else q
            rotation += 1
        whole = {k for k in every if options.max_age and ages[k] + 1 > options.max_age}
        whole |= {dominant} if index in fresh else set()
        if index == 0 or not options.cache:
            whole = set(every)
        ages = {k: 0 if k in whole else age + 1 for k, age in ages.items()}
        course.append(Turn(dominant=dominant, q=q, whole=tuple(sorted(whole))))
    return course


class CMLoRA(Mean):
    """Cached, dominance-weighted mean of what each LoRA alone predicts.

    Attributes after a run: ``course``, and how many ``whole`` and ``shallow`` forwards of one LoRA, or of none, were made.
    """

    takes: ClassVar[type[Options]] = CMLoRAOptions
    options: CMLoRAOptions

    def check(self, adapters: Sequence[Adapter]) -> None:
        super().check(adapters)
        known(self.options.high or (), "high", adapters)

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.kept: dict[int, Tensor] = {}
        self.whole = self.shallow = 0
        self.course: list[Turn] = []
        if not self.concepts:
            return
        self.cut = usable_cut(run.base.unet, self.options.cut)
        high = self.high(run)
        low = [k for k in range(len(self.concepts)) if k not in high]
        self.course = turns(len(run.timesteps), high, low, self.options, run.skipped)

    def high(self, run: Run) -> list[int]:
        """Positions of the high-frequency concepts."""
        bank = run.bank
        if bank is None or self.options.order in ("random", "rotation") or len(self.concepts) == 1:
            return list(range(len(self.concepts)))
        if self.options.high is not None:
            return [i for i, k in enumerate(self.concepts) if {*bank.adapters[k].names} & {*self.options.high}]
        found = []
        for position, concept in enumerate(self.concepts):
            profile, fresh = profiled(run.base, bank, concept, run.cancelled)
            if profile.high:
                found.append(position)
            if fresh:
                run.notes.append(f"LoRA '{bank.adapters[concept].name}' had no profile: it was measured first")
        return found

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.concepts:
            return run.forward_guided(x, step.timestep)
        if step.index == 0:
            self.kept.clear()
        turn = self.course[step.index]
        count = len(self.concepts)
        shares = dict(zip(self.concepts, (w / count for w in weights(count, turn.dominant, turn.q)), strict=True))
        # What every LoRA changes is measured from the base, so its feature is renewed with any other.
        due = {self.concepts[i] for i in turn.whole} | ({BASE} if turn.whole else set())
        whole = [k for k in self.passes if k in due or not self._usable(k, run, x)]
        rest = [k for k in self.passes if k not in whole]
        return self.mean(
            run, x, shares, [(whole, partial(self._whole, run, step, x)), (rest, partial(self._shallow, run, step, x))]
        )

    def _usable(self, concept: int, run: Run, x: Tensor) -> bool:
        """Whether a feature is kept that fits the present batch."""
        feature = self.kept.get(concept)
        return feature is not None and len(feature) == len(x) * (2 if run.guided else 1)

    def _whole(self, run: Run, step: Step, x: Tensor, some: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        with captured(run.base.unet, self.cut) as found:
            out = self.each(run, x, step.timestep, some)
        if self.options.cache:
            for concept, feature in zip(some, found[0].chunk(len(some)), strict=True):
                self.kept[concept] = feature.clone()
        self.whole += len(some)
        return out

    def _shallow(self, run: Run, step: Step, x: Tensor, some: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        with skipping(run.base.unet, self.cut, torch.cat([self.kept[k] for k in some])):
            out = self.each(run, x, step.timestep, some)
        self.shallow += len(some)
        return out

    def explain(self, run: Run) -> Sequence[Figure]:
        if run.bank is None or not self.course:
            return ()
        adapters = [run.bank.adapters[k] for k in self.concepts]
        table = [weights(len(adapters), turn.dominant, turn.q) for turn in self.course]
        called = row_names(adapters)
        rows = {name: [line[i] / len(adapters) for line in table] for i, name in enumerate(called)}
        marks = {(called[i], index) for index, turn in enumerate(self.course) for i in turn.whole}
        text = (
            f"The share of each LoRA in the mean: the dominant one has most. Marked: whole forwards ({self.whole} of "
            f"{self.whole + self.shallow}); the others reuse what the last whole one of that LoRA left.{self.told}"
        )
        if BASE in self.passes:
            text += " Its passes are counted too."
        known = {name: stored(a, run.base) for name, a in zip(called, adapters, strict=True)}
        lines = {
            f"{name}: {'high' if found.high else 'low'} ({found.score:+.4f})": found.curve
            for name, found in known.items()
            if found is not None
        }
        shown: list[Figure] = [Schedule(title="Dominance", text=text, rows=rows, marks=marks)]
        if lines:
            told = "Relative high-frequency content of the latents with each LoRA, minus without; at 0 or above it is high."
            shown.append(Curves(title="Fourier profiles", text=told, lines=lines))
        return shown
