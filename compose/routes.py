"""Routes: how much of which LoRA acts where. Written once in request coordinates, brought into each layer's shape here.

A route is a float tensor ``r[n, f, y, x, c, k]``: row of the forward (conditional and unconditional rows counted), frame,
place, output channel, LoRA. Any axis may be 1 and then means "the same everywhere". Each layer has a *site*, and one function
per kind of site turns the route into a tensor that multiplies that layer's deltas, with the LoRA axis last. No method ever
reshapes for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AXES = 6


class Kind(StrEnum):
    """What the rows of a layer's output mean."""

    IMAGE = "image tokens"  # [n * f, h * w, C]
    TEXT = "text tokens"  # [n or n * f, L, C]
    CONV = "conv map"  # [n * f, C, h, w]
    TEMPORAL = "temporal tokens"  # [n * h * w, f, C]
    VECTOR = "vector"  # [n or n * f, C]


@dataclass(frozen=True)
class Site:
    """Where a layer stands: its name as in LoRA files (``unet.down_blocks.0...``) and what its output rows mean."""

    name: str
    kind: Kind


@dataclass(frozen=True)
class Grid:
    """The shape of the running forward: ``rows`` n, ``frames`` f, and the latent's ``height`` and ``width``."""

    rows: int
    height: int
    width: int
    frames: int = 1


RouteFunction = Callable[[Tensor, Tensor, Site], Tensor]
"""``(base_out [..., C], deltas [..., C, K], site) -> r`` broadcastable to ``deltas``; for gates computed from hidden states."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A route with places, and what acts on text instead of its mean over places, where everybody's LoRA would mix.

    Args:
        places: a route tensor. text: a route tensor without places, for the keys and values of the prompt.
    """

    places: Tensor
    text: Tensor


Route = Tensor | Placed | RouteFunction

_TEMPORAL = re.compile(r"(^|\.)(motion_modules|temp_attentions|temp_convs|transformer_in)\.")
_TEXT = re.compile(r"\.attn2\.(to_k|to_v|add_k_proj|add_v_proj)$")
_VECTOR = re.compile(
    r"(time_emb_proj|time_embedding\.linear_[12]|add_embedding\.linear_[12]|time_embedding\.cond_proj|text_projection)$"
)


def is_temporal(name: str) -> bool:
    """Whether the layer called ``name`` looks along the frames of a clip."""
    return _TEMPORAL.search(name) is not None


def site_of(name: str, module: nn.Module) -> Site:
    """The site of the layer called ``name``."""
    if name.startswith("text_encoder"):
        return Site(name, Kind.VECTOR if _VECTOR.search(name) else Kind.TEXT)
    if isinstance(module, nn.Conv2d):
        return Site(name, Kind.CONV)
    if is_temporal(name):
        return Site(name, Kind.TEMPORAL)
    if _TEXT.search(name):
        return Site(name, Kind.TEXT)
    if _VECTOR.search(name):
        return Site(name, Kind.VECTOR)
    return Site(name, Kind.IMAGE)


def constant(weights: Sequence[float]) -> Tensor:
    """The same weight per LoRA everywhere: ``[1, 1, 1, 1, 1, k]``."""
    return torch.tensor(list(weights), dtype=torch.float32).view(1, 1, 1, 1, 1, -1)


def per_row(weights: Tensor) -> Tensor:
    """Weights ``[n, k]``: row ``i`` of the forward uses its own mix of LoRAs."""
    return weights.view(len(weights), 1, 1, 1, 1, -1)


def spatial(masks: Tensor) -> Tensor:
    """Masks ``[k, y, x]`` in 0..1, at any resolution: LoRA ``k`` acts where its mask does."""
    return masks.permute(1, 2, 0)[None, None, :, :, None, :]


@dataclass(frozen=True, eq=False, kw_only=True)
class Acting:
    """A route, read once.

    Args:
        route: as it was set.
        weights: one number per LoRA when the route depends on nothing else.
        rows, spans: when the route depends on row and LoRA only: its rows, and ``(start, stop, weights)`` of neighbouring
            rows with equal weights.
        text: what acts on text instead.
    """

    route: Route
    weights: tuple[float, ...] | None = None
    rows: int = 1
    spans: tuple[tuple[int, int, tuple[float, ...]], ...] = ()
    text: Acting | None = None


def read_route(route: Route, count: int) -> Acting:
    """The route with what can be known of it before any layer runs.

    Raises:
        ValueError: not the six axes, not ``count`` LoRAs, or not finite.
    """
    if isinstance(route, Placed):
        return replace(read_route(route.places, count), route=route, text=read_route(route.text, count))
    if not isinstance(route, Tensor):
        return Acting(route=route)
    check(route, count)
    rows, *others, _ = route.shape
    if any(size != 1 for size in others):
        return Acting(route=route)
    table = [tuple(row) for row in route.reshape(rows, count).tolist()]
    changes = [index for index in range(rows) if index == 0 or table[index] != table[index - 1]]
    if len(changes) == 1:
        return Acting(route=route, weights=table[0])
    ends = [*changes[1:], rows]
    return Acting(route=route, rows=rows, spans=tuple((a, b, table[a]) for a, b in zip(changes, ends, strict=True)))


