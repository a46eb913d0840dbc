"""Latent re-initialisation (LoRA-Composer, Yang et al., 2024): noise that leans to a subject goes where the subject shall be.

For each region the window of its box's size is found in which the noise, seen through the model once, attends most to the
region's words. The noise of that window is copied into the box. Sources are always the original noise, so regions do not
chain; where boxes overlap the smaller one lies on top. Then the whole noise gets the mean and deviation back that it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Whole cells of a map: ``top``, ``left``, ``height``, ``width``."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, by: int) -> tuple[slice, slice]:
        """Rows and columns where a cell is ``by`` finer cells wide."""
        rows = slice(self.top * by, (self.top + self.height) * by)
        return rows, slice(self.left * by, (self.left + self.width) * by)


def window_around(region: Tensor) -> Window:
    """The box around a region ``[h, w]`` of cells."""
    rows, columns = region.any(1).nonzero().flatten(), region.any(0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    return Window(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)


def best_window(attention: Tensor, height: int, width: int) -> Window:
    """The window of ``height`` x ``width`` cells of ``attention [h, w]`` with the largest sum; the first of several."""
    sums = torch.nn.functional.avg_pool2d(attention[None, None].double(), (height, width), stride=1)[0, 0]
    best = int(sums.argmax())
    return Window(best // sums.shape[1], best % sums.shape[1], height, width)


def moved(noise: Tensor, maps: Sequence[Tensor], regions: Sequence[Tensor], scale: int) -> tuple[Tensor, list[Window]]:
    """One picture's noise with each region's best window in its box.

    Args:
        noise: ``[c, H, W]``.
        maps: how much each cell attends to each region's words, ``[h, w]`` each.
        regions: the cells of each, ``[h, w]``.
        scale: cells of the noise along one cell of a map. Where the last cells are cut by the edge, so is what is copied.

    Returns:
        The noise, and the window that each region took.
    """
    boxes = [window_around(region) for region in regions]
    windows = [best_window(one, box.height, box.width) for one, box in zip(maps, boxes, strict=True)]
    order = sorted(range(len(boxes)), key=lambda k: (-boxes[k].height * boxes[k].width, boxes[k].top, boxes[k].left))
    result = noise.clone()
    for k in order:
        (to_rows, to_columns), (rows, columns) = boxes[k].scaled(scale), windows[k].scaled(scale)
        source = noise[:, rows, columns]
        target = result[:, to_rows, to_columns]
        down, across = min(source.shape[1], target.shape[1]), min(source.shape[2], target.shape[2])
        target[:, :down, :across] = source[:, :down, :across]
    return rescaled(result, noise), windows


def rescaled(noise: Tensor, like: Tensor) -> Tensor:
    """``noise`` with the mean and the deviation of ``like``."""
    if torch.equal(noise, like):
        return noise
    return (noise - noise.mean()) / noise.std() * like.std() + like.mean()
