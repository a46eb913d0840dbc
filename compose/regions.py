"""The regions of a request with everything looked up: places as cells, LoRAs as weights, words as columns of their prompt.

A LoRA that some region names acts there and nowhere else; one that none names, such as a style, acts everywhere. Where
regions overlap, the mean of what each would do acts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compose.bank import refuse_ambiguous
from compose.finder import Found, called, says, spell, with_triggers
from compose.plan import Box, Regions, RegionText
from compose.region_words import Arrangement, Place, Said, said_by_default
from compose.routes import Placed, constant, spatial
from compose.run import Run, joined
from compose.text import Encoded, Wording, words_of
from studio.errors import RequestError, UnknownNameError
from studio.media import open_mask
from studio.requests import Region

if TYPE_CHECKING:
    from compose.bank import Adapter
    from compose.tokens import Words

LEAST = 2
"""Cells of a map layer that a region must reach in width and in height: in fewer, a map says nothing about a place."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Spot:
    """One region.

    Args:
        name: of its LoRAs, for people.
        own: which LoRAs of the bank it names. weights: one number per LoRA of the bank: what acts here, with what acts
            everywhere.
        prompt: what is said here. targets: columns of its words that stand for the subject, one set per word: trigger, class.
        negative, positive: ``prompt`` encoded under ``weights``, one row per row of the latents, all alike.
    """

    name: str
    own: tuple[int, ...]
    weights: tuple[float, ...]
    prompt: str
    targets: tuple[tuple[int, ...], ...]
    negative: Encoded
    positive: Encoded

    @property
    def route(self) -> Tensor:
        return constant(self.weights)

    def text(self, guided: int = 0) -> RegionText:
        """What speaks in forwards of as many unconditional, then conditional rows; 0: of any number of conditional ones."""
        rows = [0] * max(guided, 1)
        told = self.positive.rows(rows)
        return RegionText((joined(self.negative.rows(rows), told) if guided else told).states, self.route)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """All regions of a request.

    Args:
        regions: their cells. boxes: around each, as fractions.
        everywhere: one weight per LoRA of the bank: 1 for those that no region names.
    """

    regions: Regions
    boxes: tuple[Box, ...]
    spots: tuple[Spot, ...]
    everywhere: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """One for each region, no two alike."""
        told = [spot.name for spot in self.spots]
        return [f"{name} {index + 1}" if told.count(name) > 1 else name for index, name in enumerate(told)]

    def shares(self, height: int, width: int) -> Tensor:
        """How much each region has of each cell, ``[K, h, w]``: where several overlap, equal parts; 0 where it is not."""
        covered = self.regions.at(height, width).float().view(-1, height, width)
        return covered / covered.sum(0).clamp(min=1)

    def placed(self, height: int, width: int) -> Placed:
        """The route that lets each region's LoRAs act on its cells of a latent ``height x width``, on no text, and those of
        ``everywhere`` on all.
        """
        everywhere = torch.tensor(self.everywhere)
        weights = torch.tensor([spot.weights for spot in self.spots]) - everywhere
        masks = torch.einsum("kyx,kl->lyx", self.shares(height, width), weights) + everywhere[:, None, None]
        return Placed(spatial(masks), constant(self.everywhere))


