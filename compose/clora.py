"""CLoRA (Meral et al., "Contrastive Test-Time Composition of Multiple LoRA Models for Image Generation", ICCV 2025).

    p_0          the prompt without triggers, no LoRA          p_k    with the trigger of LoRA k, and LoRA k alone
    z <- z - alpha grad_z L(maps of all passes at z)           L      NT-Xent over token groups (:mod:`compose.contrast`)
    eps = sum_i M_i eps_i / sum_i M_i                          M_k    where p_k's own words look (:mod:`compose.clora_masks`)

All K + 1 passes share one latent. Prompts and token groups are found by :mod:`compose.variants`, maps are cross-attention of
the family's map layers, conditional rows only, mean over heads and layers. A style LoRA acts in every pass, p_0 included.
With a single concept there is nothing to keep apart: it acts everywhere.

The gradient is exact without K + 1 graphs: maps of all passes first, without a graph; then each pass again, alone, with its
vector-Jacobian product (:mod:`compose.guidance`). ``gradient="joint"`` keeps all graphs and saves the first forwards.

Two things decide whether maps say where a subject is. Text encoders are causal: a noun knows of a place that is said before
it, so write "on the left a cat", not "a cat on the left". Measured on the embedded base, a trigger's own half then has two to
three times the attention of the other; else it may be the wrong half. And the published masks suppose maps that are near zero
elsewhere: on the embedded base one covered all of it; ``masks="winner", threshold=0.4`` gives each place to one subject.

What is different from the published code, as two ports of it have it:
* Predictions are made at the updated latent, not at the one from before the update; ``legacy_eps`` brings that back.
* Guidance passes are conditional and stop at the last map; the published ones also average maps of the empty prompt.
* A constant map does not end in NaN; a class with a single map, whose loss is always 0, is refused.
* Token columns come from the tokenizer's offsets; the scripts around the published code are off by one.
* Prompts are encoded with the LoRA of their pass. Constants are shares of the schedule.
* Samplers that visit a noise level twice are guided once there, where a step begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from compose.attention import Map, Maps
from compose.bank import Adapter
from compose.clora_masks import Change, Rule, alike, changed, fused, owned, shares, with_background
from compose.contrast import TAU, nt_xent
from compose.figures import Curves, Figure
from compose.figures import Maps as Pictures
from compose.guidance import (
    Unit,
    as_leaf,
    begins_step,
    finite,
    lossy,
    maps_of,
    on_maps,
    pulled_back,
    reaches,
    scaled,
    self_maps,
    updated,
    word_maps,
)
from compose.maps import SecondHalf, Seen, mean_map, mean_values, min_max
from compose.options import Count, Share, Strength, from_json, names, numbers
from compose.plan import AttentionPlan
from compose.routes import per_row
from compose.run import Options, Run, Step, joined
from compose.separate import BASE, Separate, SeparateOptions, at_once, chunks, known
from compose.text import words_of
from compose.variants import Variants, subjects_of, variants_of
from studio.errors import RequestError
from studio.requests import Finite


class CLoRAOptions(SeparateOptions):
    """Options of :class:`CLoRA`; the defaults are the paper's, of 50 steps at 512 x 512.

    Args:
        always: LoRAs that act in every pass; those whose file says that they are styles do so anyway.
        triggers: the trigger by LoRA name, such as {"cat-face": "zarn"}, where its file does not tell it.
        nouns: the noun that a LoRA draws, by LoRA name, such as {"cat-face": "animal"}, where its file does not tell it or the
            prompt has another word.
        step: alpha, how far each update moves the latents against the gradient; the paper has 20. 0 turns guidance off.
        unit: what ``step`` counts in. "gradient": the gradient as it is, as in the paper; "noise": shares of the noise in the
            latents, the same on every model (try 0.05 to 0.2).
        until: share of the schedule at which updates end; the paper has 0.5.
        refine: shares of the schedule at which many updates are made in a row; the published notebook has 0,0.2,0.4.
        refinements: how many updates those are; the published notebook has 20.
        between: whether the other steps have an update too, as in the paper.
        tau: temperature of the contrast: the smaller, the more the hardest pair of subjects counts; the paper has 0.5.
        masks: when a place belongs to a subject. "max": where a map is over ``threshold`` times its largest value, as in the
            paper; "range": the same after the map is brought to 0..1; "winner": so, and only where no other is stronger;
            "alike": to whose loudest tenth a place attends most, over ``threshold`` of what the best does, as ``masked`` finds
            places.
        threshold: alpha_m, the share of a map's largest value that a place must exceed; the paper has 0.3.
        find: share of the schedule that is run to find masks, which then stay from the beginning. By default 0: masks are found
            anew at every step, as in the paper.
        mask_after: share of the schedule before which no masks act and all passes have equal parts; the paper has 0.
        morphology: what is done to masks, in the order dilate, erode, open, close; the paper does nothing.
        base_keeps: whether the pass without LoRAs also has the places of its own nouns, not only those that nobody else has.
        gradient: "two-pass" holds the graph of one pass at a time; "joint" holds all of them, which is faster and needs more
            memory. Both give the same.
        chunk: passes that share a forward; 1 needs least memory. By default 1 in guidance, and else as many as fit the base's
            batch.
        legacy_eps: whether predictions are those from before the update, as in the published code.
    """

    triggers: Mapping[str, str] = Field(default_factory=dict)
    nouns: Mapping[str, str] = Field(default_factory=dict)
    step: Strength = 20.0
    unit: Unit = "gradient"
    until: Share = 0.5
    refine: tuple[Share, ...] = ()
    refinements: Count = 20
    between: bool = True
    tau: Annotated[Finite, Field(gt=0)] = TAU
    masks: Rule = "max"
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.3
    find: Share = 0.0
    mask_after: Share = 0.0
    morphology: tuple[Change, ...] = ()
    base_keeps: bool = False
    gradient: Literal["two-pass", "joint"] = "two-pass"
    chunk: Count | None = None
    legacy_eps: bool = False

    _names = field_validator("always", "morphology", mode="before")(names)
    _numbers = field_validator("refine", mode="before")(numbers)
    _written = field_validator("triggers", "nouns", mode="before")(from_json)


class CLoRA(Separate):
    """Passes of one LoRA each, held apart by their attention maps and joined by masks.

    Attributes during and after a run:
        variants: prompts and token groups; None when fewer than two concepts act.
        losses: of every update, one number per row.
        updates: how many were made at each step. masks: of the last step, ``[K + 1, n, h, w]``. history: those of the first
            picture with the number of their step, kept while the run is :attr:`~compose.run.Run.explaining`.
    """

    takes: ClassVar[type[Options]] = CLoRAOptions
    options: CLoRAOptions
    variants: Variants | None = None

    def prepare(self, run: Run) -> None:
        self.losses: list[Tensor] = []
        self.updates: list[int] = []
        self.masks: Tensor | None = None
        self.history: list[tuple[int, Tensor]] = []
        self.variants = None
        self.found: Seen | None = None
        bank = self.parted(run)
        if bank is None:
            return
        if len(self.concepts) < 2:
            bank.route = self.only(run, self.concepts[0] if self.concepts else BASE)
            return
        if run.wording is None:
            raise RequestError(
                "CLoRA makes other prompts of yours, and this run has only encoded ones: give the prompt as text"
            )
        words = words_of(run.base, run.wording.reading)["text_encoder"]
        prompt = run.wording.prompt
        chosen = [bank.adapters[k] for k in self.concepts]
        subjects = subjects_of(words, prompt, chosen, triggers=self.options.triggers, nouns=self.options.nouns)
        self.variants = variants_of(words, prompt, subjects, run.positive.states.shape[1])
        run.notes += lossy(run.scheduler) if self.options.step else []
        for concept, variant in zip(self.passes, self.variants.prompts, strict=True):
            with bank.acting(self.only(run, concept)):
                self.prompts[concept] = run.say(variant)
        if self.options.find > 0:
            half = SecondHalf(self.options.find, len(run.timesteps))
            run.probe(Finder(self.options.model_copy(update={"find": 0.0}), half), half.steps)
            self.found = half.seen
        bank.route = self.only(run, BASE)

    def is_always(self, adapter: Adapter) -> bool:
        return adapter.lora.is_style or super().is_always(adapter)

    def check(self, adapters: Sequence[Adapter]) -> None:
        super().check(adapters)
        for option in ("triggers", "nouns"):
            known(getattr(self.options, option), option, adapters)

    @property
    def passes(self) -> tuple[int, ...]:
        """The base, of ``p_0``, and every concept."""
        return (BASE, *self.concepts)

    def before_step(self, run: Run, step: Step) -> None:
        self.updates.append(0)
        if step.index == 0:
            self._last = step.skipped - 1
        if not self.guides(run, step):
            return
        refining = any(reaches(step, share, self._last) for share in self.options.refine)
        self._last = step.skipped + step.index
        if refining or (self.options.between and not self.options.legacy_eps):
            for _ in range(self.options.refinements if refining else 1):
                self.update(run, step)

    def explain(self, run: Run) -> Sequence[Figure]:
        if self.variants is None:
            return []
        lines = {f"picture {row + 1}": [float(value[row]) for value in self.losses] for row in range(len(run.latents))}
        moments = [f"step {number}" for number, _ in self.history]
        rows = {
            name: [masks[index] for _, masks in self.history]
            for index, name in enumerate(("base", *(subject.name for subject in self.variants.subjects)))
        }
        figures: list[Figure] = []
        if self.history:
            figures.append(
                Pictures(title="Who draws where", text="Masks of the first picture.", rows=rows, columns=moments, top=1)
            )
        if self.losses:
            text = "How badly the maps of different subjects are told apart; lower is better."
            figures.append(Curves(title="Contrast", text=text, lines=lines, across="update"))
        return figures

    def guides(self, run: Run, step: Step) -> bool:
        """Whether this step is guided at all."""
        return (
            self.variants is not None
            and self.options.step > 0
            and step.fraction < self.options.until
            and begins_step(run.scheduler)
        )

    def update(self, run: Run, step: Step) -> None:
        """One step down the gradient."""
        options = self.options
        value, gradient = self.descent(run, step, run.latents)
        run.latents = updated(run.latents, scaled(run, step, gradient, options.unit), options.step)
        self.losses.append(value)
        self.updates[-1] += 1

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.variants is None:
            return run.forward_guided(x, step.timestep)
        uncond, cond, seen = self.all_passes(run, x, step)
        if self.options.legacy_eps and self.options.between and not self.updates[-1] and self.guides(run, step):
            self.update(run, step)
        weights = self.weigh(step, seen, x)
        if run.explaining and self.masks is not None:
            self.history.append((step.index + 1, self.masks[:, 0].float().cpu()))
        return (None if uncond is None else fused(uncond, weights)), fused(cond, weights)

    def all_passes(self, run: Run, x: Tensor, step: Step) -> tuple[Tensor | None, Tensor, Seen]:
        """What every pass predicts, ``[P, n, c, h, w]`` each half, and what it attends to in the same forwards, unless that was
        found before: to words ``[P, n, S, h, w]``, and to other cells in the mean over passes, where masks need that."""
        halves, n = (2 if run.guided else 1), len(x)
        unconds, conds, words, selves = [], [], [], []
        for some in chunks(self.passes, at_once(run, self.options.chunk)):
            run.check_cancelled()
            rows = [(index * halves + halves - 1) * n + row for index in range(len(some)) for row in range(n)]
            with run.planned(self.plan(run, some, n, rows)) as attention, attention.collecting() as read:
                uncond, cond = self.each(run, x, step.timestep, some)
            unconds.append(uncond)
            conds.append(cond)
            if "words" in read:
                words.append(mean_map(read["words"]).unflatten(0, (len(some), n)))
            if "self" in read:
                selves.append(mean_values(read["self"]).unflatten(0, (len(some), n)).sum(0))
        joint = None if unconds[0] is None else torch.cat([each for each in unconds if each is not None])
        if self.found is not None:
            return joint, torch.cat(conds), self.found
        mean = torch.stack(selves).sum(0) / len(self.passes) if selves else None
        return joint, torch.cat(conds), Seen(torch.cat(words), mean)

    def weigh(self, step: Step, seen: Seen, like: Tensor) -> Tensor:
        """How much of each pass is taken where, ``[P, n, 1, h, w]``."""
        variants, maps = self.variants, seen.words
        if variants is None or step.fraction < self.options.mask_after:
            return maps.new_full((len(maps), 1, 1, 1, 1), 1 / len(maps))
        if self.found is None or self.masks is None:
            self.masks = self.masks_of(variants, seen)
        return shares(self.masks, *like.shape[-2:]).to(like.dtype)

    def masks_of(self, variants: Variants, seen: Seen) -> Tensor:
        """Where each pass draws, ``[K + 1, n, h, w]``."""
        options, maps = self.options, seen.words
        own = [maps[number][:, variants.own(number)] for number in range(len(maps))]
        if seen.selves is None:
            subjects = owned(own[1:], options.threshold, options.masks)
        else:
            subjects = alike(own[1:], seen.selves, options.threshold)
        base = owned(own[:1], options.threshold, options.masks)[0] if options.base_keeps else None
        return with_background(changed(subjects, options.morphology), base)

    def plan(self, run: Run, some: Sequence[int], n: int, rows: Sequence[int] | None = None) -> AttentionPlan:
        """Reads the token sets of the passes ``some``, each with ``n`` rows; with ``rows``, those of predictions, for masks."""
        if self.variants is None:
            raise RuntimeError("a plan without variants")
        if rows is not None and self.found is not None:
            return AttentionPlan()
        sets = self.variants.sets[[self.passes.index(concept) for concept in some]].repeat_interleave(n, 0)
        taps = [word_maps(run, "words", sets, rows)]
        if rows is not None and self.options.masks == "alike":
            taps.append(self_maps(run, "self", rows))
        return AttentionPlan(taps=tuple(taps))

    def loss(self, maps: Maps) -> Tensor:
        """``[n]`` from maps whose rows are those of all passes, one after the other."""
        if self.variants is None:
            raise RuntimeError("a loss without variants")
        pictures = mean_map(maps["words"]).unflatten(0, (len(self.passes), -1)).flatten(3)
        chosen = torch.stack([pictures[number, :, index] for number, index in self.variants.maps], dim=1)
        return nt_xent(min_max(chosen), self.variants.classes, self.options.tau)

    def read(self, run: Run, step: Step, latents: Tensor, some: Sequence[int]) -> Maps:
        """Maps of the passes ``some`` at ``latents``, from one early forward."""
        if run.bank is None:
            raise RuntimeError("concepts without a bank")
        n = len(latents)
        weights = torch.tensor([self.weights(run, concept) for concept in some for _ in range(n)])
        encoded = joined(*(self.prompts[concept][1] for concept in some))
        with run.bank.acting(per_row(weights)):
            return maps_of(run, step, latents.repeat(len(some), 1, 1, 1), self.plan(run, some, n), encoded=encoded)

    def descent(self, run: Run, step: Step, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The loss ``[n]`` at ``latents`` and its gradient."""
        if self.options.gradient == "joint":
            with torch.enable_grad():
                leaf = as_leaf(latents)
                maps = self.read(run, step, leaf, self.passes)
                value, cotangents = on_maps(self.loss, maps)
                return value, finite(run, pulled_back(run, leaf, maps, cotangents))
        parts = chunks(self.passes, self.options.chunk or 1)
        value, cotangents = on_maps(self.loss, together([self.read(run, step, latents, some) for some in parts]))
        total, start = torch.zeros_like(latents), 0
        for some in parts:
            rows = slice(start, start + len(some) * len(latents))
            own = {name: [None if c is None else c[rows] for c in every] for name, every in cotangents.items()}
            with torch.enable_grad():
                leaf = as_leaf(latents)
                total = total + pulled_back(run, leaf, self.read(run, step, leaf, some), own)
            start = rows.stop
        return value, finite(run, total)


class Finder(CLoRA):
    """The first steps of a run, to see where its subjects are: what ``half`` has ``seen`` afterwards."""

    def __init__(self, options: CLoRAOptions, half: SecondHalf) -> None:
        super().__init__(options)
        self.half = half

    def weigh(self, step: Step, seen: Seen, like: Tensor) -> Tensor:
        if self.half.reads(step.index):
            self.half.add(seen)
        return super().weigh(step, seen, like)


def together(parts: Sequence[Maps]) -> Maps:
    """The rows of several forwards, one after the other."""
    return {
        name: [
            Map(layer.layer, torch.cat([part[name][index].values for part in parts]), layer.cells)
            for index, layer in enumerate(every)
        ]
        for name, every in parts[0].items()
    }
