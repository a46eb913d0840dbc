"""Procedural looks: styles whose true picture is known for every concept.

A look redraws a sprite (straight-alpha RGBA) and may replace the background. Six pictures can teach one, because it is a rule
and not another draughtsman's hand. The base is trained on those in :data:`BASE`, so that it knows that a picture has a look;
those in :data:`HELDOUT` no part of it has seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from studio.art.atlas import known, resize

HELDOUT: dict[str, str] = {
    "pixel": "pixel art",
    "blueprint": "blueprint drawing",
    "neon": "neon outline",
    "hatch": "sepia hatching",
    "halftone": "halftone print",
    "pastel": "pastel poster",
}
"""Look -> its words, for people; captions of training pictures use a trigger instead."""
SEEN: dict[str, str] = {
    "ink": "ink drawing",
    "chalk": "chalk drawing",
    "silhouette": "silhouette",
    "negative": "negative",
    "gray": "black and white photo",
    "woodcut": "woodcut",
    "mosaic": "mosaic",
    "watercolor": "watercolor",
    "glass": "stained glass",
    "heat": "heat map",
}
"""Looks in the base model's training data -> the words of its captions."""
BASE = tuple(SEEN)
PHRASES: dict[str, str] = {**HELDOUT, **SEEN}
LUMA = np.array([0.299, 0.587, 0.114])
"""Share of red, green and blue in a pixel's lightness."""


def apply_look(look: str, rgba: np.ndarray) -> np.ndarray:
    """Redraw a sprite ``[h, w, 4]`` uint8 (straight alpha) in ``look``; same shape."""
    return _LOOKS[known(look, PHRASES, "look")](rgba)


PAPERS: dict[str, tuple[int, int, int]] = {
    "blueprint": (24, 66, 150),
    "neon": (16, 10, 34),
    "hatch": (244, 230, 200),
    "halftone": (250, 244, 224),
    "ink": (252, 252, 246),
    "chalk": (44, 58, 52),
    "woodcut": (238, 222, 190),
    "watercolor": (248, 244, 234),
    "glass": (34, 30, 40),
}
"""Looks that replace the background, and the colour of their paper."""


def brings_background(look: str) -> bool:
    """Whether ``look`` replaces the scene's background by its own."""
    return look in PAPERS


def look_background(look: str, base: np.ndarray) -> np.ndarray:
    """The background a look brings, given the scene's own ``[s, s, 3]`` uint8."""
    if look in PAPERS:
        paper = np.full_like(base, PAPERS[look])
        if look == "blueprint":
            paper[::8], paper[:, ::8] = (52, 96, 178), (52, 96, 178)
        return paper
    if look == "pastel":
        return _posterise(base)
    if look == "negative":
        return 255 - base
    if look == "gray":
        return _gray(base)
    return base


def _luminance(rgba: np.ndarray) -> np.ndarray:
    """Luma over white, ``[h, w]`` in 0..1."""
    alpha = rgba[..., 3:] / 255.0
    over_white = rgba[..., :3] / 255.0 * alpha + (1 - alpha)
    return over_white @ LUMA


def _edges(rgba: np.ndarray) -> np.ndarray:
    """Edge strength of luma and alpha, ``[h, w]`` in 0..1."""
    padded = np.pad(np.stack([_luminance(rgba), rgba[..., 3] / 255.0], -1), ((1, 1), (1, 1), (0, 0)), mode="edge")
    padded[[0, -1], :, 1] = padded[:, [0, -1], 1] = 0
    dy, dx = padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2]
    return np.clip(np.hypot(dy, dx).max(-1) * 1.6, 0, 1)


def _with_alpha(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.concatenate([np.clip(rgb, 0, 255).round().astype(np.uint8), alpha[..., None].astype(np.uint8)], -1)


def _mix(amount: np.ndarray, on: tuple[int, int, int], off: tuple[int, int, int]) -> np.ndarray:
    return amount[..., None] * np.array(on) + (1 - amount[..., None]) * np.array(off)


def _pixel(rgba: np.ndarray) -> np.ndarray:
    """12 cells along the longer side, a palette of 12 colours, hard alpha."""
    height, width = rgba.shape[:2]
    scale = 12 / max(height, width)
    small = resize(rgba, max(round(height * scale), 1), max(round(width * scale), 1))
    palette = Image.fromarray(small[..., :3]).quantize(12, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    cells = _with_alpha(np.asarray(palette.convert("RGB")), np.where(small[..., 3] > 110, 255, 0))
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST))


def _blueprint(rgba: np.ndarray) -> np.ndarray:
    return _with_alpha(_mix(_edges(rgba), (240, 246, 255), PAPERS["blueprint"]), rgba[..., 3])


def _neon(rgba: np.ndarray) -> np.ndarray:
    colours = rgba[..., :3].astype(float)
    top, low = colours.max(-1, keepdims=True), colours.min(-1, keepdims=True)
    vivid = np.where(top - low > 24, (colours - low) / np.maximum(top - low, 1) * 255, np.array([90.0, 255.0, 240.0]))
    edges = _edges(rgba)[..., None]
    return _with_alpha(edges * vivid + (1 - edges) * np.array(PAPERS["neon"], float), rgba[..., 3])


