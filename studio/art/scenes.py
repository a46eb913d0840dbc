"""Scenes: subjects placed on a background, with their exact boxes and masks.

A :class:`Scene` is plain data; :func:`render` draws it. Boxes are ``(x0, y0, x1, y1)`` as fractions of width and height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from studio.art.atlas import STYLES, known, resize, sized, sprite
from studio.art.backgrounds import background
from studio.art.looks import apply_look, look_background

SIDE = 64
"""Pixels of the embedded base's pictures."""
SIZES = (24, 30)
"""Smallest and largest longer side of a subject in pixels; the base was trained on these."""
MARGIN = 2

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Placement:
    """One subject: what, how drawn, where. ``x, y`` is the centre in pixels, ``size`` the longer side in pixels."""

    concept: str
    style: str
    x: float
    y: float
    size: int = 28
    flip: bool = False
    angle: float = 0.0
    accessory: str | None = None


@dataclass(frozen=True)
class Scene:
    """A whole picture. ``look`` redraws every subject; ``side`` is the canvas in pixels."""

    items: tuple[Placement, ...]
    background: str = "white"
    look: str | None = None
    side: int = SIDE


@dataclass(frozen=True)
class Rendered:
    """``image [s, s, 3]`` uint8; per item its visible box (fractions) and mask ``[s, s]`` in 0..1 (later items hide
    earlier)."""

    image: np.ndarray
    boxes: tuple[Box, ...]
    masks: tuple[np.ndarray, ...]


