"""Labelled, enlarged contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tests.bench.judge import Picture, as_pixels

ENLARGE = 3
LINE = 12
INK, PAPER, BAD = (20, 20, 20), (255, 255, 255), (190, 20, 20)


def contact_sheet(
    pictures: Sequence[Picture],
    labels: Sequence[Sequence[str]],
    columns: int = 8,
    enlarge: int = ENLARGE,
    title: str = "",
    bad: Sequence[bool] | None = None,
    size: int = 10,
) -> Image.Image:
    """Pictures in a grid, ``enlarge`` times (nearest neighbour), each with its lines of text under it.

    ``bad[i]`` draws a red frame and red text. All pictures share one side.

    Raises:
        ValueError: no picture, or not one list of lines a picture.
    """
    if not pictures or len(labels) != len(pictures):
        raise ValueError(f"a sheet needs pictures and as many labels: got {len(pictures)} and {len(labels)}")
    arrays = [(as_pixels(picture).numpy() * 255).round().astype(np.uint8) for picture in pictures]
    side = arrays[0].shape[0] * enlarge
    font = ImageFont.load_default(size)
    columns = min(columns, len(arrays))
    depth = max(len(lines) for lines in labels) * LINE + 6
    head = LINE + 8 if title else 0
    rows = -(-len(arrays) // columns)
    sheet = Image.new("RGB", (columns * (side + 6) + 6, head + rows * (side + depth + 4) + 4), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 4), title, INK, font)
    for i, array in enumerate(arrays):
        x, y = 6 + i % columns * (side + 6), head + i // columns * (side + depth + 4) + 4
        colour = BAD if bad is not None and bad[i] else INK
        sheet.paste(Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=colour)
        for row, line in enumerate(labels[i]):
            pen.text((x, y + side + 2 + row * LINE), fitted(pen, line, side, font), colour, font)
    return sheet


def fitted(pen: ImageDraw.ImageDraw, line: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """``line``, cut with an ellipsis where it is wider than ``width`` pixels."""
    if pen.textlength(line, font=font) <= width:
        return line
    while line and pen.textlength(line + "...", font=font) > width:
        line = line[:-1]
    return line + "..."


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a sheet as PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
