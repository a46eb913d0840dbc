"""What the shapes of one layer's tensors tell: kind, rank, shape of ``dW``, and whether they fit together. No tensor is read.

Kinds: ``lora``, ``dora``, ``loha``, ``lokr``, ``dora-loha``, ``dora-lokr``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from studio.errors import FileLimitError, LoraShapeError

Shape = tuple[int, ...]
EXTRAS = {"alpha", "dora_scale", "magnitude"}
MAX_CHANGE = 2**28
"""Numbers of one ``dW`` at most, four times what the largest weights of known models have: thin factors can claim any size."""
_LOKR_PARTS = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}


@dataclass(frozen=True)
class LayerInfo:
    """What the header tells of one layer.

    ``rank`` is 0 for a LoKr without low-rank parts. ``shape`` is that of ``dW``, ``(out, in)`` or ``(out, in, kh, kw)``; LoHa
    and LoKr may know a convolution only as ``(out, in * kh * kw)``.
    """

    kind: str
    rank: int
    shape: Shape


class _Checker:
    """Reads the shapes of one layer and complains by its name."""

    def __init__(self, module: str, shapes: Mapping[str, Shape]) -> None:
        self.module, self.shapes = module, shapes

    def fail(self, why: str) -> LoraShapeError:
        found = ", ".join(f"{slot} {list(shape)}" for slot, shape in sorted(self.shapes.items()))
        return LoraShapeError(f"layer '{self.module}' {why} (found: {found})")

    def need(self, *slots: str) -> list[Shape]:
        missing = [slot for slot in slots if slot not in self.shapes]
        if missing:
            raise self.fail(f"lacks {' and '.join(missing)}")
        if any(0 in self.shapes[slot] for slot in slots):
            raise self.fail("has an empty tensor")
        return [self.shapes[slot] for slot in slots]

    def expect(self, fits: bool, why: str = "has tensors that do not fit together") -> None:
        if not fits:
            raise self.fail(why)


def describe(module: str, shapes: Mapping[str, Shape], max_rank: int) -> LayerInfo:
    """Kind, rank and shape of one layer from the shapes of its slots.

    Raises:
        LoraShapeError: a slot is missing, superfluous or of the wrong shape.
        FileLimitError: the rank is over ``max_rank``.
    """
    check = _Checker(module, shapes)
    slots = set(shapes) - EXTRAS
    if slots <= {"down", "up", "mid"}:
        info = _describe_lora(check)
    elif slots <= {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}:
        info = _describe_loha(check)
    elif slots <= _LOKR_PARTS:
        info = _describe_lokr(check)
    else:
        raise check.fail("mixes the tensors of several kinds of adapter")
    if info.rank > max_rank:
        raise FileLimitError(f"layer '{module}' has rank {info.rank}, more than the {max_rank} a LoRA may have here")
    if prod(info.shape) > MAX_CHANGE:
        raise FileLimitError(f"layer '{module}' claims a weight of shape {list(info.shape)}, larger than any of a known model")
    check.expect(prod(shapes.get("alpha", ())) == 1, "has an alpha that is not one number")
    check.expect(not {"dora_scale", "magnitude"} <= set(shapes), "has two DoRA magnitudes")
    if {"dora_scale", "magnitude"} & set(shapes):
        magnitude_axis(module, shapes, info.shape)
        return LayerInfo("dora" if info.kind == "lora" else f"dora-{info.kind}", info.rank, info.shape)
    return info


def magnitude_axis(module: str, shapes: Mapping[str, Shape], shape: Shape) -> int:
    """0 when the DoRA magnitude has a value per output channel, 1 per input channel.

    PEFT stores ``[out]`` or ``[1, out, 1, 1]``; LyCORIS ``[out, 1, ...]`` or, without ``wd_on_out``, ``[1, in, ...]``.
    """
    check = _Checker(module, shapes)
    if "magnitude" in shapes:
        check.expect(
            prod(shapes["magnitude"]) == shape[0], f"has a DoRA magnitude that is not one number for each of {shape[0]} outputs"
        )
        return 0
    scale = shapes["dora_scale"]
    if scale and scale[0] == prod(scale) == shape[0]:
        return 0
    check.expect(
        len(scale) >= 2 and scale[0] == 1 and prod(scale) == scale[1] == shape[1],
        f"has a DoRA scale that fits neither its {shape[0]} outputs nor its {shape[1]} inputs",
    )
    return 1


def _describe_lora(check: _Checker) -> LayerInfo:
    down, up = check.need("down", "up")
    check.expect(len(down) in (2, 4, 5) and len(up) in (2, 4, 5), "has tensors of the wrong number of dimensions")
    rank = down[0]
    check.expect(up[1] == rank and all(side == 1 for side in up[2:]), "has an 'up' that does not fit its 'down'")
    if "mid" not in check.shapes:
        return LayerInfo("lora", rank, (up[0], *down[1:]))
    (mid,) = check.need("mid")
    check.expect(len(mid) == 4 and mid[:2] == (rank, rank) and all(side == 1 for side in down[2:]))
    return LayerInfo("lora", rank, (up[0], down[1], *mid[2:]))


def _describe_loha(check: _Checker) -> LayerInfo:
    a1, b1, a2, b2 = check.need("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    check.expect(len(a1) == len(b1) == len(a2) == len(b2) == 2, "has tensors of the wrong number of dimensions")
    rank = b1[0]
    if "hada_t1" in check.shapes or "hada_t2" in check.shapes:
        t1, t2 = check.need("hada_t1", "hada_t2")
        check.expect(len(t1) == 4 and t1 == t2 and t1[:2] == (rank, rank) and a1 == a2 and b1 == b2 and a1[0] == rank)
        return LayerInfo("loha", rank, (a1[1], b1[1], *t1[2:]))
    check.expect(a1 == a2 and b1 == b2 and a1[1] == rank)
    return LayerInfo("loha", rank, (a1[0], b1[1]))


def _describe_lokr(check: _Checker) -> LayerInfo:
    shapes, rank = check.shapes, 0
    if "lokr_w1" in shapes:
        (w1,) = check.need("lokr_w1")
        check.expect(not {"lokr_w1_a", "lokr_w1_b"} & set(shapes))
    else:
        a, b = check.need("lokr_w1_a", "lokr_w1_b")
        check.expect(len(a) == len(b) == 2 and a[1] == b[0])
        w1, rank = (a[0], b[1]), b[0]
    if "lokr_w2" in shapes:
        (w2,) = check.need("lokr_w2")
        check.expect(not {"lokr_w2_a", "lokr_w2_b", "lokr_t2"} & set(shapes))
    elif "lokr_t2" in shapes:
        t, a, b = check.need("lokr_t2", "lokr_w2_a", "lokr_w2_b")
        check.expect(len(t) == 4 and len(a) == len(b) == 2 and t[:2] == (a[0], b[0]))
        w2, rank = (a[1], b[1], *t[2:]), b[0]
    else:
        a, b = check.need("lokr_w2_a", "lokr_w2_b")
        check.expect(len(a) == len(b) == 2 and a[1] == b[0])
        w2, rank = (a[0], b[1]), b[0]
    check.expect(len(w1) == 2 and len(w2) in (2, 4), "has tensors of the wrong number of dimensions")
    return LayerInfo("lokr", rank, (w1[0] * w2[0], w1[1] * w2[1], *w2[2:]))
