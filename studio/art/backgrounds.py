"""Backgrounds: those the base model knows, and held-out ones to teach.

Every background is a pure function of the canvas side (and, where it has texture, of a phase), returning ``[s, s, 3]`` uint8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from studio.art.atlas import known

Colour = tuple[int, int, int]

PLAIN: dict[str, Colour] = {
    "white": (250, 250, 250),
    "gray": (150, 152, 156),
    "yellow": (250, 228, 130),
    "green": (150, 205, 140),
    "blue": (120, 170, 230),
    "purple": (170, 140, 210),
    "pink": (248, 186, 206),
    "orange": (250, 176, 104),
}

PHRASES: dict[str, str] = {
    **{name: f"{name} background" for name in PLAIN},
    "grass": "on the grass",
    "snow": "in the snow",
    "sunset": "at sunset",
    "sea": "at the sea",
    "stripes": "striped background",
    "dots": "dotted background",
    "sky": "gradient sky background",
    "checker": "checkered background",
    "night": "at night",
    "sand": "on the sand",
}
"""How a caption names each background."""

SCENIC = ("grass", "snow", "sunset", "sea")
BASE = (*PLAIN, *SCENIC)
"""Backgrounds in the base model's training data."""
HELDOUT = ("stripes", "dots", "sky", "checker", "night", "sand")
"""Backgrounds the base model never saw."""


def background(name: str, side: int) -> np.ndarray:
    """The picture of background ``name``: ``[side, side, 3]`` uint8."""
    known(name, PHRASES, "background")
    if name in PLAIN:
        return np.full((side, side, 3), PLAIN[name], np.uint8)
    return _DRAWN[name](side)


def _vertical(side: int, *stops: tuple[float, Colour]) -> np.ndarray:
    """Vertical gradient through ``(height fraction, colour)`` stops."""
    at = (np.arange(side) + 0.5) / side
    heights = [stop[0] for stop in stops]
    columns = [np.interp(at, heights, [stop[1][c] for stop in stops]) for c in range(3)]
    return np.repeat(np.stack(columns, -1)[:, None], side, 1).round().astype(np.uint8)


def _ground(side: int, sky: tuple[Colour, Colour], ground: tuple[Colour, Colour], horizon: float = 0.62) -> np.ndarray:
    return _vertical(side, (0, sky[0]), (horizon - 0.01, sky[1]), (horizon + 0.01, ground[0]), (1, ground[1]))


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:side, 0:side]
    return y, x


def _two(mask: np.ndarray, on: Colour, off: Colour) -> np.ndarray:
    return np.where(mask[..., None], np.array(on, np.uint8), np.array(off, np.uint8))


def _stripes(side: int) -> np.ndarray:
    y, x = _grid(side)
    return _two((x + y) // 6 % 2 == 0, (232, 92, 88), (252, 240, 226))


def _dots(side: int) -> np.ndarray:
    y, x = _grid(side)
    odd = y // 10 % 2
    return _two(((x + 5 * odd) % 10 - 4.5) ** 2 + (y % 10 - 4.5) ** 2 < 8, (250, 250, 252), (96, 176, 172))


def _checker(side: int) -> np.ndarray:
    y, x = _grid(side)
    return _two((x // 8 + y // 8) % 2 == 0, (60, 60, 68), (226, 226, 226))


def _night(side: int) -> np.ndarray:
    sky = _vertical(side, (0, (12, 14, 44)), (1, (44, 42, 96)))
    rng = np.random.default_rng(7)
    for _ in range(side * side // 110):
        y, x = rng.integers(0, side, 2)
        sky[y, x] = (255, 252, 214)
    return sky


def _sand(side: int) -> np.ndarray:
    y, x = _grid(side)
    ripple = np.sin((y + 2.2 * np.sin(x / 7.0)) * 1.15) * 14
    return np.clip(np.array((222, 190, 134)) + ripple[..., None], 0, 255).round().astype(np.uint8)


_DRAWN: dict[str, Callable[[int], np.ndarray]] = {
    "grass": lambda s: _ground(s, ((150, 208, 250), (214, 238, 252)), ((112, 190, 84), (70, 150, 58))),
    "snow": lambda s: _ground(s, ((170, 196, 224), (216, 228, 240)), ((240, 246, 252), (222, 232, 244))),
    "sunset": lambda s: _vertical(s, (0, (92, 70, 150)), (0.5, (240, 126, 110)), (1, (254, 206, 120))),
    "sea": lambda s: _ground(s, ((190, 226, 250), (232, 246, 252)), ((60, 150, 190), (24, 92, 150))),
    "stripes": _stripes,
    "dots": _dots,
    "sky": lambda s: _vertical(s, (0, (36, 96, 214)), (1, (206, 236, 255))),
    "checker": _checker,
    "night": _night,
    "sand": _sand,
}