def laid_out(run: Run, how: Said | None, *, least: int = LEAST) -> Layout:
    """The regions of ``run``, and its own prompt encoded again with what acts everywhere.

    Args:
        how: what a region without a prompt of its own says. None: "placed", and "arranged" on the embedded base, which draws a
            lone subject at mid height whatever the region.
        least: cells of the map layers that a region must reach both ways.

    Raises:
        RequestError: no LoRA, an unknown one, a place that is too small or empty, a prompt without the words it needs.
        FileError: a mask that cannot be read.
    """
    bank = run.bank
    adapters = bank.adapters if bank is not None else ()
    if bank is None or not run.regions:
        raise RequestError("this method needs regions with LoRAs: add one such as cat-face@0,0,0.5,1")
    named = [named_by(region, adapters) for region in run.regions]
    inside = {index for weights in named for index in weights}
    everywhere = tuple(0.0 if index in inside else 1.0 for index in range(len(adapters)))
    regions, boxes = places_of(run.regions, run.size, cell(run) * least)
    say_everywhere(run, everywhere)
    how = how or ("arranged" if run.base.family.small else "placed")
    arrangement = Arrangement(
        places=[Place(middle(box), box[2] - box[0], [adapters[i] for i in own]) for own, box in zip(named, boxes, strict=True)],
        styles=[adapter for index, adapter in enumerate(adapters) if index not in inside and adapter.weight != 0],
    )
    spots = tuple(spot(run, own, everywhere, said_in(run, index, arrangement, how)) for index, own in enumerate(named))
    return Layout(regions=regions, boxes=boxes, spots=spots, everywhere=everywhere)


def say_everywhere(run: Run, everywhere: Sequence[float]) -> None:
    """The run's own prompts encoded again with what acts everywhere, and with nothing else."""
    if run.bank is not None and run.encode is not None and speaking(run.bank.adapters):
        with run.bank.acting(constant(everywhere)):
            run.condition(*run.encode())


def spot(run: Run, own: Mapping[int, float], everywhere: Sequence[float], prompt: str, *, strict: bool = False) -> Spot:
    """A region where the LoRAs ``own`` (weight by index) and those of ``everywhere`` act, and ``prompt`` is said.

    Raises:
        RequestError: ``strict``, and the prompt names no subject of theirs.
    """
    if run.bank is None:
        raise RuntimeError("regions without a bank")
    adapters = run.bank.adapters
    weights = tuple(own.get(index, every) for index, every in enumerate(everywhere))
    with run.bank.acting(constant(weights)):
        negative, positive = run.say(prompt)
    words = words_of(run.base, (run.wording or Wording(prompt=prompt)).reading)["text_encoder"]
    return Spot(
        name=" + ".join(adapters[i].names[1] for i in own),
        own=tuple(own),
        weights=weights,
        prompt=prompt,
        targets=targets_of(words, prompt, adapters, own, strict=strict),
        negative=negative,
        positive=positive,
    )


def speaking(adapters: Sequence[Adapter]) -> bool:
    """Whether some LoRA changes a text encoder."""
    return any(layer.startswith("text_encoder") for adapter in adapters for layer in adapter.lora.layers)


def named_by(region: Region, adapters: Sequence[Adapter]) -> dict[int, float]:
    """Index and weight of every LoRA that ``region`` names.

    Raises:
        UnknownNameError: it names one that the request does not have.
        RequestError: it calls one by a name that several have.
    """
    found: dict[int, float] = {}
    for ref in region.loras:
        refuse_ambiguous(ref.name, "region", adapters)
        index = next((i for i, adapter in enumerate(adapters) if ref.name in adapter.names), None)
        if index is None:
            raise UnknownNameError("LoRA of a region", ref.name, [a.name for a in adapters], hint="(name it with --lora too)")
        found[index] = found.get(index, 0.0) + ref.weight
    return found


def said_in(run: Run, index: int, arrangement: Arrangement, how: Said) -> str:
    """The prompt of one region; triggers that a prompt of its own lacks are added, with a note in the run."""
    region = run.regions[index]
    whole = run.wording.prompt if run.wording is not None else ""
    if region.prompt is not None:
        prompt, notes = with_triggers(region.prompt, arrangement.places[index].own)
        run.notes += [f"region {region.place}: {note}" for note in notes]
        return prompt
    prompt = said_by_default(whole, index, arrangement, how)
    if not prompt:
        run.notes.append(
            f"the LoRAs of region {region.place} name no trigger: the whole prompt is said there; give it a prompt of its own"
        )
    return prompt or whole


