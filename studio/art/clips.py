"""Clips: a scene whose subjects move, with boxes and masks in every frame.

A motion is a pure function of the phase ``t`` in 0..1 to an offset (fractions of the canvas), a scale and an angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from studio.art.atlas import CELL, known
from studio.art.scenes import Box, Scene, render


@dataclass(frozen=True)
class Pose:
    """Offset in fractions of the canvas, scale factor, angle in degrees (counter-clockwise)."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    angle: float = 0.0


MOTIONS: dict[str, Callable[[float], Pose]] = {
    "still": lambda t: Pose(),
    "left": lambda t: Pose(dx=0.25 - 0.5 * t),
    "right": lambda t: Pose(dx=0.5 * t - 0.25),
    "up": lambda t: Pose(dy=0.22 - 0.44 * t),
    "down": lambda t: Pose(dy=0.44 * t - 0.22),
    "grow": lambda t: Pose(scale=0.6 + 0.6 * t),
    "shrink": lambda t: Pose(scale=1.2 - 0.6 * t),
    "shake": lambda t: Pose(dx=0.06 * math.sin(6 * math.pi * t)),
    "bounce": lambda t: Pose(dy=0.15 - 0.34 * abs(math.sin(2 * math.pi * t))),
    "spin": lambda t: Pose(angle=360.0 * t),
}
PHRASES: dict[str, str] = {
    "still": "standing still",
    "left": "moving left",
    "right": "moving right",
    "up": "rising",
    "down": "falling",
    "grow": "growing",
    "shrink": "shrinking",
    "shake": "shaking",
    "bounce": "bouncing",
    "spin": "spinning",
}
HELDOUT = ("bounce", "spin")
BASE = tuple(name for name in MOTIONS if name not in HELDOUT)


@dataclass(frozen=True)
class RenderedClip:
    """``frames [F, s, s, 3]`` uint8; ``boxes[f][item]``; ``masks [F, items, s, s]`` in 0..1."""

    frames: np.ndarray
    boxes: tuple[tuple[Box, ...], ...]
    masks: np.ndarray


def posed(scene: Scene, motions: tuple[str, ...], t: float) -> Scene:
    """``scene`` at phase ``t``; one motion an item."""
    items = []
    for item, motion in zip(scene.items, motions, strict=True):
        pose = MOTIONS[known(motion, MOTIONS, "motion")](t)
        size = min(max(round(item.size * pose.scale), 4), CELL)
        moved = replace(item, x=item.x + pose.dx * scene.side, y=item.y + pose.dy * scene.side, size=size)
        items.append(replace(moved, angle=item.angle + pose.angle))
    return replace(scene, items=tuple(items))


def render_clip(scene: Scene, motions: tuple[str, ...], frames: int = 16) -> RenderedClip:
    """``frames`` pictures whose phase runs from 0 to 1, both ends included."""
    rendered = [render(posed(scene, motions, f / max(frames - 1, 1))) for f in range(frames)]
    return RenderedClip(
        np.stack([r.image for r in rendered]),
        tuple(r.boxes for r in rendered),
        np.stack([np.stack(r.masks) for r in rendered]),
    )
