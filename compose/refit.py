"""Merges that look at what LoRAs do to the inputs of a layer: only the down-projections change, so ranks stay as they are.

    gradient    dW = argmin_D sum_k |(w_k dW_k - D) X_k|^2 + e |D - sum_k w_k dW_k|^2             gradient fusion
    zip         dW = sum_k w_k dW_k diag(m_k),  m = argmin sum_k |(dW - w_k dW_k) X_k|^2 / sum_k |w_k dW_k X_k|^2
                                                         + lambda sum_{j<k} mean |m_j m_k|        ZipLoRA

``X_k [d, tokens]`` are the inputs of the layer while LoRA k draws alone (:mod:`compose.inputs`); of them only the second
moments ``G_k = X_k X_k^T`` are needed. LoRAs that leave a layer alone count too: their inputs shall stay as they are.

Gradient fusion is that of Mix-of-Show (Gu et al., NeurIPS 2023, eq. 4), named after its L-BFGS steps; here it is solved in
closed form, ``dW = sum_k w_k dW_k (I + (G_k - A) (A + e I)^-1)`` with ``A = sum_k G_k``. What no input ever showed is not left
as the base has it, but gets the plain sum. Where the inputs of all LoRAs together are linearly independent, every LoRA keeps
what it does on its own; those that are the same for all, as in the unconditional pass of cross-attention, get the mean.

ZipLoRA (Shah et al., ECCV 2024, eq. 4-5) learns a factor for every input column of a subject's and a style's LoRA. It compares
noise predictions; here each layer is fitted by itself, with the error as a share, and there may be any number of LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from studio.lora.model import LoraDelta

Thin = tuple[float, LoraDelta]
"""A weight and a LoRA's change of a layer as two factors."""

RIDGE = 1e-6
"""``e`` as a share of the trace of A: what second moments in single precision are good for."""
OVERLAP = 0.01
"""``lambda``: ZipLoRA's."""
ROUNDS = 100
"""Steps at most; ZipLoRA takes as many, with Adam."""


def gradient(parts: Sequence[Thin], own: Tensor, every: Tensor) -> list[LoraDelta]:
    """New factors of each part.

    Args:
        own: ``G_k [n, d, d]`` of the parts. every: ``A [d, d]``, with those LoRAs that leave this layer alone: their inputs
            shall stay as they are.
    """
    total = every.double()
    ridge = RIDGE * float(total.trace()) or 1.0
    factor = torch.linalg.cholesky(total + ridge * torch.eye(len(total), dtype=total.dtype))
    found = []
    for (_, part), moment in zip(parts, own, strict=True):
        down = part.down.flatten(1).double()
        change = torch.cholesky_solve((down @ (moment.double() - total)).T, factor).T
        found.append(_with_down(part, down + change))
    return found


def zipped(parts: Sequence[Thin], own: Tensor, every: Tensor) -> list[LoraDelta]:
    """New factors of each part; arguments as for :func:`gradient`."""
    return merged_columns(parts, mergers(parts, own, every))


def merged_columns(parts: Sequence[Thin], factors: Tensor) -> list[LoraDelta]:
    """``dW_k diag(m_k)`` for ``factors [n, d]``."""
    return [_with_down(part, part.down.flatten(1) * row) for (_, part), row in zip(parts, factors, strict=True)]


def mergers(parts: Sequence[Thin], own: Tensor, every: Tensor) -> Tensor:
    """``m [n, d]``, from ones. The error is a quadratic form in them, ``m' Q m - 2 b' m + s``, over its value ``s`` at zero."""
    count, wide = len(parts), own.shape[-1]
    scaled = [
        (strength * part.scale * part.up.float().cpu().flatten(1), part.down.float().cpu().flatten(1))
        for strength, part in parts
    ]
    form, aim, size = torch.zeros(count, wide, count, wide), torch.zeros(count, wide), 0.0
    for j, (up, down) in enumerate(scaled):
        for k, (other_up, other_down) in enumerate(scaled):
            product = down.T @ (up.T @ other_up) @ other_down  # dW_j' dW_k
            form[j, :, k] = product * every
            aim[j] += (product * own[k]).sum(1)
            size += float((product * own[k]).sum()) if j == k else 0.0
    factors = torch.ones(count, wide, requires_grad=True)
    if size <= 0:  # nothing flows in, or no part changes anything
        return factors.detach()
    form, aim = form.reshape(count * wide, -1) / size, aim.flatten() / size
    optimizer = torch.optim.LBFGS([factors], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        flat = factors.flatten()
        loss = flat @ (form @ flat) - 2 * aim @ flat + OVERLAP * overlap(factors)
        optimizer.zero_grad()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return factors.detach()


def overlap(factors: Tensor) -> Tensor:
    """``sum_{j<k} mean |m_j m_k|`` of ``factors [n, d]``."""
    products = (factors[:, None] * factors[None]).abs().mean(-1)
    return products.triu(1).sum()


def _with_down(part: LoraDelta, down: Tensor) -> LoraDelta:
    return LoraDelta(down.float().reshape(part.down.shape), part.up.float().cpu(), part.alpha)


REFITS: Mapping[str, Callable[[Sequence[Thin], Tensor, Tensor], list[LoraDelta]]] = {"gradient": gradient, "zip": zipped}
"""By the names of ``how``."""
