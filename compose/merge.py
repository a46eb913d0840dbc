"""Merge: all LoRAs act everywhere and always, summed with their weights.

    y = W x + sum_k w_k(t, l) s_k B_k A_k x            t: share of the schedule, l: layer

The exact sum of the deltas, not of the factors: adding the A's and the B's separately would bring cross terms B_i A_j. Weights
may differ by block and change over the schedule. ``how`` names other ways to make one LoRA of several (:mod:`compose.fuse`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from compose.bank import Adapter, Layer, OnLayer, refuse_ambiguous, row_names
from compose.figures import Figure, Schedule
from compose.fuse import DENSITY, Recipe, fused, layer_weights
from compose.inputs import moments
from compose.options import Count, Share, from_json
from compose.profile import prompts_for
from compose.refit import REFITS
from compose.regions import speaking
from compose.routes import Site, constant
from compose.run import Method, Options, Run, Step
from studio.errors import RequestError
from studio.requests import Finite

if TYPE_CHECKING:
    from torch import Tensor

    from studio.base import Base

T = TypeVar("T")
EVERY = "*"
RANDOM = ("dare", "dare_ties", "lego")
SHORT = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
How = Literal["sum", "cat", "svd", "ties", "dare", "dare_ties", "lego", "gradient", "zip"]


class MergeOptions(Options):
    """Options of :class:`Merge`.

    Args:
        how: "sum" keeps the LoRAs apart and adds what they do; the others make one LoRA of them first: "cat" the same sum,
            "svd" at a lower rank, "ties", "dare" and "dare_ties" thinned out, "lego" by clusters, "gradient" and "zip" fitted
            to what flows into each layer while every LoRA draws its own trigger alone, which is done first.
        weight: multiplies all weights; "1/K" divides them by the number of LoRAs.
        blocks: how much LoRAs weigh in parts of the model, by LoRA name or "*" for all: {"*": {"up": 0.5, "down_blocks.1": 0}}.
            Parts are down, mid, up, text_encoder or the beginning of a layer's name; the longest that fits counts.
        schedule: how weights change over the steps, by LoRA name or "*" for all: pairs of (share of the schedule, factor),
            joined by straight lines, such as {"style": [[0, 0], [0.5, 1]]}. Two pairs at one share are a jump: from there on
            the later pair counts. Prompts are encoded again at every step where a LoRA's change of the text encoder changes.
        rank: rank of the one LoRA that is made in each layer. By default all ranks together; for "svd" and "lego" the largest.
        density: share of entries that "ties" and "dare" keep. By default 0.2 for ties, as published, and 0.5 where dare drops.
        seed: seed of what "dare", "dare_ties" and "lego" draw at random.
    """

    how: How = "sum"
    weight: Finite | Literal["1/K"] = 1.0
    blocks: Mapping[str, Mapping[str, Finite]] = Field(default_factory=dict)
    schedule: Mapping[str, tuple[tuple[Share, Finite], ...]] = Field(default_factory=dict)
    rank: Count | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int = 0

    _written = field_validator("blocks", "schedule", mode="before")(from_json)

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.rank is not None and self.how in ("sum", "cat"):
            raise ValueError(
                f"'rank' does nothing with how='{self.how}', which keeps every rank: take another, such as svd or ties"
            )
        if self.density is not None and self.how not in DENSITY:
            raise ValueError(f"'density' does nothing with how='{self.how}', which drops no entries: take {', '.join(DENSITY)}")
        if self.seed and self.how not in RANDOM:
            raise ValueError(f"'seed' does nothing with how='{self.how}', which draws nothing: take {', '.join(RANDOM)}")
        return self


def live(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Those with a weight."""
    return [adapter for adapter in adapters if adapter.weight != 0]


def told(option: Mapping[str, T], adapter: Adapter) -> list[T]:
    """What an option says about a LoRA: first what it says about all, then what about this one."""
    return [option[name] for name in dict.fromkeys((EVERY, *adapter.names)) if name in option]


def at(points: Sequence[tuple[float, float]], share: float) -> float:
    """The line through ``points`` at ``share``; level before the first and after the last.

    Two points at one share, in their order, are a jump there; the later one counts from that share on.
    """
    points = sorted(points, key=lambda point: point[0])
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= share < x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return points[0][1] if share < points[0][0] else points[-1][1]


def block_weight(parts: Mapping[str, float], layer: str) -> float:
    """The weight of the longest part that ``layer`` belongs to; 1 when none does."""
    name = layer.removeprefix("unet.")
    fitting = [part for part in parts if f"{name}.".startswith(f"{_full(part)}.")]
    return parts[max(fitting, key=lambda part: len(_full(part)))] if fitting else 1.0


def _full(part: str) -> str:
    name = part.removeprefix("unet.")
    return SHORT.get(name, name)


