"""Several LoRAs into one, layer by layer, always over ``dW``: factors of different LoRAs cannot be added, only multiplied out.

    cat     B A = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]                  the exact sum
    svd     the best approximation of the sum at a lower rank
    ties    Yadav et al., 2023: trim each dW to its largest share, elect a sign per entry, mean of those that agree
    dare    Yu et al., 2024: drop entries at random, scale the rest by 1 / density, sum
    dare_ties   drop and scale as DARE, elect and mean as TIES
    lego    Zhao et al., 2025: see :mod:`compose.lego`
    gradient, zip   fitted to what flows into the layer: see :mod:`compose.refit`

What is different from PEFT: its ``linear`` adds the A's and the B's, with cross terms ``B_i A_j``; its ``ties`` trims and
elects in the factors, whose entries mean nothing alone. Both are left out on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from compose.bank import OnLayer
from compose.refit import REFITS
from studio.lora.dense import dense
from studio.lora.model import Delta, LohaDelta, LokrDelta, Lora, LoraDelta
from studio.lora.resize import shorten

Part = tuple[float, Delta]
"""One LoRA's weight and its change of a layer."""

DENSITY = {"ties": 0.2, "dare": 0.5, "dare_ties": 0.5}
"""Shares of entries kept: TIES' own default; for DARE, whose paper keeps as little as a tenth, what rank-8 deltas bear."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How LoRAs become one.

    Args:
        how: a key of :data:`HOWS` or :data:`~compose.refit.REFITS`.
        rank: of the result per layer; None: all ranks together, and the largest for ``svd`` and ``lego``.
        density: share of entries kept, in (0, 1]; None: :data:`DENSITY`.
        seed: of what is random; each layer draws its own numbers.
    """

    how: str
    rank: int | None = None
    density: float | None = None
    seed: int = 0