def check(route: Tensor, count: int) -> Tensor:
    """The route itself, if it has six axes, ``count`` LoRAs and only finite values."""
    if route.dim() != AXES or route.shape[-1] != count:
        raise ValueError(f"a route has the axes [n, f, y, x, c, k] with k = {count}, not the shape {tuple(route.shape)}")
    if not bool(torch.isfinite(route).all()):
        raise ValueError("a route holds NaN or infinity")
    return route


def cells(tokens: int, grid: Grid) -> tuple[int, int]:
    """Height and width of a layer with ``tokens`` image tokens: the latent's, halved (rounding up) as often as needed."""
    height, width = grid.height, grid.width
    while height * width > tokens and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are no halving of a {grid.width} x {grid.height} latent")
    return height, width


def _resize(route: Tensor, height: int, width: int) -> Tensor:
    """Bring the places of ``[n, f, y, x, c, k]`` to ``height x width`` by area means."""
    n, f, y, x, c, k = route.shape
    if (y, x) in ((1, 1), (height, width)):
        return route
    flat = route.permute(0, 1, 4, 5, 2, 3).reshape(n * f, c * k, y, x)
    if y < height or x < width:
        # Area means only shrink: enlarge by repetition first.
        flat = F.interpolate(flat, scale_factor=(-(-height // y), -(-width // x)), mode="nearest")
    flat = F.interpolate(flat, size=(height, width), mode="area")
    return flat.view(n, f, c, k, height, width).permute(0, 1, 4, 5, 2, 3)


def _merge_frames(route: Tensor, rows: int) -> Tensor:
    """``[n, f, ...]`` to ``[rows or 1, ...]`` for layers whose batch is n * f rows, or n rows (then the frames' mean acts)."""
    n, f = route.shape[:2]
    if n == f == 1:
        return route[:, 0]
    if rows == n:
        return route.mean(1)
    frames = f if f > 1 else rows // n
    full = n if n > 1 else rows // frames
    if full * frames != rows:
        raise ValueError(f"a route of {n} rows and {f} frames does not fit a layer with {rows} rows")
    return route.expand(full, frames, *route.shape[2:]).flatten(0, 1)


def shape_image(route: Tensor, out: tuple[int, ...], grid: Grid) -> Tensor:
    """For ``[rows, h * w, C]``: ``[rows|1, h * w|1, C|1, k]``."""
    rows, tokens = out[0], out[1]
    if route.shape[2:4] != (1, 1):
        route = _resize(route, *cells(tokens, grid))
    return _merge_frames(route, rows).flatten(1, 2)


def shape_text(route: Tensor, out: tuple[int, ...], grid: Grid) -> Tensor:
    """For ``[rows, L, C]``: ``[rows|1, 1, C|1, k]``. Text has no place: the mean over places acts."""
    return _merge_frames(route.mean((2, 3), keepdim=True), out[0]).flatten(1, 2)


def shape_vector(route: Tensor, out: tuple[int, ...], grid: Grid) -> Tensor:
    """For ``[rows, C]``: ``[rows|1, C|1, k]``. A vector has no place: the mean over places acts."""
    return _merge_frames(route.mean((2, 3), keepdim=True), out[0])[:, 0, 0]


def shape_conv(route: Tensor, out: tuple[int, ...], grid: Grid) -> Tensor:
    """For ``[rows, C, h, w]``: ``[rows|1, C|1, h|1, w|1, k]``."""
    return _merge_frames(_resize(route, out[2], out[3]), out[0]).permute(0, 3, 1, 2, 4)


def shape_temporal(route: Tensor, out: tuple[int, ...], grid: Grid) -> Tensor:
    """For ``[n * h * w, f, C]``: ``[n * h * w|1, f|1, C|1, k]``."""
    n, f, y, x, c, k = route.shape
    if n == y == x == 1:
        return route.view(1, f, c, k)
    tokens = out[0] // grid.rows
    height, width = cells(tokens, grid)
    full = _resize(route, height, width).expand(grid.rows, f, height, width, c, k)
    return full.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


SHAPERS: dict[Kind, Callable[[Tensor, tuple[int, ...], Grid], Tensor]] = {
    Kind.IMAGE: shape_image,
    Kind.TEXT: shape_text,
    Kind.CONV: shape_conv,
    Kind.TEMPORAL: shape_temporal,
    Kind.VECTOR: shape_vector,
}


def shaped(route: Tensor, site: Site, out: tuple[int, ...], grid: Grid) -> Tensor:
    """The route in the shape of a layer at ``site`` whose output has the shape ``out``; LoRA axis last."""
    return SHAPERS[site.kind](route, out, grid)
