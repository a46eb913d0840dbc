"""From the tensors of one layer to its delta. Shapes are judged first, by :mod:`studio.lora.shapes`; building trusts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from studio.lora.model import Delta, DoraDelta, LohaDelta, LokrDelta, LoraDelta
from studio.lora.shapes import LayerInfo, describe, magnitude_axis


def build(module: str, tensors: Mapping[str, Tensor], alpha: float | None, max_rank: int) -> Delta:
    """The delta of one layer.

    Args:
        module: its name, for messages.
        tensors: by slot; the ``alpha`` slot is ignored.
        alpha: numerator of the scale; None means the rank, a scale of 1.
        max_rank: cap.
    """
    shapes = {slot: tuple(tensor.shape) for slot, tensor in tensors.items()}
    info = describe(module, shapes, max_rank)
    number = float(info.rank) if alpha is None else alpha
    inner = _build_inner(info, tensors, number, alpha)
    magnitude = tensors.get("dora_scale", tensors.get("magnitude"))
    if magnitude is None:
        return inner
    axis = magnitude_axis(module, shapes, info.shape)
    if isinstance(inner, LoraDelta) and axis == 0:
        return LoraDelta(inner.down, inner.up, inner.alpha, magnitude.reshape(-1))
    return DoraDelta(inner, magnitude.reshape(-1), axis)


def _build_inner(
    info: LayerInfo, tensors: Mapping[str, Tensor], number: float, alpha: float | None
) -> LoraDelta | LohaDelta | LokrDelta:
    kind = info.kind.removeprefix("dora-")
    if kind in ("lora", "dora"):
        down, up = tensors["down"], tensors["up"]
        if "mid" in tensors:  # LoCon's Tucker form: fold the core into down
            down = torch.einsum("pqhw,qi->pihw", tensors["mid"], down.flatten(1))
        return LoraDelta(down, up, number)
    if kind == "loha":
        parts = {slot: tensors[f"hada_{slot}"] for slot in ("w1_a", "w1_b", "w2_a", "w2_b")}
        if "hada_t1" in tensors:  # the Tucker form stores both outer factors with the rank first
            parts["w1_a"], parts["w2_a"] = parts["w1_a"].T, parts["w2_a"].T
        return LohaDelta(**parts, alpha=number, t1=tensors.get("hada_t1"), t2=tensors.get("hada_t2"))
    low_rank = "lokr_w1_a" in tensors or "lokr_w2_a" in tensors
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
    elif "lokr_t2" in tensors:
        w2 = torch.einsum("po,pqhw,qi->oihw", tensors["lokr_w2_a"], tensors["lokr_t2"], tensors["lokr_w2_b"])
    else:
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    return LokrDelta(w1, w2, number / info.rank if low_rank and alpha is not None else 1.0)


def info_of(delta: Delta) -> LayerInfo:
    """Kind, rank and shape of a delta, as a header tells them."""
    match delta:
        case LoraDelta(down=down, up=up):
            return LayerInfo("lora" if delta.magnitude is None else "dora", delta.rank, (up.shape[0], *down.shape[1:]))
        case LohaDelta(w1_a=a, w1_b=b, t1=core):
            return LayerInfo("loha", delta.rank, (a.shape[0], b.shape[1], *(() if core is None else core.shape[2:])))
        case LokrDelta(w1=w1, w2=w2):
            return LayerInfo("lokr", 0, (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:]))
        case DoraDelta(inner=inner):
            info = info_of(inner)
            return LayerInfo("dora" if info.kind == "lora" else f"dora-{info.kind}", info.rank, info.shape)


def fitted(delta: Delta, shape: tuple[int, ...]) -> Delta:
    """The delta with ``down`` and ``up`` in as many dimensions as a weight of ``shape``: trainers store linear layers as 1x1
    convolutions and back.

    Only low-rank deltas have such a form; the others come back as they are, ``dense`` shapes them.
    """
    if isinstance(delta, DoraDelta):
        inner = fitted(delta.inner, shape)
        return delta if isinstance(inner, DoraDelta) else replace(delta, inner=inner)
    if not isinstance(delta, LoraDelta) or prod(delta.down.shape[1:]) != prod(shape[1:]):
        return delta
    ones = (1,) * (len(shape) - 2)
    return replace(
        delta, down=delta.down.reshape(delta.rank, *shape[1:]), up=delta.up.reshape(delta.up.shape[0], delta.rank, *ones)
    )
