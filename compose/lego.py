"""LoRA-LEGO (Zhao et al., "Merging LoRAs like Playing LEGO", ICLR 2025): LoRAs merged by clustering their rank-one units.

A unit is one row of A with its column of B, ``u_j = [a_j; b_j]``: the order of units in a LoRA means nothing. The units of all
LoRAs are clustered (k-means), and the centroids are the units of the result:

    dW = f * sum_c b_c a_c^T,      |u_c| = mean |u| of its members,      f = sqrt(r / k)

The first repairs that a mean of different units is shorter than they are, the second that the size of ``dW`` grows with the
rank k (r: the mean rank of the LoRAs). What is different here: units of no size, or of next to none, are no units and do not
count in r; the scale and weight of a LoRA are folded into its units, each
unit is balanced so that |a| = |b|, and (a, b) and (-a, -b), which are the same unit, are treated as the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from studio.lora.model import LoraDelta

ROUNDS = 50
NOISE = 1e-5
"""A unit whose ``|a| |b|`` is at most this share of its LoRA's largest is rounding noise, as where a dense ``dW`` enters with
the full rank of the layer."""


def units(strength: float, delta: LoraDelta) -> Tensor:
    """``[r, in + out]``: the units of one LoRA above :data:`NOISE`, balanced, with scale and weight folded in."""
    a = delta.down.float().cpu().flatten(1)
    b = delta.up.float().cpu().flatten(1).T * (delta.scale * strength)
    product = a.norm(dim=1) * b.norm(dim=1)
    live = product > NOISE * product.max()
    a, b, size = a[live], b[live], product[live].sqrt()[:, None]
    return torch.cat([a / a.norm(dim=1, keepdim=True) * size, b / b.norm(dim=1, keepdim=True) * size], dim=1)


def distances(points: Tensor, centers: Tensor) -> Tensor:
    """Squared distances ``[R, k]`` to each center or its negative, whichever is nearer."""
    inner = (points @ centers.T).abs()
    return (points.square().sum(1)[:, None] + centers.square().sum(1)[None] - 2 * inner).clamp(min=0)


def clustered(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means up to sign: the cluster of every point ``[R]``; starts by k-means++ (Arthur & Vassilvitskii, 2007)."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    centers = points[first][None]
    while len(centers) < count:
        near = distances(points, centers).amin(1)
        near[near < 1e-6 * points.square().sum(1)] = 0
        if float(near.sum()) == 0:  # fewer different units than clusters
            break
        centers = torch.cat([centers, points[torch.multinomial(near, 1, generator=generator)]])
    member = distances(points, centers).argmin(1)
    for _ in range(ROUNDS):
        centers = torch.stack([centroid(points[member == c], centers[c]) for c in range(len(centers))])
        moved = distances(points, centers).argmin(1)
        if torch.equal(moved, member):
            break
        member = moved
    return member


def centroid(members: Tensor, like: Tensor) -> Tensor:
    """The mean of ``members``, each turned towards ``like``; ``like`` itself when there is none."""
    if not len(members):
        return like
    sign = torch.where(members @ like < 0, -1.0, 1.0)[:, None]
    return (members * sign).mean(0)


def rebuilt(parts: Sequence[tuple[float, LoraDelta]], rank: int, shape: torch.Size, generator: torch.Generator) -> LoraDelta:
    """The LoRA whose units are the centroids of ``rank`` clusters, for a layer whose weight has ``shape``."""
    own = [units(strength, delta) for strength, delta in parts]
    points = torch.cat(own)
    inputs = parts[0][1].down[0].numel()
    if len(points):
        member = clustered(points, min(rank, len(points)), generator)
        middles = torch.stack([_sized(points[member == c]) for c in member.unique()])
    else:
        middles = torch.zeros(1, inputs + shape[0])
    count = len(middles)
    ranks = [len(some) for some in own if len(some)] or [count]
    mean_rank = sum(ranks) / len(ranks)
    down, up = middles[:, :inputs], middles[:, inputs:].T * (mean_rank / count) ** 0.5
    thin = (1,) * (len(shape) - 2)
    return LoraDelta(down.reshape(count, *shape[1:]), up.reshape(shape[0], count, *thin), float(count))


def _sized(members: Tensor) -> Tensor:
    """The centroid of one cluster, as long as its members are in the mean."""
    middle = centroid(members, members[0])
    return middle * (members.norm(dim=1).mean() / middle.norm().clamp(min=1e-12))
