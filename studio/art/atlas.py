"""The committed atlas: trimmed RGBA sprites of every concept in every art style, with names, classes and splits.

One sheet a style lies in ``assets/atlas/<style>.webp``: a grid of square cells, sprite trimmed to its alpha box, its longer
side filling the cell, top-left aligned. ``concepts.json`` names the cells; ``splits.json`` says who may see what.
``python -m training.base.atlas`` builds all of it from the public packages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from studio.errors import UnknownNameError
from studio.paths import assets

CELL = 36
"""Side of an atlas cell in pixels: the largest size a sprite is stored at."""

STYLES: dict[str, tuple[str, ...]] = {
    "3d": ("3d render", "3d model"),
    "cartoon": ("cartoon sticker", "cartoon"),
    "flat": ("flat icon", "flat vector"),
}
"""Art style -> its phrases in captions; the first is the plain one."""

ACCESSORIES = ("hat", "crown", "bow", "glasses", "halo", "balloon")
"""Held-out things that sit on a subject. No base caption mentions one."""


@dataclass(frozen=True)
class Concept:
    """One subject of the world.

    ``name`` is unique and is what captions say for named concepts; ``class_word`` is what they say for all others.
    """

    name: str
    class_word: str
    synonyms: tuple[str, ...]
    hex: str
    index: int


@dataclass(frozen=True)
class Splits:
    """Frozen before the first training run. Names only; see ``assets/atlas/splits.json``.

    ``named_a`` and ``named_b`` are seen under their names, ``class_seen`` only under their class word, ``heldout`` never.
    ``heldout`` holds disjoint parts: ``concept`` (LoRAs and testbed), ``zoo`` (adapter library), ``reserve`` (for later).
    """

    named_a: tuple[str, ...]
    named_b: tuple[str, ...]
    class_seen: tuple[str, ...]
    heldout: dict[str, tuple[str, ...]]
    heldout_motion_pairs: tuple[tuple[str, str], ...]

    @property
    def named(self) -> tuple[str, ...]:
        return self.named_a + self.named_b


def atlas_dir() -> Path:
    """The folder of the committed atlas."""
    return assets() / "atlas"


@lru_cache(maxsize=1)
def concepts() -> dict[str, Concept]:
    """All concepts by name, in atlas order."""
    rows = json.loads((atlas_dir() / "concepts.json").read_text("utf-8"))["concepts"]
    return {
        row["name"]: Concept(row["name"], row["class"], tuple(row["synonyms"]), row["hex"], index)
        for index, row in enumerate(rows)
    }


@lru_cache(maxsize=1)
def splits() -> Splits:
    """The committed split."""
    raw = json.loads((atlas_dir() / "splits.json").read_text("utf-8"))
    return Splits(
        named_a=tuple(raw["named_a"]),
        named_b=tuple(raw["named_b"]),
        class_seen=tuple(raw["class_seen"]),
        heldout={part: tuple(names) for part, names in raw["heldout"].items()},
        heldout_motion_pairs=tuple((s, m) for s, m in raw["heldout_motion_pairs"]),
    )


@lru_cache(maxsize=len(STYLES))
def _sheet(style: str) -> np.ndarray:
    """All cells of one art style, ``[H, W, 4]`` uint8."""
    return np.asarray(Image.open(atlas_dir() / f"{known(style, STYLES, 'art style')}.webp").convert("RGBA"))


def known(name: str, names: Iterable[str], kind: str) -> str:
    """``name`` itself when it is one of ``names``; otherwise an :class:`UnknownNameError` with the near ones."""
    names = tuple(names)
    if name not in names:
        raise UnknownNameError(kind, name, names)
    return name


@lru_cache(maxsize=4096)
def sprite(name: str, style: str) -> np.ndarray:
    """The sprite as stored: ``[h, w, 4]`` uint8, straight alpha, trimmed; ``max(h, w) == CELL``.

    ``name`` is a concept or an accessory (but ``halo``, which is drawn).
    """
    sheet = _sheet(style)
    index = _cell_index()[known(name, _cell_index(), "concept")]
    columns = sheet.shape[1] // CELL
    y, x = divmod(index, columns)
    cell = sheet[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
    return trim(cell)


@lru_cache(maxsize=1)
def _cell_index() -> dict[str, int]:
    names = list(concepts()) + [f"accessory:{name}" for name in ACCESSORIES if name != "halo"]
    return {name: index for index, name in enumerate(names)}


def trim(rgba: np.ndarray, threshold: int = 8) -> np.ndarray:
    """Cut an RGBA array to the box of its alpha above ``threshold`` (of 255)."""
    rows = np.flatnonzero((rgba[..., 3] > threshold).any(1))
    columns = np.flatnonzero((rgba[..., 3] > threshold).any(0))
    if len(rows) == 0:
        return rgba[:1, :1]
    return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def resize(rgba: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area-correct resize of straight-alpha RGBA: colours are weighted by alpha, so no dark fringe appears."""
    image = Image.fromarray(rgba).convert("RGBa").resize((max(width, 1), max(height, 1)), Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGBA"))


@lru_cache(maxsize=65536)
def sized(name: str, style: str, size: int) -> np.ndarray:
    """The sprite with its longer side ``size`` pixels, ``[h, w, 4]`` uint8, straight alpha."""
    full = sprite(name, style)
    scale = size / max(full.shape[:2])
    return resize(full, round(full.shape[0] * scale), round(full.shape[1] * scale))
