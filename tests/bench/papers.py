"""Backgrounds as the judge sees them: which known background a picture has, and what its pixels would be without subjects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from studio.art.backgrounds import PHRASES as BACKGROUNDS
from studio.art.backgrounds import background
from studio.art.looks import HELDOUT as LOOKS
from studio.art.looks import look_background

NEAR = 0.12
"""A pixel belongs to a background when no channel (0..1) differs by more."""
SHARE = 0.25
"""Least share of such pixels for a background to be taken as the picture's own."""
PHASES: dict[str, tuple[tuple[int, int], ...]] = {
    "stripes": tuple((0, x) for x in range(0, 12, 2)),
    "dots": tuple((y, x) for y in range(0, 20, 2) for x in range(0, 10, 2)),
    "checker": tuple((y, x) for y in range(0, 16, 4) for x in range(0, 8, 4)),
    "blueprint": tuple((y, x) for y in range(0, 8, 2) for x in range(0, 8, 2)),
}
"""Shifts at which a textured background may lie in a generated picture."""


@dataclass(frozen=True)
class Paper:
    """The background of a picture.

    ``name`` is the background (``None``: none of the known ones), ``look`` the look that redrew or replaced it. ``pixels``
    ``[H, W, 3]`` in 0..1; ``share``: part of the examined pixels within :data:`NEAR` of it.
    """

    name: str | None
    look: str | None
    pixels: Tensor
    share: float


@lru_cache(maxsize=4)
def candidates(side: int) -> tuple[tuple[tuple[str | None, str | None], ...], Tensor]:
    """All known backgrounds: ``((background, look), ...)`` and their pixels ``[n, side, side, 3]`` in 0..1.

    A look that brings its own background has the name ``None``.
    """
    labels: list[tuple[str | None, str | None]] = []
    pictures: list[np.ndarray] = []

    def add(label: tuple[str | None, str | None], texture: str, picture: np.ndarray) -> None:
        for dy, dx in PHASES.get(texture, ((0, 0),)):
            labels.append(label)
            pictures.append(np.roll(picture, (dy, dx), (0, 1))[:side, :side])

    for name in BACKGROUNDS:
        plain = background(name, side + 32 if name in PHASES else side)
        add((name, None), name, plain)
        add((name, "pastel"), name, look_background("pastel", plain))
    for look in LOOKS:
        own = [look_background(look, background(name, side + 32)) for name in ("white", "night")]
        if np.array_equal(own[0], own[1]):
            add((None, look), look, own[0])
    return tuple(labels), torch.from_numpy(np.stack(pictures)).float() / 255


def estimate(picture: Tensor, subjects: Tensor | None = None) -> Paper:
    """The background of ``picture [H, W, 3]`` in 0..1, square.

    Args:
        subjects: ``[H, W]`` in 0..1, where known subjects stand; pixels above one half do not count.

    A uniform shift of colour is allowed for. When no known background explains :data:`SHARE` of the pixels, the colour of
    each row at the left and right edges stands in and ``name`` is ``None``.
    """
    labels, pixels = candidates(picture.shape[0])
    counted = torch.ones(picture.shape[:2]) if subjects is None else (subjects <= 0.5).float()
    total = counted.sum().clamp_min(1)
    apart = (picture - pixels).abs().amax(-1)
    closeness = ((1 - apart / (2 * NEAR)).clamp_min(0) * counted).sum((1, 2)) / total
    best = int(closeness.argmax())
    near = (apart[best] < NEAR) & (counted > 0)
    share = float(near.sum() / total)
    if share < SHARE:
        return Paper(None, None, edge_rows(picture), share)
    shift = (picture - pixels[best])[near].median(0).values
    name, look = labels[best]
    return Paper(name, look, (pixels[best] + shift).clamp(0, 1), share)


def edge_rows(picture: Tensor, columns: int = 3) -> Tensor:
    """Median colour of the outer ``columns`` of each row, smoothed over five rows and repeated across: ``[H, W, 3]``."""
    rows = torch.cat([picture[:, :columns], picture[:, -columns:]], 1).median(1).values
    padded = torch.cat([rows[:1].expand(2, 3), rows, rows[-1:].expand(2, 3)])
    return padded.unfold(0, 5, 1).mean(-1)[:, None].expand_as(picture).contiguous()