def fused(
    loras: Sequence[tuple[float, Lora]],
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    on_layer: OnLayer | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Lora:
    """One LoRA that stands for several.

    Args:
        loras: with their weights.
        weights: of the layers they touch, by name; a DoRA's change depends on it.
        on_layer: called after each layer: a dense ``dW`` takes up to half a second, and a large base has hundreds.
        moments: ``[K, d, d]`` by layer, for :data:`~compose.refit.REFITS`; layers without get the exact sum.
    """
    layers: dict[str, Delta] = {}
    names = list(dict.fromkeys(name for _, lora in loras for name in lora.layers))
    for done, name in enumerate(names, 1):
        own = [index for index, (_, lora) in enumerate(loras) if name in lora.layers]
        parts: list[Part] = [(loras[index][0], loras[index][1].layers[name]) for index in own]
        weight = weights[name].detach().float().cpu()
        how = recipe.how
        if how in REFITS:
            if moments is not None and name in moments:
                parts = refitted(parts, weight, how, moments[name][own], moments[name].sum(0))
            how = "svd" if recipe.rank else "cat"
        generator = torch.Generator().manual_seed(recipe.seed ^ _fold(name))
        layers[name] = HOWS[how](parts, weight, recipe, generator)
        if on_layer is not None:
            on_layer(done, len(names))
    return Lora(layers)


def refitted(parts: Sequence[Part], weight: Tensor, how: str, own: Tensor, every: Tensor) -> list[Part]:
    """The parts fitted to the second moments of their inputs; see :func:`compose.refit.gradient`."""
    thin = [(strength, as_thin(delta, weight)) for strength, delta in parts]
    return [(strength, delta) for (strength, _), delta in zip(thin, REFITS[how](thin, own, every), strict=True)]


def layer_weights(layers: Mapping[str, nn.Linear | nn.Conv2d]) -> dict[str, Tensor]:
    """The weights of layers by name, without copying them."""
    return {name: layer.weight for name, layer in layers.items()}


def _fold(name: str) -> int:
    """A number that differs between names and not between processes."""
    value = 0
    for byte in name.encode():
        value = (value * 257 + byte) % (2**31 - 1)
    return value


def rank_of(delta: Delta, weight: Tensor) -> int:
    """The rank a delta can have: its own for a LoRA, squared for a Hadamard product, else the layer's."""
    full = min(weight.shape[0], prod(weight.shape[1:]))
    match delta:
        case LoraDelta(magnitude=None):
            return min(delta.rank, full)
        case LohaDelta():
            return min(delta.rank**2, full)
    return full


def changes(parts: Sequence[Part], weight: Tensor) -> Tensor:
    """``dW`` of every part without its weight, ``[K, *W]``."""
    return torch.stack([dense(delta, weight).float().cpu().reshape(weight.shape) for _, delta in parts])


def scales(parts: Sequence[Part], like: Tensor) -> Tensor:
    """Weights of the parts, to multiply ``[K, *W]``."""
    return torch.tensor([strength for strength, _ in parts]).view(-1, *(1,) * (like.ndim - 1))


def as_low_rank(change: Tensor, rank: int) -> LoraDelta:
    """The LoRA of at most ``rank`` nearest to a dense ``dW``."""
    return shorten(LokrDelta(torch.ones(1, 1), change.contiguous(), 1.0), rank=rank)[0]


def as_thin(delta: Delta, weight: Tensor) -> LoraDelta:
    """Two thin factors; what has none goes in at its full rank."""
    if isinstance(delta, LoraDelta) and delta.magnitude is None:
        return delta
    return as_low_rank(dense(delta, weight).reshape(weight.shape), rank_of(delta, weight))


def total_rank(parts: Sequence[Part], weight: Tensor, recipe: Recipe) -> int:
    """The rank of a result: as asked for, or what all parts have together."""
    return recipe.rank or sum(rank_of(delta, weight) for _, delta in parts)


def cat(parts: Sequence[Part], weight: Tensor, recipe: Recipe, generator: torch.Generator) -> Delta:
    """The exact sum: factors side by side, no cross terms."""
    downs, ups = [], []
    for strength, delta in parts:
        thin = as_thin(delta, weight)
        downs.append(thin.down.float().cpu().reshape(thin.rank, *weight.shape[1:]))
        ups.append(thin.up.float().cpu().flatten(1) * (thin.scale * strength))
    up = torch.cat(ups, 1)
    rank = up.shape[1]
    return LoraDelta(torch.cat(downs), up.reshape(len(up), rank, *(1,) * (weight.ndim - 2)), float(rank))


def svd(parts: Sequence[Part], weight: Tensor, recipe: Recipe, generator: torch.Generator) -> Delta:
    """The sum at a lower rank: by default the largest of the parts'."""
    rank = recipe.rank or max(rank_of(delta, weight) for _, delta in parts)
    return shorten(cat(parts, weight, recipe, generator), rank=rank)[0]


def trim(change: Tensor, density: float) -> Tensor:
    """The share ``density`` of entries with the largest absolute values; zero elsewhere."""
    keep = max(1, round(density * change.numel()))
    kept = torch.zeros(change.numel(), dtype=torch.bool)
    kept[change.abs().flatten().topk(keep).indices] = True
    return change * kept.view(change.shape)


def elect(weighted: Tensor) -> Tensor:
    """Where parts disagree, the sign with the larger total wins, and the mean is over those that have it and are not zero."""
    sign = weighted.sum(0).sign()
    agree = (weighted.sign() == sign) & (weighted != 0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def drop(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry with probability ``density``, over ``density``: the expectation stays."""
    return change * (torch.rand(change.shape, generator=generator) < density) / density


def ties(parts: Sequence[Part], weight: Tensor, recipe: Recipe, generator: torch.Generator) -> Delta:
    density = recipe.density or DENSITY["ties"]
    every = changes(parts, weight)
    kept = torch.stack([trim(change, density) for change in every]) * scales(parts, every)
    return as_low_rank(elect(kept), total_rank(parts, weight, recipe))


def dare(parts: Sequence[Part], weight: Tensor, recipe: Recipe, generator: torch.Generator) -> Delta:
    every = changes(parts, weight)
    kept = drop(every, recipe.density or DENSITY["dare"], generator) * scales(parts, every)
    return as_low_rank(kept.sum(0), total_rank(parts, weight, recipe))


def dare_ties(parts: Sequence[Part], weight: Tensor, recipe: Recipe, generator: torch.Generator) -> Delta:
    every = changes(parts, weight)
    kept = drop(every, recipe.density or DENSITY["dare_ties"], generator) * scales(parts, every)
    return as_low_rank(elect(kept), total_rank(parts, weight, recipe))


def lego(parts: Sequence[Part], weight: Tensor, recipe: Recipe, generator: torch.Generator) -> Delta:
    from compose.lego import rebuilt

    thin = [(strength, as_thin(delta, weight)) for strength, delta in parts]
    return rebuilt(thin, recipe.rank or max(delta.rank for _, delta in thin), weight.shape, generator)


HOWS: Mapping[str, Callable[[Sequence[Part], Tensor, Recipe, torch.Generator], Delta]] = {
    "cat": cat,
    "svd": svd,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "lego": lego,
}
