"""What shall happen inside attention, as plain data: which maps are read, who may see whom, which text speaks where.

Places are given once, in request coordinates (masks at any resolution, or boxes as fractions), and are brought to each
layer's cells here. ``compose.attention`` carries a plan out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from math import ceil, floor

import torch
from torch import Tensor
from torch.nn import functional as F

from compose.routes import Grid, Route, cells

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` as fractions of width and height."""


class Role(StrEnum):
    """What a layer's queries look at."""

    SELF = "image tokens"
    CROSS = "text tokens"
    TEMPORAL = "frames"


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which layers: of a role, by name patterns (``up_blocks.1.*``), and by how many latent cells one of theirs is wide."""

    role: Role
    names: tuple[str, ...] = ("*",)
    scale: int | None = None

    def holds(self, name: str, role: Role, tokens: int, grid: Grid) -> bool:
        """Whether the layer ``name`` with ``tokens`` image tokens is meant."""
        if role is not self.role or not any(fnmatchcase(name, pattern) for pattern in self.names):
            return False
        if self.scale is None or role is Role.TEMPORAL:
            return True
        return cells(tokens, grid) == (-(-grid.height // self.scale), -(-grid.width // self.scale))


EVERY_SELF = Where(role=Role.SELF)
EVERY_CROSS = Where(role=Role.CROSS)


@dataclass(frozen=True, eq=False)
class Regions:
    """``K`` places of a picture: masks ``[K, y, x]`` at any resolution, or boxes. They may overlap.

    A box covers the cells ``ceil(x0 w) .. floor(x1 w)``, as LoRA-Composer rounds it; a mask covers a cell when it fills half of
    it. A region never vanishes: where it is smaller than a cell it has the cell around its middle.
    """

    places: Tensor | tuple[Box, ...]
    known: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def at(self, height: int, width: int) -> Tensor:
        """``[K, h * w]``, true where a region covers a cell."""
        if (height, width) not in self.known:
            if isinstance(self.places, Tensor):
                found = _masks_at(self.places.float(), height, width)
            else:
                found = torch.stack([_box_at(box, height, width) for box in self.places])
            self.known[(height, width)] = found.flatten(1)
        return self.known[(height, width)]


def _box_at(box: Box, height: int, width: int) -> Tensor:
    x0, y0, x1, y1 = box
    covered = torch.zeros(height, width, dtype=torch.bool)
    columns, rows = _span(x0, x1, width), _span(y0, y1, height)
    covered[rows, columns] = True
    return covered


def _span(start: float, stop: float, cells: int) -> slice:
    first, last = ceil(start * cells - 1e-6), floor(stop * cells + 1e-6)
    if last <= first:
        first = min(int((start + stop) / 2 * cells), cells - 1)
        last = first + 1
    return slice(first, last)


def _masks_at(masks: Tensor, height: int, width: int) -> Tensor:
    y, x = masks.shape[-2:]
    if y < height or x < width:
        masks = F.interpolate(masks[None], scale_factor=(-(-height // y), -(-width // x)), mode="nearest")[0]
    share = F.interpolate(masks[None], size=(height, width), mode="area")[0].flatten(1)
    covered = share >= 0.5
    # The fullest cell of a region that fills none by half.
    fullest = F.one_hot(share.argmax(1), height * width).bool()
    return torch.where(covered.any(1, keepdim=True), covered, fullest).view(-1, height, width)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tap:
    """A map to read: how much each query looks at each of some sets of keys, the mean over heads.

    Args:
        name: under which the maps are collected.
        where: layers to read.
        sets: for text keys ``[S, L]`` or one such per row ``[n, S, L]``: 1 where a token belongs to set ``s`` (see
            :func:`columns`). For image keys masks ``[S, y, x]``. None: every key is a set of its own (small layers only).
        rows: of the forward; None: all. Only the conditional half carries meaning for most methods.
        region: read with the keys of this region's text (its index in ``Regional.texts``) instead of the prompt's.
    """

    name: str
    where: Where
    sets: Tensor | None = None
    rows: tuple[int, ...] | None = None
    region: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Isolation:
    """Regions that may not see each other (LoRA-Composer, concept isolation): a query of a region attends to what shares a
    region with it and to what lies in none; a query in none attends to everything. ``rows`` None: in all rows.
    """

    regions: Regions
    where: Where = EVERY_SELF
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class RegionText:
    """What speaks in one region.

    Args:
        states: text states ``[1 or n, L, d]`` of its own prompt, with as many rows as the forward; or ``[.., layers * d]``, see
            :mod:`compose.layerwise`.
        route: which LoRAs act on its keys, values and output projection; constant over places. None: those that act anyway.
    """

    states: Tensor
    route: Route | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Regional:
    """Text by region (LoRA-Composer, region-aware injection): inside a region its own keys, values and output projection
    replace the prompt's, by the share ``replace`` (1: fully). Where regions overlap their outputs' mean acts.
    """

    regions: Regions
    texts: tuple[RegionText, ...]
    replace: float = 1.0
    where: Where = EVERY_CROSS


@dataclass(frozen=True, kw_only=True)
class KeyFrames:
    """Which frames serve as keys and values for frame ``i``: fixed ones, counted from either end, and ones beside it.

    Sparse-causal attention is ``fixed=(0,), beside=(-1,)``. A frame before the first is the first; a frame that is named
    twice weighs twice, as in the published method.
    """

    fixed: tuple[int, ...] = (0,)
    beside: tuple[int, ...] = (-1,)
    where: Where = EVERY_SELF

    def __post_init__(self) -> None:
        if self.where.role is not Role.SELF:
            raise ValueError(f"key frames act in self-attention within a frame, not in layers of the role '{self.where.role}'")

    def table(self, frames: int) -> Tensor:
        """``[f, m]``: the key frames of every frame."""
        rows = [
            [index % frames for index in self.fixed] + [min(max(i + step, 0), frames - 1) for step in self.beside]
            for i in range(frames)
        ]
        return torch.tensor(rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionPlan:
    """Everything for one forward. An empty plan changes no bit where torch's kernel computes."""

    taps: tuple[Tap, ...] = ()
    isolation: Isolation | None = None
    regional: Regional | None = None
    key_frames: KeyFrames | None = None

    def __post_init__(self) -> None:
        if self.isolation is not None and self.key_frames is not None:
            raise ValueError("isolation and key frames cannot act in one plan")
        if self.key_frames is not None and any(tap.where.role is Role.SELF for tap in self.taps):
            raise ValueError("a tap of self-attention cannot read what looks at key frames: their tokens have no places")
        if self.regional is not None and len(self.regional.regions) != len(self.regional.texts):
            raise ValueError(f"{len(self.regional.texts)} texts for {len(self.regional.regions)} regions")
        for tap in self.taps:
            if tap.region is not None and (self.regional is None or tap.region >= len(self.regional.texts)):
                raise ValueError(f"tap '{tap.name}' reads the text of region {tap.region}, which the plan does not have")


def columns(length: int, *sets: Sequence[int]) -> Tensor:
    """Sets of token columns as ``[S, L]``, for a tap."""
    table = torch.zeros(len(sets), length)
    for row, members in enumerate(sets):
        table[row, list(members)] = 1
    return table


def groups(covered: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Who sees whom under isolation: ``(queries, keys)`` as indices, queries of one group being in the same regions.

    Args:
        covered: ``[K, N]``, true where region ``k`` covers token ``n``.
    """
    free = ~covered.any(0)
    found = []
    patterns, member = torch.unique(covered, dim=1, return_inverse=True)
    for index, pattern in enumerate(patterns.T):
        queries = (member == index).nonzero().squeeze(1)
        seen = free | covered[pattern].any(0) if bool(pattern.any()) else torch.ones_like(free)
        found.append((queries, seen.nonzero().squeeze(1)))
    return found