def render(scene: Scene) -> Rendered:
    """Draw ``scene``; deterministic."""
    canvas = background(scene.background, scene.side)
    if scene.look:
        canvas = look_background(scene.look, canvas)
    canvas = canvas.astype(np.float32)
    masks: list[np.ndarray] = []
    for item in scene.items:
        art = draw(item, scene.look)
        mask = np.zeros((scene.side, scene.side), np.float32)
        top, left = round(item.y - art.shape[0] / 2), round(item.x - art.shape[1] / 2)
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + art.shape[0], scene.side), min(left + art.shape[1], scene.side)
        if y1 > y0 and x1 > x0:
            part = art[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
            alpha = part[..., 3] / 255.0
            canvas[y0:y1, x0:x1] += alpha[..., None] * (part[..., :3] - canvas[y0:y1, x0:x1])
            mask[y0:y1, x0:x1] = alpha
        masks = [earlier * (1 - mask) for earlier in masks] + [mask]
    image = canvas.round().clip(0, 255).astype(np.uint8)
    return Rendered(image, tuple(box_of(mask) for mask in masks), tuple(masks))


def draw(item: Placement, look: str | None = None) -> np.ndarray:
    """The sprite of ``item`` alone: accessory on, look applied, flipped and turned; ``[h, w, 4]`` uint8, straight alpha."""
    art = sized(item.concept, item.style, item.size)
    if item.accessory:
        art = wear(art, item.accessory, item.style)
    if look:
        art = apply_look(look, art)
    if item.flip:
        art = art[:, ::-1]
    if item.angle:
        turned = Image.fromarray(art).convert("RGBa").rotate(item.angle, Image.Resampling.BICUBIC, expand=True)
        art = np.asarray(turned.convert("RGBA"))
    return art


def wear(art: np.ndarray, accessory: str, style: str) -> np.ndarray:
    """``art`` with an accessory at the top centre of its alpha box; the array grows as needed."""
    height, width = art.shape[:2]
    thing = _halo(width) if accessory == "halo" else _accessory(accessory, style, width)
    above = {"glasses": -int(height * 0.22), "balloon": thing.shape[0] - 2}.get(accessory, thing.shape[0] - max(height // 8, 2))
    top = max(above, 0)
    out_width = max(width, thing.shape[1])
    out = np.zeros((top + height, out_width, 4), np.uint8)
    offset = (out_width - width) // 2
    out[top:, offset : offset + width] = art
    y, x = top - above, (out_width - thing.shape[1]) // 2
    under, alpha = out[y : y + thing.shape[0], x : x + thing.shape[1]].astype(np.float32), thing[..., 3:] / 255.0
    thing = thing[: under.shape[0]]
    alpha = alpha[: under.shape[0]]
    total = alpha + under[..., 3:] / 255.0 * (1 - alpha)
    mixed = (thing[..., :3] * alpha + under[..., :3] * under[..., 3:] / 255.0 * (1 - alpha)) / np.maximum(total, 1e-6)
    out[y : y + thing.shape[0], x : x + thing.shape[1]] = np.concatenate([mixed, total * 255], -1).round()
    return out


def _accessory(accessory: str, style: str, width: int) -> np.ndarray:
    full = sprite(f"accessory:{accessory}", style)
    scale = width * {"glasses": 0.8, "balloon": 0.45}.get(accessory, 0.6) / full.shape[1]
    return resize(full, round(full.shape[0] * scale), round(full.shape[1] * scale))


def _halo(width: int) -> np.ndarray:
    across, down = max(round(width * 0.7), 4), max(round(width * 0.26), 3)
    y, x = np.mgrid[0:down, 0:across]
    radius = np.hypot((x - (across - 1) / 2) / (across / 2), (y - (down - 1) / 2) / (down / 2))
    ring = np.clip(1 - np.abs(radius - 0.75) / 0.3, 0, 1)
    colour = np.broadcast_to(np.array((255, 214, 60), np.float32), (down, across, 3))
    return np.concatenate([colour, ring[..., None] * 255], -1).round().astype(np.uint8)


def box_of(mask: np.ndarray, threshold: float = 0.1) -> Box:
    """Tight box of a mask as fractions; ``(0, 0, 0, 0)`` when nothing is visible."""
    rows, columns = np.flatnonzero((mask > threshold).any(1)), np.flatnonzero((mask > threshold).any(0))
    if len(rows) == 0:
        return (0.0, 0.0, 0.0, 0.0)
    height, width = mask.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


def place_single(rng: np.random.Generator, concept: str, style: str, place: str, side: int = SIDE) -> Placement:
    """One subject at ``place`` (``left | right | center``) with jitter that keeps it inside and on its side."""
    size = int(rng.integers(SIZES[0], SIZES[1] + 1))
    height, width = sized(concept, style, size).shape[:2]
    x = _jitter(rng, {"left": side * 0.25, "right": side * 0.75, "center": side * 0.5}[place], side * 0.05, width, side)
    y = _jitter(rng, side * 0.5, side * 0.12, height, side)
    return Placement(concept, style, x, y, size)


def place_three(rng: np.random.Generator, concepts: Sequence[str], style: str, side: int = SIDE) -> tuple[Placement, ...]:
    """Two subjects side by side and a third above or below them, none of them hidden."""
    upper, lower = side * 0.25, side * 0.75
    row, other = (upper, lower) if rng.random() < 0.5 else (lower, upper)
    spots = ((side * 0.25, row), (side * 0.75, row), (side * 0.5, other))
    placed = []
    for concept, (x, y) in zip(concepts, spots, strict=True):
        size = int(rng.integers(SIZES[0], SIZES[1] - 1))
        height, width = sized(concept, style, size).shape[:2]
        x, y = (_jitter(rng, *where, side) for where in ((x, side * 0.03, width), (y, side * 0.03, height)))
        placed.append(Placement(concept, style, x, y, size))
    return tuple(placed)


def _jitter(rng: np.random.Generator, centre: float, spread: float, extent: int, side: int) -> float:
    low, high = extent / 2 + MARGIN / 2, side - extent / 2 - MARGIN / 2
    return float(np.clip(centre + rng.uniform(-spread, spread), min(low, side / 2), max(high, side / 2)))


def sample_scene(
    rng: np.random.Generator,
    concepts: Sequence[str],
    backgrounds: Sequence[str],
    styles: Sequence[str] = tuple(STYLES),
    look: str | None = None,
    side: int = SIDE,
) -> Scene:
    """A random scene of one to three given subjects, in one common style.

    One subject stands left, right or in the centre; two stand left and right in the order given; a third above or below
    them. On a canvas too small for places (side < 48) the subject fills it.
    """
    style = known(str(rng.choice(list(styles))), STYLES, "art style")
    if len(concepts) == 1:
        place = str(rng.choice(["left", "right", "center"])) if side >= 48 else "center"
        items: tuple[Placement, ...] = (place_single(rng, concepts[0], style, place, side),)
    elif len(concepts) == 3:
        items = place_three(rng, concepts, style, side)
    else:
        items = tuple(place_single(rng, c, style, p, side) for c, p in zip(concepts, ("left", "right"), strict=True))
    return Scene(items, str(rng.choice(list(backgrounds))), look, side)


def place_of(item: Placement, side: int = SIDE) -> str:
    """``left``, ``right`` or ``center`` by the thirds of the canvas."""
    third = item.x / side
    return "left" if third < 0.4 else "right" if third > 0.6 else "center"


def mirrored(scene: Scene) -> Scene:
    """The scene seen in a mirror: left becomes right and every subject is flipped."""
    items = tuple(replace(i, x=scene.side - i.x, flip=not i.flip, angle=-i.angle) for i in scene.items)
    return replace(scene, items=items[::-1])
