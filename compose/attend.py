"""Attend-and-Excite (Chefer et al., "Attention-Based Semantic Guidance", SIGGRAPH 2023) around any other method.

    A   = softmax over words of 100 * (mean map),  without begin and end            L = max_s (1 - max smooth(A_s))
    z  <- z - 20 sqrt(linspace(1, 1/2, T)_i) grad_z L,                              in the first half of the schedule

At some shares of the schedule the update is repeated until every subject has its threshold, at most ``refinements`` times.
Each subject should own at least one place; nothing says which.
Where the prompt says a place, it must stand before the noun to be known to it, as :mod:`compose.clora` says.

It is a method that wraps another rather than an option of each: the wrapped one sets its routes and prompts as ever,
then the latents are moved, then it predicts, and it need not know. Maps are read with the LoRAs that it lets act at that
moment; where it lets none act outside its own forwards, with all of them.

What is different from the published code: a subject may be several tokens (their renormalised maps add up); rows of a batch
stop being refined one by one; the pass is conditional, stops at the last map, and its last refinement is not made twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compose.attention import Maps
from compose.bank import Adapter, Layer, OnLayer
from compose.figures import Curves, Figure
from compose.finder import locate
from compose.guidance import Loss, Unit, begins_step, latents_gradient, lossy, phi, reaches, scaled, updated, word_maps
from compose.maps import mean_map, smoothed
from compose.options import Share, Strength, from_json, names
from compose.routes import constant
from compose.run import Method, Options, Run, Step
from compose.text import words_of
from studio.errors import RequestError

if TYPE_CHECKING:
    from studio.base import Base

SHARPNESS = 100.0
"""Multiplies the maps before words compete for each place."""


class AttendOptions(Options):
    """Options of :class:`Attend`; the defaults are the paper's, of 50 steps at 512 x 512.

    Args:
        method: the method that composes the LoRAs, such as merge or switch.
        inner: the options of that method, such as {"tau": 2}.
        words: words of the prompt that must each have a place. By default what the LoRAs call their subjects.
        step: how far the first update moves the latents against the gradient; it falls to 0.71 of that; the paper has 20. 0
            turns guidance off.
        unit: what ``step`` counts in. "gradient": the gradient as it is, as in the paper; "noise": shares of the noise in the
            latents, the same on every model (try 0.05 to 0.2).
        until: share of the schedule at which updates end; the paper has 0.5.
        thresholds: by share of the schedule, how much of its best place the weakest subject must have there, or updates are
            repeated; the paper has {"0": 0.05, "0.2": 0.5, "0.4": 0.8}.
        refinements: how often at most they are repeated; the paper has 20.
    """

    method: str = "merge"
    inner: Mapping[str, Any] = Field(default_factory=dict)
    words: tuple[str, ...] = ()
    step: Strength = 20.0
    unit: Unit = "gradient"
    until: Share = 0.5
    thresholds: Mapping[Share, Share] = Field(default_factory=lambda: {0.0: 0.05, 0.2: 0.5, 0.4: 0.8})
    refinements: Annotated[int, Field(ge=0)] = 20

    _words = field_validator("words", mode="before")(names)
    _written = field_validator("inner", "thresholds", mode="before")(from_json)


def competing(maps: Tensor, context: int) -> Tensor:
    """``[n, L, h, w]`` with the words of each place brought to sum 1; the first and last column of each chunk have none."""
    columns = torch.arange(maps.shape[1], device=maps.device) % context
    outside = (columns == 0) | (columns == context - 1)
    return (SHARPNESS * maps).masked_fill(outside[:, None, None], float("-inf")).softmax(1)


def neglect(maps: Tensor, sets: Tensor, context: int) -> Tensor:
    """``1 - max smooth(A_s)`` of each subject, ``[n, S]``, from maps of all columns ``[n, L, h, w]`` and sets ``[S, L]``."""
    own = torch.einsum("nlhw,sl->nshw", competing(maps, context), sets.to(maps))
    return 1 - smoothed(own).amax((2, 3))


class Attend(Method):
    """Another method whose latents are moved until every subject has a place.

    Attributes during and after a run:
        losses: of the weakest subject, one number per row for every update. updates: how many each step had.
    """

    takes: ClassVar[type[Options]] = AttendOptions
    regions: ClassVar[Literal["none", "optional", "required"]] = "optional"
    options: AttendOptions

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        from compose import method_named

        if self.options.method == "attend":
            raise RequestError("'method' cannot be attend itself: name the one that composes, such as merge")
        self.method = method_named(self.options.method, **self.options.inner)
        self.regions = self.method.regions  # type: ignore[misc]

    @property
    def divisible(self) -> bool:
        return self.method.divisible

    def check(self, adapters: Sequence[Adapter]) -> None:
        self.method.check(adapters)

    def survey(
        self, base: Base, adapters: Sequence[Adapter], layers: Mapping[str, Layer], on_step: OnLayer | None = None
    ) -> Sequence[str]:
        return self.method.survey(base, adapters, layers, on_step)

    def fuse(
        self, adapters: Sequence[Adapter], layers: Mapping[str, Layer], on_layer: OnLayer | None = None
    ) -> Sequence[Adapter]:
        return self.method.fuse(adapters, layers, on_layer)

    def prepare(self, run: Run) -> None:
        self.losses: list[Tensor] = []
        self.updates: list[int] = []
        self.sets: Tensor | None = None
        self.method.prepare(run)
        requested = run.bank.requested if run.bank is not None else ()
        phrases = list(self.options.words) or [a.lora.called for a in requested if a.weight != 0 and not a.lora.is_style]
        if self.options.step == 0 or not phrases:
            return
        if not all(phrases):
            raise RequestError("a LoRA does not say what it draws: name the words that need a place, such as words='cat,dog'")
        if run.wording is None:
            raise RequestError(
                "Attend-and-Excite looks for words, and this run has only encoded prompts: give the prompt as text"
            )
        words = words_of(run.base, run.wording.reading)["text_encoder"]
        self.sets = torch.zeros(len(phrases), run.positive.states.shape[1])
        for row, phrase in enumerate(phrases):
            self.sets[row, list(locate(words, run.wording.prompt, phrase).columns)] = 1
        run.notes += lossy(run.scheduler)

    def before_step(self, run: Run, step: Step) -> None:
        self.method.before_step(run, step)
        self.updates.append(0)
        if step.index == 0:
            self._last = step.skipped - 1
        if self.sets is None or step.fraction >= self.options.until or not begins_step(run.scheduler):
            return
        wanted = [threshold for share, threshold in self.options.thresholds.items() if reaches(step, share, self._last)]
        self._last = step.skipped + step.index
        for _ in range(self.options.refinements if wanted else 0):
            value, gradient = self.descent(run, step)
            lacking = value > 1 - max(wanted)
            if not bool(lacking.any()):
                break
            self.update(run, step, value, gradient * lacking.view(-1, 1, 1, 1))
        self.update(run, step, *self.descent(run, step))

    def descent(self, run: Run, step: Step) -> tuple[Tensor, Tensor]:
        """The loss of each row and its gradient."""
        bank = run.bank
        route = None if bank is None else bank.route
        # Rows of their own, or none that acts: the wrapped method sets routes inside its forwards.
        silent = isinstance(route, Tensor) and (len(route) > 1 or not bool(route.any()))
        everything = constant([1.0] * len(bank.adapters)) if bank is not None and silent else None
        with nullcontext() if bank is None else bank.acting(everything):
            return latents_gradient(
                run, step, run.latents, [word_maps(run, "words", None)], self.loss(run), encoded=run.positive
            )

    def loss(self, run: Run) -> Loss:
        """The loss as a function of the maps of all columns."""

        def weakest(maps: Maps) -> Tensor:
            if self.sets is None:
                raise RuntimeError("a loss without words")
            return neglect(mean_map(maps["words"]), self.sets, run.base.context_length).amax(1)

        return weakest

    def update(self, run: Run, step: Step, value: Tensor, gradient: Tensor) -> None:
        """One step down the gradient."""
        size = phi(step.skipped + step.index, step.skipped + step.count, self.options.step)
        run.latents = updated(run.latents, scaled(run, step, gradient, self.options.unit), size)
        self.losses.append(value)
        self.updates[-1] += 1

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        return self.method.predict(run, step, x)

    def after_step(self, run: Run, step: Step) -> None:
        self.method.after_step(run, step)

    def explain(self, run: Run) -> Sequence[Figure]:
        lines = {f"picture {row + 1}": [float(value[row]) for value in self.losses] for row in range(len(run.latents))}
        mine = Curves(
            title="The weakest subject",
            text="1 minus its share of its best place; lower is better.",
            lines=lines,
            across="update",
        )
        return [*self.method.explain(run), *([mine] if self.losses else [])]