def targets_of(
    words: Words, prompt: str, adapters: Sequence[Adapter], own: Collection[int] | None = None, *, strict: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Columns of ``prompt`` that stand for what LoRAs were taught: each one's trigger, and its class word.

    Where none of them is known or said, all words of the prompt are one set.

    Args:
        adapters: all that act. own: indices of those that are meant; None: all. The others only keep the nouns beside their
            triggers; when ``strict``, the prompt is about all of them, and those without a trigger have nouns too.

    Raises:
        RequestError: the prompt is empty; or ``strict``, and it has none of these words.
    """
    meant = set(range(len(adapters)) if own is None else own)
    said = [
        index
        for index, a in enumerate(adapters)
        if index in meant or strict or (a.lora.trigger and says(prompt, a.lora.trigger))
    ]
    found: list[Found] = []
    for index, words_of_it in zip(said, called(words, prompt, [adapters[index] for index in said]), strict=True):
        for one in words_of_it if index in meant else ():
            if one is not None and not any(set(one.columns) <= set(known.columns) for known in found):
                found.append(one)
    if found:
        return tuple(one.columns for one in found)
    if strict:
        told = " or ".join(f"'{phrase}'" for index in sorted(meant) if (phrase := adapters[index].lora.called))
        raise RequestError(
            f"where LoRA '{adapters[min(meant)].name}' acts is found by its words, and the prompt lacks them: "
            + (f"write {told}" if told else "its file names none, so draw regions")
        )
    every_word = spell(words, prompt).columns
    if not every_word:
        raise RequestError("a region says nothing: give it a prompt")
    return (every_word,)


def cell(run: Run) -> float:
    """The side of a cell of the family's map layers in pixels."""
    return run.base.latent_factor * map_scale(run)


def map_scale(run: Run) -> int:
    """Latent cells along one cell of the family's map layers."""
    downs = [name for name in run.base.family.map_layers if name.startswith("down_blocks.")]
    return int(2 ** min(int(name.split(".")[1]) for name in downs))


def places_of(regions: Sequence[Region], size: tuple[int, int], least: float) -> tuple[Regions, tuple[Box, ...]]:
    """Where the regions of a picture of ``size`` (width, height) are, as boxes or, when some are masks, as masks; and the boxes
    around them.

    Raises:
        RequestError: one that is under ``least`` pixels wide or high. FileError: a mask that cannot be read.
    """
    width, height = size
    masks = {index: read_mask(region.mask, size) for index, region in enumerate(regions) if region.mask is not None}
    boxes = tuple(region.box or bounds(masks[index]) for index, region in enumerate(regions))
    for region, (x0, y0, x1, y1) in zip(regions, boxes, strict=True):
        across, down = (x1 - x0) * width, (y1 - y0) * height
        if min(across, down) < least - 1e-6:
            need = ceil(least)
            raise RequestError(
                f"region {region.place} is {across:.0f} x {down:.0f} pixels of {width} x {height}: too small, "
                f"make it at least {need} x {need} ({least / width:.2g} of the width, {least / height:.2g} of the height)"
            )
    if not masks:
        return Regions(boxes), boxes
    fine = Regions(boxes).at(height, width).view(-1, height, width)
    return Regions(torch.stack([masks.get(index, box) for index, box in enumerate(fine)])), boxes


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """``[h, w]``, true where the picture in a file is lighter than grey, brought to ``size`` (width, height).

    Raises:
        FileError: no readable picture. RequestError: nothing in it is white.
    """
    from PIL import Image

    levels = np.asarray(open_mask(path).resize(size, Image.Resampling.BOX))
    mask = torch.from_numpy(levels.copy()) > 127
    if not bool(mask.any()):
        raise RequestError(f"the mask {path} is black all over: make the region white")
    return mask


def middle(box: Box) -> tuple[float, float]:
    """Of a box (x0, y0, x1, y1), as (x, y)."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def bounds(mask: Tensor) -> Box:
    """The box around a mask ``[h, w]``, as fractions."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    height, width = mask.shape
    return (
        float(columns[0]) / width, float(rows[0]) / height, (float(columns[-1]) + 1) / width, (float(rows[-1]) + 1) / height
    )  # fmt: skip