class Merge(Method):
    """Weighted sum of any number of LoRAs; with none, the stock model."""

    takes: ClassVar[type[Options]] = MergeOptions
    options: MergeOptions
    moments: Mapping[str, Tensor] | None = None

    def check(self, adapters: Sequence[Adapter]) -> None:
        have = {EVERY} | ({name for a in adapters for name in a.names} if self.options.how == "sum" else set())
        for option in ("blocks", "schedule"):
            for name in getattr(self.options, option):
                if name not in have:
                    why = "one LoRA is made of all, so only '*' can be meant" if self.options.how != "sum" else "no such LoRA"
                    raise RequestError(f"'{option}' names '{name}', but {why} in this request")
                refuse_ambiguous(name, option, adapters)
        if any(not points for points in self.options.schedule.values()):
            raise RequestError("'schedule' holds an empty list: give pairs of (share of the schedule, weight)")

    def survey(
        self, base: Base, adapters: Sequence[Adapter], layers: Mapping[str, Layer], on_step: OnLayer | None = None
    ) -> Sequence[str]:
        some = live(adapters)
        if self.options.how not in REFITS or len(some) < 2:
            return ()
        self.moments = moments(base, some, layers, on_step=on_step)
        return [
            f"LoRA '{adapter.name}' does not say what it draws: how='{self.options.how}' saw it without a prompt"
            for adapter in some
            if not any(prompts_for(adapter))
        ]

    def fuse(
        self, adapters: Sequence[Adapter], layers: Mapping[str, Layer], on_layer: OnLayer | None = None
    ) -> Sequence[Adapter]:
        some = live(adapters)
        factor = 1 / max(len(some), 1) if self.options.weight == "1/K" else self.options.weight
        if self.options.how == "sum":
            return [Adapter(a.name, a.lora, a.weight * factor) for a in adapters]
        if not some:
            return []
        options = self.options
        if options.how in REFITS and self.moments is None and len(some) > 1:
            raise RequestError(
                f"how='{options.how}' looks at the base first: call the method's survey before LoRAs are attached"
            )
        recipe = Recipe(how=options.how, rank=options.rank, density=options.density, seed=options.seed)
        one = fused([(a.weight, a.lora) for a in some], layer_weights(layers), recipe, on_layer, self.moments)
        self.moments = None  # a gigabyte or more
        return [Adapter(" + ".join(a.name for a in some), one, factor)]

    def prepare(self, run: Run) -> None:
        bank = run.bank
        if bank is None:
            return
        if bank.fuse is None and bank.requested and (self.options.how != "sum" or self.options.weight != 1):
            raise RequestError(
                f"how='{self.options.how}' with weight={self.options.weight} acts when LoRAs are attached, but these were "
                "attached without it: use LoraBank.on(base, adapters, fuse=method.fuse)"
            )
        bank.route = constant([1.0] * len(bank.adapters))
        # The run comes with prompts encoded under this route.
        self.encoded_at = [1.0] * len(bank.adapters)
        if not self.options.blocks:
            return
        touched = {layer for adapter in bank.adapters for layer in adapter.lora.layers}
        for part in {part for parts in self.options.blocks.values() for part in parts}:
            if all(block_weight({part: 0.0}, layer) == 1 for layer in touched):
                raise RequestError(f"'blocks' names '{part}', where no LoRA of the request has a layer")
        bank.by_layer(lambda site: self.gains(bank.adapters, site))
        if run.encode is not None and speaking(bank.adapters):
            run.condition(*run.encode())

    def gains(self, adapters: Sequence[Adapter], site: Site) -> list[float]:
        """What ``blocks`` says about one layer, for every LoRA."""
        merged = [{part: w for parts in told(self.options.blocks, a) for part, w in parts.items()} for a in adapters]
        return [block_weight(parts, site.name) for parts in merged]

    def before_step(self, run: Run, step: Step) -> None:
        if run.bank is None or not self.options.schedule:
            return
        adapters = run.bank.adapters
        now = [self.share(a, step.fraction) for a in adapters]
        run.bank.route = constant(now)
        # Not at every step: with models that take turns in memory, encoding may mean moving one there and back.
        changed = [adapters[k] for k in run.bank.active if now[k] != self.encoded_at[k]]
        if run.encode is not None and speaking(changed):
            run.condition(*run.encode())
            self.encoded_at = now

    def share(self, adapter: Adapter, fraction: float) -> float:
        """What ``schedule`` says about one LoRA at a share of the schedule."""
        return at((told(self.options.schedule, adapter) or [((0.0, 1.0),)])[-1], fraction)

    def explain(self, run: Run) -> Sequence[Figure]:
        if run.bank is None or not run.bank.adapters:
            return ()
        count = len(run.timesteps)
        steps = [(run.skipped + index) / (run.skipped + count) for index in range(count)]
        adapters = run.bank.adapters
        rows = {
            name: [a.weight * self.share(a, step) for step in steps]
            for name, a in zip(row_names(adapters), adapters, strict=True)
        }
        return [Schedule(title="Weights", text="How much each LoRA weighs in the sum at each step.", rows=rows)]
