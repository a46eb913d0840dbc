"""Change the rank of a LoRA by a singular value decomposition per layer: the best approximation of ``dW`` (Eckart-Young)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from studio.errors import LoraShapeError, RequestError
from studio.lora.dense import dense
from studio.lora.model import Delta, DoraDelta, Lora, LoraDelta


@dataclass(frozen=True, eq=False)
class Resized:
    """A LoRA of lower rank, and how much of the old one it keeps.

    Args:
        lora: every layer a plain LoRA (or DoRA) with alpha equal to its rank.
        kept: share of ``|dW|^2`` kept, by layer, 0 to 1.
    """

    lora: Lora
    kept: Mapping[str, float]


def resize(lora: Lora, *, rank: int, keep: float | None = None) -> Resized:
    """The best LoRA of at most ``rank`` per layer; LoHa and LoKr become LoRA this way.

    A layer never gets more than its matrix needs. DoRA keeps its magnitude: what is shortened is the part before the
    decomposition.

    Args:
        lora: any kinds of layer.
        rank: upper bound, >= 1.
        keep: share of ``|dW|^2``, in (0, 1]: layers that reach it with fewer stay below ``rank``.

    Raises:
        RequestError: a rank or share out of range.
        LoraShapeError: a kind of DoRA that no plain LoRA can hold.
    """
    if rank < 1:
        raise RequestError(f"a LoRA cannot have rank {rank}: choose 1 or more")
    if keep is not None and not 0 < keep <= 1:
        raise RequestError(f"a share of {keep} cannot be kept: choose a number over 0 and up to 1")
    layers: dict[str, Delta] = {}
    kept: dict[str, float] = {}
    for module, delta in lora.layers.items():
        inner, magnitude = _undecomposed(module, delta)
        layers[module], kept[module] = shorten(inner, rank=rank, keep=keep, magnitude=magnitude)
    return Resized(replace(lora, layers=layers, source=None, sha256=""), kept)


def shorten(delta: Delta, *, rank: int, keep: float | None = None, magnitude: Tensor | None = None) -> tuple[LoraDelta, float]:
    """The LoRA of at most ``rank`` nearest to ``delta``, and the share of ``|dW|^2`` it keeps.

    ``up @ down = U_r S_r V_r^T`` with the root of ``S`` on either side, so that both halves stay within half precision.
    """
    change = dense(delta)
    left, values, right = _decompose(delta, change)
    energy = values.double().square()
    total = float(energy.sum())
    size = min(rank, int((energy > 0).sum()) or 1)
    if keep is not None and total > 0:
        size = min(size, int(torch.searchsorted(energy.cumsum(0), keep * total * (1 - 1e-9))) + 1)
    root = values[:size].sqrt()
    down = (root[:, None] * right[:size]).reshape(size, *change.shape[1:])
    up = (left[:, :size] * root).reshape(change.shape[0], size, *(1,) * (change.ndim - 2))
    share = float(energy[:size].sum()) / total if total > 0 else 1.0
    return LoraDelta(down.contiguous(), up.contiguous(), float(size), magnitude), share


def _decompose(delta: Delta, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, V^T`` of ``dW`` as ``[out, in * kh * kw]``.

    Of a LoRA through the small square between its two thin factors: ``dW = Q_u (R_u R_d^T) Q_d^T``.
    """
    if not isinstance(delta, LoraDelta) or delta.rank >= min(change.shape[0], change[0].numel()):
        left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
        return left, values, right
    up_basis, up_rest = torch.linalg.qr(delta.up.flatten(1).float() * delta.scale)
    down_basis, down_rest = torch.linalg.qr(delta.down.flatten(1).float().T)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.T)
    return up_basis @ left, values, right @ down_basis.T


def _undecomposed(module: str, delta: Delta) -> tuple[Delta, Tensor | None]:
    match delta:
        case LoraDelta(magnitude=magnitude) if magnitude is not None:
            return replace(delta, magnitude=None), magnitude
        case DoraDelta(axis=0):
            return delta.inner, delta.magnitude
        case DoraDelta():
            raise LoraShapeError(f"layer '{module}' is a DoRA with its magnitude per input channel, which cannot be resized")
    return delta, None
