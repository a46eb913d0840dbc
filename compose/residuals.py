"""A hook for image conditions: what a ControlNet or a T2I-Adapter adds inside the UNet, everywhere or by region.

Whoever makes residuals is asked before every forward, with that forward's own rows: a guidance pass has conditional rows only
and gets as many. They come back as the keyword arguments of diffusers' UNets: ``down_block_additional_residuals`` and
``mid_block_additional_residual`` of a ControlNet, ``down_intrablock_additional_residuals`` of a T2I-Adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compose.text import Encoded

if TYPE_CHECKING:
    from compose.plan import Regions

Residuals = Callable[[Tensor, Tensor, Encoded], Mapping[str, Any]]
"""``(x [rows, c, h, w], timestep, encoded) -> keyword arguments``, for a whole forward or one that stops early."""


def by_region(regions: Regions, outside: float, inside: Sequence[float], height: int, width: int) -> Tensor:
    """Weights ``[h, w]``: each region's own in its cells (the mean where several overlap), ``outside`` elsewhere."""
    covered = regions.at(height, width).float()
    own = torch.tensor(list(inside), dtype=torch.float32) @ covered
    count = covered.sum(0)
    return torch.where(count > 0, own / count.clamp(min=1), outside).view(height, width)


def weighted(source: Residuals, weights: Tensor) -> Residuals:
    """The residuals of ``source``, each multiplied by ``weights [h, w]`` brought to its own size."""

    def scaled(value: Any) -> Any:
        if isinstance(value, Tensor):
            fitted = F.interpolate(weights[None, None].float(), size=value.shape[-2:], mode="area")
            return value * fitted.to(value)
        return [scaled(each) for each in value]

    def ask(x: Tensor, timestep: Tensor, encoded: Encoded) -> Mapping[str, Any]:
        return {name: scaled(value) for name, value in source(x, timestep, encoded).items()}

    return ask
