"""Where things stand in the combinations of the testbed: boxes drawn at random within a kind of layout.

The base was trained on one or two subjects of 24 to 30 pixels, side by side in a picture of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import numpy as np

from studio.art.scenes import SIDE, Box

Layout = Literal["apart", "touching", "nested", "words"]
"""``words``: nothing but a place in words is meant; the boxes say where things stand in the true picture."""
Pixels = tuple[int, int, int, int]


def touching(boxes: Sequence[Box]) -> bool:
    """Whether two boxes meet or overlap."""
    return any(
        min(a[2], b[2]) >= max(a[0], b[0]) - 1e-9 and min(a[3], b[3]) >= max(a[1], b[1]) - 1e-9
        for a, b in combinations(boxes, 2)
    )


def boxes_of(rng: np.random.Generator, layout: Layout, count: int) -> tuple[Box, ...]:
    """Boxes of two or three subjects, first ones to the left; subjects of 22 to 30 pixels fit what the base was trained on."""
    placed = (_two if count == 2 else _three)(rng, layout)
    return tuple((x0 / SIDE, y0 / SIDE, x1 / SIDE, y1 / SIDE) for x0, y0, x1, y1 in placed)


def _two(rng: np.random.Generator, layout: Layout) -> tuple[Pixels, ...]:
    def between(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    if layout == "nested":
        side, inner = between(44, 46), between(23, 25)
        x, y = between(0, 2), between(1, SIDE - side - 1)
        low = y + side - inner if rng.random() < 0.5 else y
        return (x, y, x + side, y + side), (x + side - inner, low, x + side, low + inner)
    if layout == "touching":
        middle, a, b = between(31, 33), between(28, 30), between(28, 30)
        top = between(2, SIDE - 40)
        y, z = top + between(0, 8), top + between(0, 8)
        return (middle - a, y, middle, y + a), (middle, z, middle + b, z + b)
    a, b = between(26, 28), between(26, 28)
    left, right = between(0, 2), SIDE - between(0, 2)
    y, z = between(2, SIDE - a - 2), between(2, SIDE - b - 2)
    return (left, y, left + a, y + a), (right - b, z, right, z + b)


def _three(rng: np.random.Generator, layout: Layout) -> tuple[Pixels, ...]:
    """Two side by side, the third above or below them."""
    side = int(rng.integers(27, 30)) if layout == "touching" else int(rng.integers(24, 27))
    gap = 0 if layout == "touching" else int(rng.integers(5, 8))
    left, top = (SIDE - 2 * side - gap) // 2, (SIDE - 2 * side - gap) // 2
    far = left + side + gap
    middle = int(rng.integers((SIDE - side) // 2 - 4, (SIDE - side) // 2 + 5))
    upper, lower = (top, top + side + gap)
    y, z = (upper, lower) if rng.random() < 0.5 else (lower, upper)
    return (left, y, left + side, y + side), (far, y, far + side, y + side), (middle, z, middle + side, z + side)


def level(rng: np.random.Generator, count: int) -> tuple[Box, ...]:
    """One box in the middle or two side by side, low enough for something on the head."""
    boxes = []
    for left, right in ((32, 32),) if count == 1 else ((14, 17), (47, 50)):
        side, top = int(rng.integers(25, 28)), int(rng.integers(24, 31))
        x = int(rng.integers(left, right + 1)) - side // 2
        boxes.append((x / SIDE, top / SIDE, (x + side) / SIDE, (top + side) / SIDE))
    return tuple(boxes)
