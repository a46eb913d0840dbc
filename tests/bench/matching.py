"""Finding sprites in a picture: a coarse search over the whole bank, then exact scores of the best few.

The score of a template at a place is the weighted zero-mean normalised cross-correlation, in RGB, between the picture and the
sprite *redrawn over the picture's own background* ``B`` there, the background taken off both:

    C = a (T - B),  D = I - B,   score = sum w (C - mean C)(D - mean D) / sqrt(sum w (C - mean C)^2  sum w (D - mean D)^2)

with weight ``w`` = alpha inside and a light ring around it, means per channel, sums over pixels and channels. Without the ring
a flat sprite has nothing to correlate and any flat area fits it; with it the silhouette and the colour against the background
count. A sprite fainter than half its true contrast loses in proportion. This is the *likeness*, by which keys are ranked.

A blur, a half-denoised smear and a blend of two subjects keep most of that correlation. So the subject found is also asked for
its *strength*: how much of its drawing at the scale of eyes and limbs (a band of some 6 to 14 pixels a period) is there, 1 for
a true picture. Its *score* is the likeness, less where the strength falls short.

The coarse search correlates background-subtracted half-resolution pictures with compressed templates of the middle size at
every place, plain and mirrored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from studio.art.scenes import Box
from tests.bench.papers import Paper
from tests.bench.templates import COARSE, SIZES, Bank, CoarseBank, Key, halve, window_side

SHORTLIST = 40
FINALISTS = 12
FLOOR = 0.02
"""Standard deviation (0..1) added to both sides of the correlation: noise this small is nothing."""
FAINT = 0.04
"""Root mean square (0..1) of what is left in the strongest window under which the search ends."""
FULL_GAIN = 0.5
"""Contrast, relative to the true sprite's, from which on the score is not reduced."""
FULL_VIEW = 0.6
"""Part of a sprite's weight that must be on free canvas for its full score: slivers fit anything."""
BAND = (1.5, 3.0)
"""Standard deviations in pixels of the two Gaussians whose difference is the band of :func:`strength`."""
WEAK, STRONG = 0.4, 0.7
"""Strengths up to which nothing of the likeness counts, and from which on all of it does."""
REACH = 8
"""Pixels around a window that the band needs."""
ENERGY = 0.3
"""Share of the strongest window's energy below which the coarse search does not look."""
SPREAD = 0.5
"""Part of the whole window's energy in the coarse norm: keeps thin sprites from fitting a sliver of something else."""
MARGIN = 24
"""Pixels a window may reach beyond the canvas."""
NOTHING = 0.3
"""Below this score a place holds nothing worth naming."""

Start = tuple[int, float, float, int, bool]
"""Where the exact search begins: key, centre y and x in pixels, size index, mirrored."""


@dataclass(frozen=True)
class Finding:
    """One subject found: the best key of the bank at its place.

    ``score``: likeness less missing strength. ``box`` in fractions; ``centre (x, y)`` in fractions; ``size`` in pixels;
    ``rivals``: every key examined there with its best likeness, best first (the first is ``key`` itself).
    """

    key: Key
    score: float
    box: Box
    centre: tuple[float, float]
    size: int
    flip: bool
    top: int
    left: int
    rivals: tuple[tuple[Key, float], ...]

    def likeness(self, key: Key) -> float:
        """How well ``key`` fits there; 0 where it was not examined."""
        return dict(self.rivals).get(key, 0.0)


