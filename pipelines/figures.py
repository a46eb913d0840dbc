"""Drawing what methods show (:mod:`compose.figures`) as pictures: strips, curves, maps, boxes and words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from compose.figures import Boxes, Curves, Figure, Maps, Schedule, Words

Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (120, 94, 240), (140, 140, 40),
)  # fmt: skip
"""One per row or line, told apart also by people who see few colours."""
RAMP: tuple[Colour, ...] = ((20, 11, 52), (101, 26, 109), (187, 55, 84), (243, 120, 25), (252, 255, 164))
"""From nothing to the most, evenly brighter."""
INK: Colour = (30, 30, 30)
FAINT: Colour = (200, 200, 200)
WHITE: Colour = (255, 255, 255)
WIDTH = 960
PAD = 16
LINE = 22


def font(size: int = 15) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def colour(index: int) -> Colour:
    return COLOURS[index % len(COLOURS)]


def mixed(low: Colour, high: Colour, share: float) -> Colour:
    """``low`` at 0, ``high`` at 1."""
    red, green, blue = (round(a + (b - a) * min(max(share, 0.0), 1.0)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def width_of(texts: Sequence[str]) -> int:
    """Pixels of the longest."""
    return max((int(font().getlength(text)) for text in texts), default=0)


def short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), WHITE)
    return image, ImageDraw.Draw(image)


@singledispatch
def draw(figure: Figure, picture: Image.Image) -> Image.Image:
    """``figure`` as a picture; ``picture`` is the one the run made."""
    raise TypeError(f"nothing draws a {type(figure).__name__}")


@draw.register
def _schedule(figure: Schedule, picture: Image.Image) -> Image.Image:
    """A strip per row: the stronger a cell, the more colour; marks are dots; what pushes away is framed."""
    names = [short(name) for name in figure.rows]
    count = max((len(row) for row in figure.rows.values()), default=0)
    left = PAD + width_of(names) + PAD
    cell = max(4, min(48, (WIDTH - left - PAD) // max(count, 1)))
    high = 32
    image, pen = canvas(left + cell * count + PAD, PAD + (high + 6) * len(names) + 2 * LINE)
    numbers = [abs(value) for row in figure.rows.values() for value in row]
    top = max([1.0 if max(numbers, default=0.0) > 0.999 else max(numbers, default=1.0), *numbers, 1e-9])
    plain = all(value in (0.0, 1.0) for value in numbers)
    for index, (name, row) in enumerate(figure.rows.items()):
        y = PAD + index * (high + 6)
        pen.text((PAD, y + high // 2), names[index], INK, font(), anchor="lm")
        for step, value in enumerate(row):
            box = (left + step * cell, y, left + (step + 1) * cell - 2, y + high)
            pen.rectangle(box, mixed((244, 244, 244), colour(index), abs(value) / top), (200, 0, 0) if value < 0 else None)
            middle = ((box[0] + box[2]) // 2, y + high // 2)
            if not plain and cell >= 34:
                pen.text(middle, f"{value:.2f}".replace("0.", "."), WHITE if abs(value) > 0.5 * top else INK, font(12), "mm")
            if (name, step) in figure.marks:
                pen.ellipse((middle[0] - 3, y + high - 8, middle[0] + 3, y + high - 2), INK)
    told = figure.steps or [str(step + 1) for step in range(count)]
    every = max(1, -(-width_of(told) * 2 // cell))
    for step in range(0, count, every):
        pen.text((left + step * cell + cell // 2, image.height - LINE), told[step], INK, font(12), anchor="mm")
    return image


@draw.register
def _curves(figure: Curves, picture: Image.Image) -> Image.Image:
    """Lines over steps on one scale, with a line at 0 where it lies inside. What is not a number is left out."""
    lines = {short(name, 70): [float(value) for value in line] for name, line in figure.lines.items()}
    finite = [value for line in lines.values() for value in line if np.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    count = max((len(line) for line in lines.values()), default=1)
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    labels = [f"{tick:.3g}" for tick in ticks]
    left, tall = PAD + width_of(labels) + 8, 260
    image, pen = canvas(WIDTH, PAD + tall + 2 * LINE + LINE * len(lines) + PAD)
    right = WIDTH - PAD

    def at(step: int, value: float) -> tuple[float, float]:
        return left + (right - left) * step / max(count - 1, 1), PAD + tall * (high - value) / (high - low)

    for tick, label in zip(ticks, labels, strict=True):
        y = at(0, tick)[1]
        pen.line((left, y, right, y), FAINT)
        pen.text((left - 6, y), label, INK, font(12), anchor="rm")
    if low < 0 < high:
        pen.line((*at(0, 0.0), *at(count - 1, 0.0)), INK, 2)
    for index, (name, line) in enumerate(lines.items()):
        places = [at(step, value) if np.isfinite(value) else None for step, value in enumerate(line)]
        for first, second in pairwise(places):
            if first is not None and second is not None:
                pen.line((*first, *second), colour(index), 3)
        for place in places:
            if place is not None:
                pen.ellipse((place[0] - 3, place[1] - 3, place[0] + 3, place[1] + 3), colour(index))
        y = PAD + tall + 2 * LINE + LINE * index
        pen.rectangle((left, y, left + 14, y + 14), colour(index))
        pen.text((left + 22, y + 7), name, INK, font(), anchor="lm")
    for step in sorted({round(part * (count - 1) / 10) for part in range(11)}):
        pen.text((at(step, low)[0], PAD + tall + 12), str(step + 1), INK, font(12), anchor="mm")
    pen.text((right, PAD + tall + 28), figure.across, INK, font(12), anchor="rm")
    return image


def heat(values: torch.Tensor, top: float | None) -> Image.Image:
    """A map ``[h, w]`` in the colours of :data:`RAMP`: 0 dark, ``top`` (None: its own largest) brightest."""
    numbers = values.detach().to("cpu", torch.float32).nan_to_num(0.0, 0.0, 0.0).numpy()
    most = float(numbers.max()) if top is None else top
    share = np.clip(numbers / most if most > 0 else np.zeros_like(numbers), 0, 1)
    stops = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(share, stops, [stop[channel] for stop in RAMP]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


@draw.register
def _maps(figure: Maps, picture: Image.Image) -> Image.Image:
    """A grid: rows are names, columns moments."""
    names = [short(name) for name in figure.rows]
    count = max((len(row) for row in figure.rows.values()), default=0)
    left = PAD + width_of(names) + PAD
    side = max(40, min(160, (WIDTH - left - PAD) // max(count, 1) - 6))
    image, pen = canvas(left + (side + 6) * count + PAD, PAD + LINE + (side + 6) * len(names) + PAD)
    for column, title in enumerate(figure.columns[:count]):
        pen.text((left + column * (side + 6) + side // 2, PAD + 6), title, INK, font(12), anchor="mm")
    for index, row in enumerate(figure.rows.values()):
        y = PAD + LINE + index * (side + 6)
        pen.text((PAD, y + side // 2), names[index], INK, font(), anchor="lm")
        for column, values in enumerate(row):
            height, width = values.shape
            size = (side, max(1, side * height // width)) if width >= height else (max(1, side * width // height), side)
            image.paste(heat(values, figure.top).resize(size, Image.Resampling.NEAREST), (left + column * (side + 6), y))
    return image


@draw.register
def _boxes(figure: Boxes, picture: Image.Image) -> Image.Image:
    """Frames on the finished picture, with their names inside."""
    factor = max(1, 480 // max(picture.size))
    image = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for index, (name, (x0, y0, x1, y1)) in enumerate(figure.boxes.items()):
        corners = (x0 * image.width, y0 * image.height, x1 * image.width - 1, y1 * image.height - 1)
        pen.rectangle(corners, None, colour(index), 4)
        place = (corners[0] + 8, corners[1] + 6 + (index % 2) * 4)
        pen.rectangle(pen.textbbox(place, short(name), font()), WHITE)
        pen.text(place, short(name), colour(index), font())
    return image


@draw.register
def _words(figure: Words, picture: Image.Image) -> Image.Image:
    """The tokens in order; those that belong to somebody are coloured, and the colours named below."""
    owner = {token: index for index, tokens in enumerate(figure.found.values()) for token in tokens}
    chips: list[tuple[int, int, int, int]] = []
    x, y = PAD, PAD
    for index, token in enumerate(figure.tokens):
        wide = int(font().getlength(short(token))) + 14
        if x + wide > WIDTH - PAD:
            x, y = PAD, y + LINE + 24
        chips.append((x, y, index, wide))
        x += wide + 6
    legend = y + LINE + 30
    image, pen = canvas(WIDTH, legend + LINE * len(figure.found) + PAD)
    for x, y, index, wide in chips:
        own = owner.get(index)
        fill = (240, 240, 240) if own is None else colour(own)
        pen.rounded_rectangle((x, y, x + wide, y + LINE + 4), 5, fill)
        pen.text((x + wide // 2, y + 13), short(figure.tokens[index]), INK if own is None else WHITE, font(), anchor="mm")
        pen.text((x + wide // 2, y + LINE + 12), str(index + 1), (150, 150, 150), font(11), anchor="mm")
    for index, (name, tokens) in enumerate(figure.found.items()):
        y = legend + LINE * index
        where = ", ".join(str(token + 1) for token in tokens) or "not in the prompt"
        pen.rectangle((PAD, y, PAD + 14, y + 14), colour(index))
        pen.text((PAD + 22, y + 7), f"{short(name, 60)}: {where}", INK, font(), anchor="lm")
    return image
