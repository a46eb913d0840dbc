"""Masked outputs: at every place of the picture only that place's own LoRA acts, in one pass and without gradients.

    y[p] = (W x)[p] + sum_n m_n[p] s_n B_n A_n x[p]                              at every layer over image tokens
    out[p] = sum_n m_n[p] (W_O + dW_O^n) softmax(Q K_n^T / sqrt d) V_n           where there is text

``m_n`` is 1 in region n. Text has no place, so each region reads the prompt with keys and values of its own LoRA, the rest of
the picture with none. That masking outputs is enough is FreeFuse's finding (arXiv 2510.23515, 2025).

Without regions their masks are found first. All LoRAs act together for a few steps; the cells that attend most to a LoRA's
words are its *seeds*, and a cell belongs to the LoRA whose seeds it is most alike. Then the run begins again with the masks,
each picture with its own.

FreeFuse measures likeness by inner products of hidden states; here it is how much a cell attends to the seeds, of which the
maps are at hand. It has no background; here a cell that is much less like any seeds than the best cell is belongs to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compose.bank import Adapter
from compose.figures import Boxes, Figure
from compose.figures import Maps as Pictures
from compose.guidance import self_maps, word_maps
from compose.maps import SecondHalf, Seen, found_masks, mean_map, mean_values
from compose.options import Share, names
from compose.plan import AttentionPlan, Isolation, Regional, Regions, RegionText, columns
from compose.region_words import Arrangement, Place, Said, said_by_default
from compose.regions import Layout, Spot, bounds, laid_out, say_everywhere, speaking, spot
from compose.routes import constant
from compose.run import Method, Options, Run, Step, joined
from compose.separate import known
from compose.text import Wording


class MaskedOptions(Options):
    """Options of :class:`Masked`.

    Args:
        isolation: whether regions are hidden from each other in self-attention; FreeFuse does not.
        prompt: what a region without a prompt says. "local": its subject and what the prompt says about the whole picture;
            "placed": that in the prompt's own order, with an article and where it is; "arranged": that with the subjects of all
            regions, others by their class words; "whole": the prompt. By default "placed" ("arranged" on the embedded base)
            where regions are drawn, and "whole" where they are found: those may be too rough to tell places.
        always: LoRAs that act everywhere though no region is drawn; those whose file says that they are styles do so anyway.
        find: share of the schedule that is run to find masks where no regions are drawn; FreeFuse has a third.
        seeds: share of the cells that are the seeds of a LoRA's mask; FreeFuse has 0.1.
        threshold: how much like a LoRA's seeds a cell must be to belong to it, 1 being the cell that is most; 0: every cell
            belongs to some LoRA, as in FreeFuse.
    """

    isolation: bool = False
    prompt: Said | None = None
    always: tuple[str, ...] = ()
    find: Annotated[float, Field(gt=0, le=1)] = 0.3
    seeds: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    threshold: Share = 0.5

    _names = field_validator("always", mode="before")(names)


class Probe(Method):
    """All LoRAs together for a few steps: what ``half`` has ``seen`` afterwards has words as ``[n, K, h, w]``."""

    def __init__(self, spots: Sequence[Spot], half: SecondHalf) -> None:
        super().__init__()
        self.spots, self.half = spots, half

    def prepare(self, run: Run) -> None:
        if run.bank is not None:
            run.bank.route = constant([1.0] * len(run.bank.adapters))
            if run.encode is not None and speaking(run.bank.adapters):
                run.condition(*run.encode())
        count = len(run.latents)
        rows = tuple(range(count, 2 * count)) if run.guided else tuple(range(count))
        sets = columns(run.positive.ids.shape[1], *(sum(one.targets, ()) for one in self.spots))
        taps = (word_maps(run, "words", sets, rows), self_maps(run, "self", rows))
        self.attention = run.attend(AttentionPlan(taps=taps))

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.half.reads(step.index):
            return super().predict(run, step, x)
        with self.attention.collecting() as maps:
            out = super().predict(run, step, x)
        self.half.add(Seen(mean_map(maps["words"]), mean_values(maps["self"])))
        return out


class Masked(Method):
    """Every LoRA on the places of its own region; without regions, where a few steps show its subject.

    Attributes after a run: ``layouts``: the regions, one for all pictures if they were given, else one per picture.
    """

    takes: ClassVar[type[Options]] = MaskedOptions
    regions: ClassVar[Literal["none", "optional", "required"]] = "optional"
    options: MaskedOptions

    def check(self, adapters: Sequence[Adapter]) -> None:
        known(self.options.always, "always", adapters)

    def prepare(self, run: Run) -> None:
        self.layouts: list[Layout] = []
        self._spots: dict[tuple[int, str], Spot] = {}
        if run.regions:
            self.layouts = [laid_out(run, self.options.prompt, least=1)]
        else:
            self.layouts = self._found(run)
        if not self.layouts:
            return
        rows = len(run.latents) if run.regions else 1
        shape = run.latents.shape[-2:]
        self._routes = [layout.placed(*shape) for layout in self.layouts]
        texts = {one: one.text(rows if run.guided else 0) for layout in self.layouts for one in layout.spots}
        self._plans = [self._plan(layout.regions, tuple(texts[one] for one in layout.spots)) for layout in self.layouts]
        self._pairs = [joined(run.negative.rows([row]), run.positive.rows([row])) for row in range(len(run.latents))]
        if run.regions:
            run.attend(self._plans[0])
            if run.bank is not None:
                run.bank.route = self._routes[0]

    def _plan(self, regions: Regions, texts: tuple[RegionText, ...]) -> AttentionPlan:
        isolation = Isolation(regions=regions) if self.options.isolation else None
        return AttentionPlan(isolation=isolation, regional=Regional(regions=regions, texts=texts))

    def _found(self, run: Run) -> list[Layout]:
        """Regions from a probe run, for each picture; none where there is nothing to look for."""
        bank = run.bank
        if bank is None:
            return []
        everywhere = tuple(
            1.0 if adapter.lora.is_style or {*adapter.names} & {*self.options.always} else 0.0 for adapter in bank.adapters
        )
        bank.route = constant(everywhere)
        concepts = [index for index in bank.active if not everywhere[index]]
        if not concepts:
            return []
        say_everywhere(run, everywhere)
        prompt = (run.wording or Wording(prompt="")).prompt
        spots = tuple(spot(run, {index: 1.0}, everywhere, prompt, strict=True) for index in concepts)
        half = SecondHalf(self.options.find, len(run.timesteps))
        run.probe(Probe(spots, half), half.steps)
        if half.seen is None or half.seen.selves is None:
            raise RuntimeError("the probe has read nothing")
        pairs = zip(half.seen.words.cpu(), half.seen.selves.cpu(), strict=True)
        masks = [found_masks(words, selves, self.options.seeds, self.options.threshold) for words, selves in pairs]
        return [self._layout(run, mask, concepts, everywhere, prompt) for mask in masks]

    def _layout(self, run: Run, masks: Tensor, concepts: Sequence[int], everywhere: tuple[float, ...], prompt: str) -> Layout:
        """One picture's regions, and what is said in each."""
        adapters = run.bank.adapters if run.bank is not None else ()
        # The middle of its cells, not of the box around them: one stray cell would move that.
        middles = ((mask.nonzero() + 0.5).mean(0) / torch.tensor(mask.shape) for mask in masks)
        boxes = tuple(bounds(mask) for mask in masks)
        arrangement = Arrangement(
            places=[
                Place((float(x), float(y)), box[2] - box[0], [adapters[i]])
                for i, box, (y, x) in zip(concepts, boxes, middles, strict=True)
            ],
            styles=[adapter for adapter, weight in zip(adapters, everywhere, strict=True) if weight and adapter.weight],
        )
        spots = []
        for place, index in enumerate(concepts):
            told = said_by_default(prompt, place, arrangement, self.options.prompt or "whole") or prompt
            if (index, told) not in self._spots:
                self._spots[(index, told)] = spot(run, {index: 1.0}, everywhere, told)
            spots.append(self._spots[(index, told)])
        return Layout(regions=Regions(masks), boxes=boxes, spots=tuple(spots), everywhere=everywhere)

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if run.regions or not self.layouts:
            return run.forward_guided(x, step.timestep)
        # Masks found for each picture: its rows need a plan of their own, which a method around this one must not find later.
        found = []
        for row, pair in enumerate(self._pairs):
            run.check_cancelled()
            told = pair if run.guided else run.positive.rows([row])
            with run.planned(self._plans[row]), nullcontext() if run.bank is None else run.bank.acting(self._routes[row]):
                found.append(run.forward(x[row : row + 1].expand(len(told.states), -1, -1, -1), step.timestep, told))
        cond = torch.cat([out[-1:] for out in found])
        return (torch.cat([out[:1] for out in found]) if run.guided else None), cond

    def explain(self, run: Run) -> Sequence[Figure]:
        if not self.layouts:
            return ()
        layout, shape = self.layouts[0], run.latents.shape[-2:]
        masks = layout.regions.at(*shape).float().unflatten(1, shape)
        return [
            Boxes(title="Regions", boxes=dict(zip(layout.names, layout.boxes, strict=True))),
            Pictures(
                title="Masks",
                text="Where each LoRA acts.",
                top=1.0,
                rows={name: [mask] for name, mask in zip(layout.names, masks, strict=True)},
            ),
        ]
