"""LoRA-Composer (Yang et al., 2024, arXiv 2403.11627): subjects with LoRAs of their own in boxes of their own, in one pass.

    injection   out[p] = mean_{n: p in R_n} (W_O + dW_O^n) softmax(Q (W_K + dW_K^n) e_n / sqrt d) (W_V + dW_V^n) e_n
    isolation   a query of a region attends to its own region and to what lies in none
    guidance    z <- z - phi_i grad_z L,   phi_i = 20 sqrt(1 - i / (2 T - 2))
                L = sum_n { sum_c [ 8 L_ce + 2 L_fill ] + 10 L_reg }             see :mod:`compose.layout_losses`
    start       noise that attends to a subject is moved into its box             see :mod:`compose.reinit`

``e_n`` is the region's own prompt. Guidance reads one conditional pass that stops at the last map; it ends for good when the
loss has risen, from the share ``least`` of the schedule on, or at the share ``until``.

What is different here:
* Ordinary LoRAs also change queries, self-attention and feed-forward layers, which the paper drops: ``masked_all`` lets all of
  a LoRA act, on the cells of its region. ``cross_kv_out`` is the paper's way.
* A word may be several tokens, whose maps add up; a subject called by more or fewer than two words weighs as one of two.
* Regions may be masks, and may overlap: cells that share a region see each other. In the paper they would see nobody.
* Steps are shares of the schedule, and every picture of a batch stops by its own loss. Losses are in single precision.
* On the embedded base the updates are 5 long, not 20.
* The paper writes the weights as 1, 0.25 and 0.8, its code 8, 2 and 10; these are the code's, so ``leak`` 6.4 is the text's.
* The update before the noise is moved, which the text has and the code has not, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from compose.attention import Maps
from compose.figures import Boxes, Curves, Figure
from compose.figures import Maps as Pictures
from compose.guidance import begins_step, latents_gradient, lossy, maps_of, phi, updated
from compose.layout_losses import enhancement, filling, leaking
from compose.maps import mean_map, mean_values, smoothed
from compose.options import Share, Strength, numbers
from compose.plan import AttentionPlan, Isolation, Regional, RegionText, Role, Tap, Where, columns
from compose.region_words import Said
from compose.regions import laid_out, map_scale
from compose.reinit import Window, moved
from compose.routes import constant
from compose.run import Method, Options, Run, Step

SELF = "self"
STEP, EMBEDDED_STEP = 20.0, 5.0


class LoraComposerOptions(Options):
    """Options of :class:`LoraComposer`; the defaults are the paper's unless told otherwise.

    Args:
        injection: where the LoRAs of a region act. "cross_kv_out": on keys, values and output of its text alone, as in the
            paper; "masked_all", the default here: on every layer, on the region's cells.
        prompt: what a region without a prompt says. "local": its subject and what the prompt says about the whole picture;
            "placed": that in the prompt's own order, with an article and where it is; "arranged": that with the subjects of all
            regions, others by their class words; "whole": the prompt. By default "placed", on the embedded base "arranged".
        replace: how much of the prompt's own attention the region's text replaces; the paper's 1 leaves nothing of it.
        window: shares of the schedule from and to which the region's text acts; the paper has 0,1, all of it.
        isolation: whether regions are hidden from each other in self-attention, as in the paper.
        enhance: weight of the loss that asks a subject's words to be loud in its region; the paper's code has 8. With 0 for
            this and the next two there is no guidance.
        fill: weight of the loss that asks a subject to reach the sides of its region; the paper's code has 2.
        leak: weight of the loss that asks a region not to look outside; the paper's code has 10, its text says 6.4.
        step: how far the first update moves the latents against the gradient. By default the paper's 20, and 5 on the embedded
            base, where 20 breaks subjects. 0 turns guidance off.
        step_end: the last update would be the root of this times as long as the first; the paper has 0.5.
        least: share of the schedule from which guidance ends for good as soon as the loss rises; the paper's code has 0.1.
        until: share of the schedule at which guidance ends in any case, with the step that reaches it; 0: there is none. The
            paper's code has 0.5.
        reinit: whether noise that attends to a subject is moved into its region to begin with, as in the paper.
    """

    injection: Literal["cross_kv_out", "masked_all"] = "masked_all"
    prompt: Said | None = None
    replace: Share = 1.0
    window: tuple[Share, Share] = (0.0, 1.0)
    isolation: bool = True
    enhance: Strength = 8.0
    fill: Strength = 2.0
    leak: Strength = 10.0
    step: Strength | None = None
    step_end: Share = 0.5
    least: Share = 0.1
    until: Share = 0.5
    reinit: bool = True

    _pair = field_validator("window", mode="before")(numbers)

    @field_validator("window")
    @classmethod
    def _forwards(cls, window: tuple[float, float]) -> tuple[float, float]:
        if window[0] > window[1]:
            raise ValueError("ends before it begins")
        return window

    @property
    def guides(self) -> bool:
        return self.step != 0 and any(weight > 0 for weight in (self.enhance, self.fill, self.leak))


class LoraComposer(Method):
    """Region-aware injection, isolation, guidance by attention maps, and noise moved to begin with.

    Attributes after a run:
        layout: the regions. losses: per guided step the loss of every picture, NaN once its guidance has stopped.
        windows: by picture and region where the noise of the region came from.
    """

    takes: ClassVar[type[Options]] = LoraComposerOptions
    regions: ClassVar[Literal["none", "optional", "required"]] = "required"
    options: LoraComposerOptions

    def prepare(self, run: Run) -> None:
        options = self.options
        usual = EMBEDDED_STEP if run.base.family.small else STEP
        self.first = usual if options.step is None else options.step
        self.layout = laid_out(run, options.prompt)
        height, width = run.latents.shape[-2:]
        placed = options.injection == "masked_all"
        if run.bank is not None:
            run.bank.route = self.layout.placed(height, width) if placed else constant(self.layout.everywhere)
        self._sampling = tuple(spot.text(len(run.latents) if run.guided else 0) for spot in self.layout.spots)
        self._looking = tuple(spot.text() for spot in self.layout.spots)
        self.windows: list[list[Window]] = []
        self.losses: list[Tensor] = []
        self.seen: list[tuple[int, list[Tensor]]] = []
        self.guided = torch.full((len(run.latents),), options.guides)
        self._last = torch.full((len(run.latents),), float("inf"))
        run.notes += lossy(run.scheduler) if options.guides else []
        if options.reinit and run.skipped == 0:
            self._move_noise(run)

    def plan(self, texts: tuple[RegionText, ...], step: Step, taps: tuple[Tap, ...] = ()) -> AttentionPlan:
        """What acts at one step, with the regions' ``texts`` for the rows of a forward."""
        regions = self.layout.regions
        start, end = self.options.window
        replace = self.options.replace if start <= step.fraction <= end else 0.0
        return AttentionPlan(
            taps=taps,
            isolation=Isolation(regions=regions) if self.options.isolation else None,
            regional=Regional(regions=regions, texts=texts, replace=replace),
        )

    def taps(self, run: Run, *, selves: bool) -> tuple[Tap, ...]:
        """What guidance reads: each region's words over the whole picture, and who looks at whom."""
        names = run.base.family.map_layers
        words = tuple(
            Tap(
                name=_words(index),
                where=Where(role=Role.CROSS, names=names),
                sets=columns(spot.positive.ids.shape[1], *spot.targets),
                region=index,
            )
            for index, spot in enumerate(self.layout.spots)
        )
        return (*words, Tap(name=SELF, where=Where(role=Role.SELF, names=names))) if selves else words

    def before_step(self, run: Run, step: Step) -> None:
        run.attend(self.plan(self._sampling, step))
        total = step.skipped + step.count
        position = step.skipped + step.index
        if position > self.options.until * total or self.options.until == 0:
            self.guided[:] = False
        rows = self.guided.nonzero().flatten().tolist()
        if not rows or not begins_step(run.scheduler):
            return
        plan = self.plan(self._looking, step, self.taps(run, selves=self.options.leak > 0))
        before = run.latents[rows]
        loss, gradient = latents_gradient(run, step, before, plan, self.loss, encoded=run.positive.rows(rows))
        latents = run.latents.clone()
        latents[rows] = updated(before, gradient, phi(position, total, self.first, self.options.step_end))
        run.latents = latents
        self._latch(run, step, rows, loss.cpu())

    def _latch(self, run: Run, step: Step, rows: list[int], loss: Tensor) -> None:
        """Remember the losses, and end guidance where it is time."""
        total = step.skipped + step.count
        position = step.skipped + step.index
        risen = loss > self._last[rows]
        self._last[rows] = loss
        every = torch.full((len(run.latents),), float("nan"))
        every[rows] = loss
        self.losses.append(every)
        if run.explaining and rows[0] == 0:
            self.seen.append((step.index, self._shown))
        if position >= self.options.until * total:
            self.guided[:] = False
        elif position >= self.options.least * total:
            self.guided[rows] = ~risen

    def loss(self, maps: Maps) -> Tensor:
        """``L`` of every row ``[n]``."""
        options = self.options
        selves = mean_values(maps[SELF]) if SELF in maps else None
        parts: list[Tensor] = []
        self._shown: list[Tensor] = []
        for index in range(len(self.layout.spots)):
            words = mean_map(maps[_words(index)])
            shape = words.shape[-2:]
            region = self.layout.regions.at(*shape)[index].to(words.device)
            self._shown.append(words[0].sum(0).detach().cpu())
            for word in range(words.shape[1]):
                one, cells = smoothed(words[:, word]), region.view(shape)
                asked = options.enhance * enhancement(one, cells) + options.fill * filling(one, cells)
                parts.append(asked * 2 / words.shape[1])
            if selves is not None:
                parts.append(options.leak * leaking(selves, region))
        return torch.stack(parts).sum(0)

    def _move_noise(self, run: Run) -> None:
        """Latent re-initialisation, before the first step."""
        step = Step(index=0, count=len(run.timesteps), timestep=run.timesteps[0])
        plan = self.plan(self._looking, step, self.taps(run, selves=False))
        maps = maps_of(run, step, run.latents, plan, encoded=run.positive)
        shape = maps[_words(0)][0].cells
        every = [mean_map(maps[_words(index)]).sum(1).cpu() for index in range(len(self.layout.spots))]
        cells = [region.view(shape) for region in self.layout.regions.at(*shape)]
        fresh = []
        for row, noise in enumerate(run.noise):
            changed, windows = moved(noise, [one[row] for one in every], cells, map_scale(run))
            fresh.append(changed)
            self.windows.append(windows)
        run.noise = torch.stack(fresh)
        run.latents = run.first(run.noise)

    def explain(self, run: Run) -> Sequence[Figure]:
        names = self.layout.names
        found: list[Figure] = [Boxes(title="Regions", boxes=dict(zip(names, self.layout.boxes, strict=True)))]
        if self.seen:
            rows = {name: [maps[index] for _, maps in self.seen] for index, name in enumerate(names)}
            columns = [f"step {index + 1}" for index, _ in self.seen]
            text = "How much each place attends to the region's words, while the latents are being guided."
            found.append(Pictures(title="Words", text=text, rows=rows, columns=columns))
            losses = [float(loss[0]) for loss in self.losses if bool(loss[0].isfinite())]
            text = "What guidance lowers, until it rises or half of the schedule is over."
            found.append(Curves(title="Loss", text=text, lines={"loss": losses}))
        return found


def _words(index: int) -> str:
    return f"words {index}"