def _hatch(rgba: np.ndarray) -> np.ndarray:
    height, width = rgba.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    dark = 1 - _luminance(rgba)
    ink = ((x + y) % 4 < np.clip(dark * 4.2, 0, 3)) * 0.75
    ink = np.maximum(ink, _edges(rgba))
    return _with_alpha(_mix(ink, (92, 56, 24), PAPERS["hatch"]), rgba[..., 3])


def _halftone(rgba: np.ndarray) -> np.ndarray:
    height, width = rgba.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    radius = np.sqrt(np.clip(1 - _luminance(rgba), 0, 1)) * 2.6
    inside = np.clip(radius - np.hypot((x % 4) - 1.5, (y % 4) - 1.5) + 0.5, 0, 1)
    ink = np.maximum(inside, (_edges(rgba) > 0.75) * 0.8)
    return _with_alpha(_mix(ink, (196, 24, 84), PAPERS["halftone"]), rgba[..., 3])


def _posterise(rgb: np.ndarray) -> np.ndarray:
    levels = np.round(rgb / 255.0 * 3) / 3
    return np.clip((0.45 * levels + 0.55) * 255, 0, 255).round().astype(np.uint8)


def _pastel(rgba: np.ndarray) -> np.ndarray:
    return _with_alpha(_posterise(rgba[..., :3]), rgba[..., 3])


def _gray(rgb: np.ndarray) -> np.ndarray:
    return np.repeat((rgb @ LUMA).round().astype(np.uint8)[..., None], 3, -1)


def _ink(rgba: np.ndarray) -> np.ndarray:
    return _with_alpha(_mix(_edges(rgba), (24, 24, 34), PAPERS["ink"]), rgba[..., 3])


def _chalk(rgba: np.ndarray) -> np.ndarray:
    colours = 0.5 * rgba[..., :3] + 0.5 * 255
    amount = np.maximum(_edges(rgba), 0.25 * _luminance(rgba))[..., None]
    return _with_alpha(amount * colours + (1 - amount) * np.array(PAPERS["chalk"], float), rgba[..., 3])


def _silhouette(rgba: np.ndarray) -> np.ndarray:
    return _with_alpha(np.full((*rgba.shape[:2], 3), (38, 36, 52), float), rgba[..., 3])


def _negative(rgba: np.ndarray) -> np.ndarray:
    return _with_alpha(255.0 - rgba[..., :3], rgba[..., 3])


def _monochrome(rgba: np.ndarray) -> np.ndarray:
    return _with_alpha(_gray(rgba[..., :3]).astype(float), rgba[..., 3])


def _woodcut(rgba: np.ndarray) -> np.ndarray:
    dark = np.clip((0.55 - _luminance(rgba)) * 6 + 0.5, 0, 1)
    return _with_alpha(_mix(np.maximum(dark, _edges(rgba) > 0.6), (46, 26, 18), PAPERS["woodcut"]), rgba[..., 3])


def _mosaic(rgba: np.ndarray) -> np.ndarray:
    """Tiles of three pixels, with grout between them."""
    height, width = rgba.shape[:2]
    small = resize(rgba, max(height // 3, 1), max(width // 3, 1))
    tiles = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)).astype(float)
    y, x = np.mgrid[0:height, 0:width]
    grout = ((x % 3 == 2) | (y % 3 == 2))[..., None]
    return _with_alpha(np.where(grout, 0.7 * tiles[..., :3], tiles[..., :3]), np.where(tiles[..., 3] > 110, 255, 0))


def _watercolor(rgba: np.ndarray) -> np.ndarray:
    """Colours run into each other and fade towards the paper; the rim is darker."""
    blurred = Image.fromarray(rgba).convert("RGBa").filter(ImageFilter.BoxBlur(1.6)).convert("RGBA")
    wash = 0.65 * np.asarray(blurred)[..., :3] + 0.35 * np.array(PAPERS["watercolor"], float)
    return _with_alpha(wash * (1 - 0.25 * _edges(rgba)[..., None]), rgba[..., 3])


def _glass(rgba: np.ndarray) -> np.ndarray:
    panes = np.round(rgba[..., :3] / 255.0 * 2) / 2 * 255
    lead = (_edges(rgba) > 0.3)[..., None]
    return _with_alpha(np.where(lead, np.array(PAPERS["glass"], float), panes), rgba[..., 3])


def _heat(rgba: np.ndarray) -> np.ndarray:
    stops = np.array([(20, 12, 110), (170, 20, 130), (240, 90, 30), (255, 240, 90)], float)
    at = _luminance(rgba) * (len(stops) - 1)
    low = np.clip(at.astype(int), 0, len(stops) - 2)
    share = (at - low)[..., None]
    return _with_alpha((1 - share) * stops[low] + share * stops[low + 1], rgba[..., 3])


_LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pixel": _pixel,
    "blueprint": _blueprint,
    "neon": _neon,
    "hatch": _hatch,
    "halftone": _halftone,
    "pastel": _pastel,
    "ink": _ink,
    "chalk": _chalk,
    "silhouette": _silhouette,
    "negative": _negative,
    "gray": _monochrome,
    "woodcut": _woodcut,
    "mosaic": _mosaic,
    "watercolor": _watercolor,
    "glass": _glass,
    "heat": _heat,
}
