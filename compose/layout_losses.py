"""What LoRA-Composer asks of attention maps (Yang et al., 2024): each subject in its region, filling it, apart.

With ``A`` the smoothed cross map of a word of region ``R``, ``S`` the self map, ``k = share * |R|`` cells:

    enhancement  L_ce   = 1 - mean topk(A * 1_R * G); G favours the middle
    filling      L_fill = mean_j |max_i (A 1_R)_ij - 1_R^w(j)| + mean_i |max_j (A 1_R)_ij - 1_R^h(i)|
    leaking      L_reg  = mean topk(S[R, not R])

All functions are batched over rows and work in the precision of the maps. Nothing here touches a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.2
"""Share of a region's cells whose largest values count."""


def middle_weight(region: Tensor) -> Tensor:
    """``G`` for a region ``[h, w]`` of cells: ``exp(-(y^2 + x^2) / 2)`` over -1..1 of its box, at most 1; 0 outside."""
    rows, columns = region.any(1).nonzero().flatten(), region.any(0).nonzero().flatten()
    weight = torch.zeros(region.shape, device=region.device)
    y, x = (_even(int(span[-1]) - int(span[0]) + 1).to(region.device) for span in (rows, columns))
    inside = torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / 2)
    weight[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = inside / inside.max()
    return weight * region


def _even(cells: int) -> Tensor:
    return torch.linspace(-1, 1, cells) if cells > 1 else torch.zeros(1)


def counted(region: Tensor, share: float = SHARE) -> int:
    """``k``: how many cells of a region count, at least 1."""
    return max(1, int(share * int(region.sum())))


def enhancement(maps: Tensor, region: Tensor, share: float = SHARE) -> Tensor:
    """``L_ce [n]`` in 0..1 of smoothed word maps ``[n, h, w]`` in ``region [h, w]``."""
    weighed = (maps * middle_weight(region).to(maps)).flatten(1)
    return (1 - weighed.topk(counted(region, share), dim=1).values.mean(1)).clamp(min=0)


def filling(maps: Tensor, region: Tensor) -> Tensor:
    """``L_fill [n]`` of smoothed word maps ``[n, h, w]`` in ``region [h, w]``: 0 when every row and column of it is touched."""
    inside = maps * region.to(maps)
    across = (inside.amax(1) - region.any(0).to(maps)).abs().mean(1)
    down = (inside.amax(2) - region.any(1).to(maps)).abs().mean(1)
    return across + down


def leaking(self_maps: Tensor, region: Tensor, share: float = SHARE) -> Tensor:
    """``L_reg [n]`` of ``self_maps [n, N, N]`` (query, key): how much ``region [N]`` looks outside; 0 when nothing is."""
    outside = self_maps[:, region][:, :, ~region].flatten(1)
    if outside.shape[1] == 0:
        return self_maps.new_zeros(len(self_maps))
    return outside.topk(min(counted(region, share), outside.shape[1]), dim=1).values.mean(1)
