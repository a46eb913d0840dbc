"""CLoRA's masks and how they put the predictions of several passes together.

M_{i, w} = 1[A_{i, w} > a max A_{i, w}],      M_i = union over the words w of LoRA i in its own pass
eps = sum_i M_i eps_i / sum_i M_i             unconditional and conditional alike, before guidance
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compose.maps import found_masks, min_max

Change = Literal["dilate", "erode", "open", "close"]
Rule = Literal["max", "range", "winner", "alike"]
"""How maps become masks: above a share of their largest value (the paper's), of their range, or so and for one subject each; or
by which subject's loudest cells a cell attends to most (:func:`compose.maps.found_masks`)."""
SEEDS = 0.1
"""Share of the cells that are a subject's loudest, for "alike"."""

CHANGES: tuple[Change, ...] = ("dilate", "erode", "open", "close")
"""What may be done to masks, in the published order."""


def above(maps: Tensor, threshold: float) -> Tensor:
    """``[..., S, h, w]`` to the union over S of the places above ``threshold`` times each map's largest value.

    The largest value of a map itself is always in, however high the threshold.
    """
    peak = maps.amax((-2, -1), keepdim=True)
    return ((maps > threshold * peak) | ((maps == peak) & (peak > 0))).any(-3)


def owned(maps: Sequence[Tensor], threshold: float, rule: Rule) -> Tensor:
    """The mask of each subject ``[K, n, h, w]`` from the maps of its words ``[n, S_k, h, w]``."""
    if rule != "max":
        maps = [min_max(each.flatten(2)).view_as(each) for each in maps]
    masks = torch.stack([above(each, threshold) for each in maps])
    if rule != "winner":
        return masks
    strength = torch.stack([each.mean(1) for each in maps])
    return masks & (strength == strength.where(masks, -1.0).amax(0))


def alike(maps: Sequence[Tensor], selves: Tensor, threshold: float) -> Tensor:
    """As :func:`owned` for "alike"; ``selves [n, N, N]``: how much each cell attends to each other."""
    loud = torch.stack([each.mean(1) for each in maps])
    rows = [found_masks(loud[:, row], own, SEEDS, threshold) for row, own in enumerate(selves)]
    return torch.stack(rows, 1)


def changed(masks: Tensor, changes: Sequence[Change]) -> Tensor:
    """Masks ``[..., h, w]`` after morphology with a square of three cells, in the published order; an erosion that would
    leave nothing of a mask is left out.
    """
    if not changes:
        return masks
    import cv2
    import numpy as np

    square = np.ones((3, 3), np.uint8)
    kinds = {"dilate": cv2.MORPH_DILATE, "erode": cv2.MORPH_ERODE, "open": cv2.MORPH_OPEN, "close": cv2.MORPH_CLOSE}
    flat = masks.flatten(0, -3).cpu().numpy().astype(np.uint8)
    for index, mask in enumerate(flat):
        for change in CHANGES:
            if change in changes:
                after = cv2.morphologyEx(flat[index], kinds[change], square, borderType=cv2.BORDER_REPLICATE)
                flat[index] = after if after.any() or not mask.any() else flat[index]
    return torch.from_numpy(flat).bool().view(masks.shape).to(masks.device)


def with_background(subjects: Tensor, base: Tensor | None = None) -> Tensor:
    """``[K, n, h, w]`` with the base's mask before them, ``[K + 1, n, h, w]``: where no subject is, and where ``base`` is."""
    rest = ~subjects.any(0)
    return torch.cat([(rest if base is None else rest | base)[None], subjects])


def shares(masks: Tensor, height: int, width: int) -> Tensor:
    """``M_i / sum M`` for masks ``[P, n, y, x]``, at ``height x width`` by repetition of cells: ``[P, n, 1, h, w]``, sum 1."""
    fine = F.interpolate(masks.float(), size=(height, width), mode="nearest")
    return (fine / fine.sum(0))[:, :, None]


def fused(predictions: Tensor, weights: Tensor) -> Tensor:
    """``sum_i w_i eps_i`` over the first axis of ``[P, n, c, h, w]``."""
    return (predictions * weights).sum(0)