class Canvas:
    """A picture, its background and the weight of its pixels, padded so that windows may hang over the edge."""

    def __init__(self, picture: Tensor, paper: Tensor) -> None:
        self.height, self.width = picture.shape[:2]
        self.picture, self.paper = picture, paper
        self.free = torch.ones(picture.shape[:2])
        self._layers = _padded(torch.cat([picture - paper, paper], -1))
        self._free = F.pad(self.free, (MARGIN,) * 4)

    def occupy(self, mask: Tensor, top: int, left: int) -> None:
        """Take the pixels of ``mask [N, N]`` (0..1), placed at ``top, left``, out of every later score."""
        side = mask.shape[0]
        grown = F.max_pool2d((mask > 0.3).float()[None, None], 3, 1, 1)[0, 0]
        y, x = top + MARGIN, left + MARGIN
        self._free[y : y + side, x : x + side] *= 1 - grown
        self.free = self._free[MARGIN : MARGIN + self.height, MARGIN : MARGIN + self.width]

    def windows(self, tops: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Subject layer and background ``[..., n n, 3]`` and weight ``[..., n n]`` of windows at ``tops [..., 2]`` (y, x)."""
        row = self._free.shape[1]
        steps = torch.arange(side)
        y = (tops[..., 0] + MARGIN).clamp(0, self._free.shape[0] - side)
        x = (tops[..., 1] + MARGIN).clamp(0, row - side)
        flat = ((y[..., None, None] + steps[:, None]) * row + x[..., None, None] + steps).flatten(-2)
        layers = self._layers.reshape(-1, 6)[flat]
        return layers[..., :3], layers[..., 3:], self._free.reshape(-1)[flat]


def _padded(x: Tensor) -> Tensor:
    return F.pad(x.permute(2, 0, 1)[None], (MARGIN,) * 4, mode="replicate")[0].permute(1, 2, 0).contiguous()


def exact(bank: Bank, canvas: Canvas, size: int, keys: Tensor, flips: Tensor, tops: Tensor) -> Tensor:
    """Scores ``[m, o]`` of ``m`` templates (``keys [m]``, mirrored where ``flips [m]``) at ``o`` places each.

    ``size`` indexes :data:`SIZES`; ``tops [m, o, 2]`` are window corners (y, x) in pixels.
    """
    rgba, weight = bank.rgba[size][keys].float() / 255, bank.weights[size][keys].float() / 255
    if bool(flips.any()):
        rgba[flips], weight[flips] = rgba[flips].flip(2), weight[flips].flip(2)
    subject, paper, free = canvas.windows(tops, rgba.shape[1])
    rgba = rgba.flatten(1, 2)[:, None]
    layer = rgba[..., 3:] * (rgba[..., :3] - paper)
    weight = weight.flatten(1)[:, None]
    seen = (weight * free).sum(-1) / weight.sum(-1)
    return correlation(layer, subject, (weight * free)[..., None]) * (seen / FULL_VIEW).clamp(max=1)


def correlation(drawn: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """The score over the last two axes ``[..., pixels, 3]``; ``weight [..., pixels, 1]``."""
    total = weight.sum(-2).clamp_min(1e-6)
    weighted_d, weighted_i = weight * drawn, weight * image
    mean_d, mean_i = weighted_d.sum(-2) / total, weighted_i.sum(-2) / total
    across = ((weighted_d * image).sum(-2) / total - mean_d * mean_i).mean(-1)
    var_d = ((weighted_d * drawn).sum(-2) / total - mean_d.square()).mean(-1).clamp_min(0)
    var_i = ((weighted_i * image).sum(-2) / total - mean_i.square()).mean(-1).clamp_min(0)
    score = across / ((var_d + FLOOR**2) * (var_i + FLOOR**2)).sqrt()
    gain = across / (var_d + FLOOR**2)
    return score * (gain / FULL_GAIN).clamp(0, 1)


def strength(bank: Bank, canvas: Canvas, best: _Best) -> float:
    """Gain of the sprite's band-passed layer in the picture's, the best over shifts of one pixel.

    With ``b(X)`` = ``X`` smoothed by the first Gaussian of :data:`BAND` less ``X`` smoothed by the second:
    ``sum b(C) b(D) / sum b(C)^2`` over the free pixels of the window. About 1 for a true picture, 0.5 for a blend of halves,
    under 0.4 for a blur of 3 pixels or more. The texture of the background is taken out of the sprite's own pixels first,
    ``C = a (T - m)`` and ``D = I - B + a (B - m)`` with the mean background ``m``: on a checkered ground ``T - B`` looks much
    the same for every ``T``.
    """
    rgba = bank.rgba[best.size][best.key].float() / 255
    weight = bank.weights[best.size][best.key].float() / 255
    if best.flip:
        rgba, weight = rgba.flip(1), weight.flip(1)
    side, wide = len(weight), len(weight) + 2 * REACH
    corner = torch.tensor([best.top, best.left])
    subject, paper, _ = (x.unflatten(0, (wide, wide)) for x in canvas.windows(corner - REACH, wide))
    free = canvas.windows(corner, side)[2].unflatten(0, (side, side))
    inner = slice(REACH, -REACH)
    alpha = F.pad(rgba[..., 3:], (0, 0, *(REACH,) * 4))
    ground = paper[inner, inner].mean((0, 1))
    band = band_passed(alpha * (F.pad(rgba[..., :3], (0, 0, *(REACH,) * 4)) - ground))[inner, inner]
    seen = band_passed(subject + alpha * (paper - ground))
    band = band * (free * (weight > 0))[..., None]
    shifted = [seen[REACH + y : REACH + y + side, REACH + x : REACH + x + side] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(float((band * part).sum()) for part in shifted) / max(float(band.square().sum()), 1e-6)


def band_passed(layer: Tensor) -> Tensor:
    """``[N, N, 3]`` smoothed by the first Gaussian of :data:`BAND` less the same smoothed by the second."""
    offset = torch.arange(len(layer)).float()
    apart = (offset[:, None] - offset).square()
    fine, coarse = (torch.softmax(-apart / (2 * sigma**2), 1) for sigma in BAND)
    x = layer.permute(2, 0, 1)
    return (fine @ x @ fine.T - coarse @ x @ coarse.T).permute(1, 2, 0)


def strict(likeness: float, strength: float) -> float:
    """The score: ``likeness``, less in proportion where ``strength`` lies between :data:`WEAK` and :data:`STRONG`."""
    return likeness * min(max((strength - WEAK) / (STRONG - WEAK), 0.0), 1.0)


def shortlist(bank: Bank, canvas: Canvas, flips: bool, also: Iterable[int]) -> list[Start]:
    """The :data:`SHORTLIST` keys that fit best somewhere in what is left of the picture, and those in ``also``."""
    subject = halve(((canvas.picture - canvas.paper) * canvas.free[..., None])[None])[0]
    if float(F.avg_pool2d(subject.square().mean(-1)[None], bank.coarse[0].side, 1).amax()) < FAINT**2:
        return []
    paper = halve(canvas.paper[None])[0]
    best = torch.full((len(bank.keys),), -1.0)
    centre = torch.zeros(len(bank.keys), 2)
    way = torch.zeros(len(bank.keys), 2, dtype=torch.long)
    for flip in (False, True) if flips else (False,):
        d, b = (subject.flip(1), paper.flip(1)) if flip else (subject, paper)
        for size, coarse in zip(COARSE, bank.coarse, strict=True):
            scores, centres = coarse_scores(coarse, d, b)
            if flip:
                centres[:, 1] = canvas.width - centres[:, 1]
            top, where = scores.max(0)
            better = top > best
            best[better], centre[better], way[better] = top[better], centres[where[better]], torch.tensor([size, int(flip)])
    picked = dict.fromkeys([*best.topk(min(SHORTLIST, len(best))).indices.tolist(), *also])
    return [(key, *centre[key].tolist(), int(way[key, 0]), bool(way[key, 1])) for key in picked]


def coarse_scores(bank: CoarseBank, subject: Tensor, paper: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine between the subject layer ``D`` and every template's layer ``a (T - B)``.

    ``subject, paper [h, w, 3]`` at half resolution -> scores ``[P, K]`` and window centres ``[P, 2]`` (y, x) in full pixels.
    Only places whose window holds a fair part of the strongest window's energy are scored.
    """
    n = bank.side
    reach = n // 2 - 3
    padded = F.pad(subject.permute(2, 0, 1)[None], (reach,) * 4)[0]
    ground = F.pad(paper.permute(2, 0, 1)[None], (reach,) * 4, mode="replicate")[0]
    strength = padded.square().sum(0)
    full = F.avg_pool2d(strength[None], n, 1)[0]
    rows, columns = torch.nonzero(full >= ENERGY * full.max(), as_tuple=True)
    across, own = (_project(x[None], n, bank.weight_basis)[rows, columns] for x in ((padded * ground).sum(0), strength))
    need = _layer_energy(bank, ground, rows, columns)
    have = (1 - SPREAD) * (own @ bank.weight) + SPREAD * n * n * full[rows, columns, None]
    scores = _project(padded, n, bank.colour_basis)[rows, columns] @ bank.colour - across @ bank.alpha
    scores /= need.clamp_min_(0.001 * n * n).mul(have.clamp_min_(0.001 * n * n)).sqrt_()
    return scores, torch.stack([rows, columns], 1).float() * 2 - 2 * reach + n


def _layer_energy(bank: CoarseBank, ground: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``sum (a (T - B))^2`` of every template over background ``ground [3, H, W]`` in the windows asked for: ``[P, K]``.

    A background that only changes downwards (plain, horizon, gradient) needs one window a row.
    """
    n = bank.side
    even = float((ground - ground[..., :1]).abs().max()) < 1e-3
    if even:
        ground, columns = ground[..., :n], torch.zeros_like(columns)
        rows, back = rows.unique(return_inverse=True)
        columns = columns[: len(rows)]
    tinted = _project(ground, n, bank.energy_basis)[rows, columns] @ bank.tinted
    bright = _project(ground.square().sum(0, keepdim=True), n, bank.weight_basis)[rows, columns] @ bank.alpha_squared
    energy = bank.energy - 2 * tinted + bright
    return energy[back] if even else energy


def _project(x: Tensor, n: int, basis: Tensor) -> Tensor:
    """Every ``n x n`` window of ``[C, H, W]`` on ``basis [n n C, q]``: ``[rows, columns, q]``."""
    rows, columns = x.shape[1] - n + 1, x.shape[2] - n + 1
    return (_windows(x, n) @ basis).reshape(rows, columns, -1)


def _windows(x: Tensor, n: int) -> Tensor:
    """All ``n x n`` windows of ``[C, H, W]`` as rows ordered (y, x, channel)."""
    return x.unfold(1, n, 1).unfold(2, n, 1).permute(1, 2, 3, 4, 0).reshape(-1, n * n * x.shape[0])


def offsets(reach: int) -> Tensor:
    """``[(2r+1)^2, 2]`` integer steps around a place."""
    steps = torch.arange(-reach, reach + 1)
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)


@dataclass
class _Best:
    score: float
    key: int
    size: int
    flip: bool
    top: int
    left: int

    @property
    def centre(self) -> tuple[float, float]:
        half = window_side(SIZES[self.size]) / 2
        return self.top + half, self.left + half

    def start(self, size: int | None = None, flip: bool | None = None) -> Start:
        """From here on, at another size or the other way round."""
        return self.key, *self.centre, self.size if size is None else size, self.flip if flip is None else flip


def refine(bank: Bank, canvas: Canvas, starts: Sequence[Start], reach: int) -> list[_Best]:
    """The best place of each start (key, centre y, centre x, size index, flip) within ``reach`` pixels."""
    out: list[_Best | None] = [None] * len(starts)
    for size in dict.fromkeys(start[3] for start in starts):
        rows = [i for i, start in enumerate(starts) if start[3] == size]
        half = window_side(SIZES[size]) / 2
        corners = torch.tensor([[round(starts[i][1] - half), round(starts[i][2] - half)] for i in rows])
        tops = corners[:, None] + offsets(reach)
        keys, flips = torch.tensor([starts[i][0] for i in rows]), torch.tensor([starts[i][4] for i in rows])
        scores, at = exact(bank, canvas, size, keys, flips, tops).max(1)
        for row, i in enumerate(rows):
            top, left = tops[row, at[row]].tolist()
            out[i] = _Best(float(scores[row]), starts[i][0], size, starts[i][4], top, left)
    return [best for best in out if best is not None]


def settle(bank: Bank, canvas: Canvas, shortlist: Sequence[Start], flips: bool) -> list[_Best]:
    """Exact scores of a shortlist, best first, one entry a key.

    The finalists are tried at every size, then both ways round, then one pixel about until nothing improves.
    """
    by_key: dict[int, _Best] = {}

    def keep(found: Iterable[_Best]) -> list[_Best]:
        for best in found:
            if best.key not in by_key or best.score > by_key[best.key].score:
                by_key[best.key] = best
        return sorted(by_key.values(), key=lambda b: -b.score)

    ranked = keep(refine(bank, canvas, shortlist, reach=1))
    ranked = keep(refine(bank, canvas, [b.start(size=i) for b in ranked[:FINALISTS] for i in range(len(SIZES))], reach=1))
    turned = [b.start(flip=not b.flip) for b in ranked[:FINALISTS]] if flips else []
    ranked = keep(refine(bank, canvas, [*turned, *(b.start() for b in ranked[:FINALISTS])], reach=1))
    for _ in range(3):
        before = [(b.key, b.top, b.left) for b in ranked[:3]]
        near = [b.start(size=i) for b in ranked[:3] for i in range(max(b.size - 1, 0), min(b.size + 2, len(SIZES)))]
        ranked = keep(refine(bank, canvas, near, reach=1))
        if before == [(b.key, b.top, b.left) for b in ranked[:3]]:
            break
    return ranked


@torch.no_grad()
def find(
    bank: Bank, picture: Tensor, paper: Paper, also: Iterable[int] = (), limit: int = 3, flips: bool = True
) -> list[Finding]:
    """Up to ``limit`` subjects of ``picture [H, W, 3]`` in 0..1, likest first, each in the residual of those before.

    ``also``: keys (indices) examined at every place whether or not the coarse search favours them.
    """
    canvas = Canvas(picture, paper.pixels)
    also = tuple(also)
    found: list[Finding] = []
    for _ in range(limit):
        ranked = settle(bank, canvas, shortlist(bank, canvas, flips, also), flips)
        if not ranked or ranked[0].score < NOTHING:
            break
        best = ranked[0]
        y, x = best.centre
        size = SIZES[best.size]
        here = [b for b in ranked if abs(b.centre[0] - y) + abs(b.centre[1] - x) < size / 2]
        found.append(_finding(bank, canvas, best, here))
        mask = bank.rgba[best.size][best.key, ..., 3].float() / 255
        canvas.occupy(mask.flip(1) if best.flip else mask, best.top, best.left)
    return found


def _finding(bank: Bank, canvas: Canvas, best: _Best, here: Sequence[_Best]) -> Finding:
    alpha = bank.rgba[best.size][best.key, ..., 3] > 25
    alpha = alpha.flip(1) if best.flip else alpha
    rows, columns = (torch.nonzero(alpha.any(axis)).flatten() + start for axis, start in ((1, best.top), (0, best.left)))
    x0, x1 = int(columns[0]) / canvas.width, (int(columns[-1]) + 1) / canvas.width
    y0, y1 = int(rows[0]) / canvas.height, (int(rows[-1]) + 1) / canvas.height
    return Finding(
        key=bank.keys[best.key],
        score=strict(best.score, strength(bank, canvas, best)),
        box=(max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)),
        centre=((x0 + x1) / 2, (y0 + y1) / 2),
        size=SIZES[best.size],
        flip=best.flip,
        top=best.top,
        left=best.left,
        rivals=tuple((bank.keys[b.key], b.score) for b in here),
    )


def mask_of(bank: Bank, finding: Finding, height: int, width: int) -> Tensor:
    """Alpha ``[height, width]`` in 0..1 of the sprite found."""
    size = SIZES.index(finding.size)
    alpha = bank.rgba[size][bank.index[finding.key], ..., 3].float() / 255
    alpha = alpha.flip(1) if finding.flip else alpha
    side = alpha.shape[0]
    out = torch.zeros(height + 2 * MARGIN, width + 2 * MARGIN)
    out[finding.top + MARGIN : finding.top + MARGIN + side, finding.left + MARGIN : finding.left + MARGIN + side] = alpha
    return out[MARGIN : MARGIN + height, MARGIN : MARGIN + width]
