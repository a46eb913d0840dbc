"""A contact sheet: rows of enlarged pictures with words beside and under them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TILE = 192
"""Side of an enlarged picture in pixels."""
GAP = 12
BESIDE = 230
"""Width of the words beside a row."""
LINE = 16
FONT_SIZE = 13
INK, SOFT, PAPER = (28, 28, 34), (104, 106, 116), (250, 250, 248)
TONES = {"good": (22, 128, 60), "bad": (190, 40, 40), "plain": SOFT}


@dataclass(frozen=True)
class Label:
    """A line under a picture; ``tone`` is ``good``, ``bad`` or ``plain``."""

    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Tile:
    """One picture of any size and the lines under it."""

    picture: Image.Image
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True)
class SheetRow:
    """A row: ``title`` in strong ink, ``text`` wrapped below it, and the pictures."""

    title: str
    text: str
    tiles: tuple[Tile, ...]


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> Image.Image:
    """Draw ``rows`` under ``title``; every picture keeps its aspect ratio inside a square of :data:`TILE`."""
    across = max((len(row.tiles) for row in rows), default=0)
    under = [max((len(tile.labels) for tile in row.tiles), default=0) * LINE for row in rows]
    head = 3 * LINE
    width = GAP + BESIDE + across * (TILE + GAP)
    height = head + sum(TILE + lines + 2 * GAP for lines in under) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    plain, strong = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 4)
    pen.text((GAP, GAP), title, INK, strong)
    top = head
    for row, lines in zip(rows, under, strict=True):
        pen.text((GAP, top), row.title, INK, plain)
        for i, line in enumerate(textwrap.wrap(row.text, 34)[: TILE // LINE - 2]):
            pen.text((GAP, top + (i + 1.5) * LINE), line, SOFT, plain)
        for column, tile in enumerate(row.tiles):
            left = GAP + BESIDE + column * (TILE + GAP)
            sheet.paste(enlarged(tile.picture), (left, top))
            for i, label in enumerate(tile.labels):
                pen.text((left, top + TILE + 3 + i * LINE), label.text, TONES[label.tone], plain)
        top += TILE + lines + 2 * GAP
    return sheet


def enlarged(picture: Image.Image, side: int = TILE) -> Image.Image:
    """``picture`` in a square of ``side`` pixels, its aspect ratio kept; whole-number enlargements stay crisp."""
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    way = Image.Resampling.NEAREST if scale >= 1 and scale == int(scale) else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), PAPER)
    square.paste(picture.convert("RGB").resize(size, way), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square
