"""The dense ``dW`` of any delta: what the fast paths are measured against, and the only path of LoHa, LoKr and odd DoRA."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from studio.errors import LoraShapeError
from studio.lora.model import Delta, DoraDelta, LohaDelta, LokrDelta, LoraDelta


def dense(delta: Delta, weight: Tensor | None = None) -> Tensor:
    """``dW`` at weight 1, in float32 (float64 stays), so that the adapted layer is ``W + dW``.

    Args:
        delta: any kind.
        weight: ``W`` of the layer, ``[out, in]`` or ``[out, in, kh, kw]``. DoRA needs its values; for the others it only
            gives the shape, without which a convolution may come back as ``[out, in * kh * kw]``.

    Raises:
        LoraShapeError: ``dW`` does not fit ``weight``, or a DoRA comes without it.
    """
    match delta:
        case LoraDelta(magnitude=None):
            change = low_rank(delta)
        case LoraDelta(magnitude=Tensor() as magnitude):
            change = _decomposed(low_rank(delta), _required(weight), magnitude, axis=0)
        case LohaDelta():
            change = hadamard(delta)
        case LokrDelta():
            change = kronecker(delta)
        case DoraDelta():
            change = _decomposed(dense(delta.inner), _required(weight), delta.magnitude, axis=delta.axis)
    return change if weight is None else _shaped_like(change, weight)


def low_rank(delta: LoraDelta) -> Tensor:
    """``alpha / r * up @ down`` without any magnitude, shaped as ``down`` after its rank axis."""
    down, up = _wide(delta.down), _wide(delta.up)
    return (delta.scale * up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def hadamard(delta: LohaDelta) -> Tensor:
    """``alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)``; with Tucker cores each factor is ``sum_pq a[o, p] t[p, q] b[q, i]``."""
    first = _factor(delta.w1_a, delta.w1_b, delta.t1)
    second = _factor(delta.w2_a, delta.w2_b, delta.t2)
    return delta.scale * first * second


def kronecker(delta: LokrDelta) -> Tensor:
    """``scale * kron(w1, w2)``; a two-dimensional ``w1`` acts on the channels of a convolution ``w2 [o, i, kh, kw]``."""
    w1, w2 = _wide(delta.w1), _wide(delta.w2)
    if w2.ndim > w1.ndim:
        w1 = w1.reshape(*w1.shape, *(1,) * (w2.ndim - w1.ndim))
    return delta.scale * torch.kron(w1.contiguous(), w2.contiguous())


def _factor(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return _wide(a) @ _wide(b)
    return torch.einsum("op,pqhw,qi->oihw", _wide(a), _wide(core), _wide(b))


def _decomposed(change: Tensor, weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """``m V / |V| - W`` (Liu et al., 2024, eq. 5)."""
    base = _wide(weight)
    directed = base + _shaped_like(change, weight)
    others = tuple(a for a in range(base.ndim) if a != axis)
    norm = directed.pow(2).sum(dim=others, keepdim=True).sqrt()
    along = [1] * base.ndim
    along[axis] = -1
    return _wide(magnitude).reshape(along) * directed / norm - base


def _shaped_like(change: Tensor, weight: Tensor) -> Tensor:
    if change.shape[0] != weight.shape[0] or prod(change.shape) != prod(weight.shape):
        raise LoraShapeError(
            f"a LoRA layer of shape {tuple(change.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        )
    return change.reshape(weight.shape)


def _required(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise LoraShapeError("a DoRA layer has no change of weights by itself: it needs the weight it was trained on")
    return weight


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
