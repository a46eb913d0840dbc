"""The judge: what a picture shows, where, in which look, and what became of each requested concept.

*Present* means: best over the whole bank at its place, score >= tau, in the right style or look and in the right place. Every
requested concept gets exactly one of **present, confused, vanished, other**; a picture fails when any of them is not present.

    judge = Judge(roundtrip=vae_roundtrip(vae))
    judgement = judge.verdicts(image, [Wanted("frog", "3d", place="left"), Wanted("car", "3d", place="right")])
    judgement.kinds, judgement.fails, judgement.paper.name

A checkout's root must be on ``sys.path``; pytest is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from studio.art.atlas import ACCESSORIES, STYLES, sized
from studio.art.looks import apply_look
from studio.art.scenes import Box, Scene, place_of, wear
from studio.errors import RequestError
from tests.bench.matching import Finding, correlation, find
from tests.bench.papers import Paper, estimate
from tests.bench.templates import AutoEncoder, Bank, Key, RoundTrip, VaeRoundTrip, build_bank, make_keys, window_side

TAU = 0.6
"""Score from which a subject counts as present; set by ``python -m tests.bench.reliability --calibrate``."""
HYBRID = 0.05
"""Two requested concepts whose scores are this close, both below tau, make a hybrid."""
OVERLAP = 0.3
"""Intersection over union from which a subject is in its box."""

Kind = Literal["present", "confused", "vanished", "other"]
Picture = Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Wanted:
    """One requested concept.

    ``style``: art style, ``None`` for any. ``look``: procedural look, ``None`` for the plain drawing. ``place``: ``left``,
    ``right``, ``center``, a box in fractions, or ``None`` for anywhere.
    """

    concept: str
    style: str | None = None
    look: str | None = None
    place: str | Box | None = None
    accessory: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of ``wanted``; ``why`` says it in words, ``finding`` is the subject the verdict rests on."""

    wanted: Wanted
    kind: Kind
    why: str
    finding: Finding | None = None


@dataclass(frozen=True)
class Judgement:
    """All verdicts on one picture, what was found in it and its background."""

    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    paper: Paper

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(verdict.kind for verdict in self.verdicts)

    @property
    def fails(self) -> bool:
        return any(kind != "present" for kind in self.kinds)


class Judge:
    """Judges pictures against a bank of templates.

    Args:
        bank: a ready bank; otherwise one is built of ``names`` (default: the whole atlas) in all styles and ``looks``.
        looks: looks in the bank besides the plain drawings.
        roundtrip: the shipped VAE there and back, see :func:`vae_roundtrip`.
        cache: the folder that keeps templates that went through the VAE (see :func:`build_bank`); default the user's.
        tau: least score of a present subject.
        flips: whether mirrored subjects count.
    """

    def __init__(
        self,
        bank: Bank | None = None,
        names: Iterable[str] | None = None,
        looks: Sequence[str] = (),
        roundtrip: RoundTrip | None = None,
        cache: Path | None = None,
        tau: float = TAU,
        flips: bool = True,
    ) -> None:
        self.bank = bank or build_bank(make_keys(names, looks=(None, *looks)), roundtrip, cache=cache)
        self.tau, self.flips = tau, flips

    @torch.no_grad()
    def findings(self, picture: Picture, wanted: Sequence[Wanted] = (), limit: int = 3) -> tuple[tuple[Finding, ...], Paper]:
        """Subjects of a picture, best first, and its background with the subjects left out."""
        pixels = as_pixels(picture)
        also = [i for i, key in enumerate(self.bank.keys) if any(_asks(want, key) for want in wanted)]
        found = find(self.bank, pixels, estimate(pixels), also, limit, self.flips)
        hidden = torch.zeros(pixels.shape[:2])
        for finding in found:
            x0, y0, x1, y1 = (round(f * s) for f, s in zip(finding.box, (*hidden.shape[::-1],) * 2, strict=True))
            hidden[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = 1
        return tuple(found), estimate(pixels, hidden if float(hidden.mean()) < 0.8 else None)

    def verdicts(self, picture: Picture, request: Sequence[Wanted] | Scene) -> Judgement:
        """What became of each requested concept.

        Raises:
            RequestError: a requested concept or look is not in the bank.
        """
        wanted = wanted_of(request) if isinstance(request, Scene) else tuple(request)
        for want in wanted:
            if not any(_asks(want, key) for key in self.bank.keys):
                raise RequestError(f"the judge's bank has no '{want.concept}' in style {want.style}, look {want.look}: add it")
        found, paper = self.findings(picture, wanted, limit=max(3, len(wanted) + 1))
        return Judgement(decide(self.bank, found, wanted, self.tau), found, paper)

    def again(self, judgement: Judgement, wanted: Sequence[Wanted], tau: float | None = None) -> Judgement:
        """The same findings judged against another request or tau, without looking anew."""
        verdicts = decide(self.bank, judgement.findings, wanted, self.tau if tau is None else tau)
        return Judgement(verdicts, judgement.findings, judgement.paper)

    def accessory(self, picture: Picture, finding: Finding) -> str | None:
        """The accessory the subject of ``finding`` wears, ``None`` for none."""
        pixels = as_pixels(picture)
        paper = estimate(pixels).pixels
        scores = {name: _worn_score(pixels, paper, finding, name) for name in (None, *ACCESSORIES)}
        return max(scores, key=lambda name: scores[name])


def as_pixels(picture: Picture) -> Tensor:
    """Any picture as ``[H, W, 3]`` float in 0..1.

    Raises:
        RequestError: not a square RGB picture of 32 to 256 pixels.
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    pixels = torch.from_numpy(picture.copy()) if isinstance(picture, np.ndarray) else picture.detach()
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[-1] != 3:
        pixels = pixels.permute(1, 2, 0)
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.shape[0] != pixels.shape[1] or not 32 <= len(pixels) <= 256:
        raise RequestError(f"the judge takes square RGB pictures of 32 to 256 pixels, not {tuple(pixels.shape)}")
    return pixels.clamp(0, 1)


def wanted_of(scene: Scene) -> tuple[Wanted, ...]:
    """What a scene's caption asks for."""
    return tuple(
        Wanted(item.concept, None if scene.look else item.style, scene.look, place_of(item, scene.side), item.accessory)
        for item in scene.items
    )


def vae_roundtrip(vae: AutoEncoder) -> VaeRoundTrip:
    """The shipped VAE there and back, for the judge's templates."""
    return VaeRoundTrip(vae)


def _asks(want: Wanted, key: Key) -> bool:
    """Whether ``key`` is a drawing that ``want`` would accept."""
    return key.concept == want.concept and key.look == want.look and want.style in (None, key.style)


def _is(bank: Bank, want: Wanted, key: Key, any_look: bool = False) -> bool:
    """Whether ``key`` shows the wanted concept, or a drawing nobody could tell from it; ``any_look``: in whatever look."""
    accepted = tuple(STYLES) if any_look or want.style is None else (want.style,)
    look = key.look if any_look else want.look
    return any(bank.same(Key(want.concept, style, look), key) for style in accepted)


def in_place(finding: Finding, place: str | Box | None) -> bool:
    """Whether a subject stands where asked: its centre in the half, or overlap >= .3 with the box."""
    if place is None:
        return True
    if isinstance(place, str):
        low, high = {"left": (-1.0, 0.5), "right": (0.5, 2.0), "center": (0.25, 0.75)}[place]
        return low <= finding.centre[0] <= high
    return overlap(finding.box, place) >= OVERLAP


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def decide(bank: Bank, found: Sequence[Finding], wanted: Sequence[Wanted], tau: float) -> tuple[Verdict, ...]:
    """The verdict on each wanted concept; a subject serves at most one of them."""
    solid = [finding for finding in found if finding.score >= tau]
    serving: dict[int, Finding] = {}
    for i, want in enumerate(wanted):
        for finding in solid:
            taken = any(finding is other for other in serving.values())
            if not taken and _is(bank, want, finding.key) and in_place(finding, want.place):
                serving[i] = finding
                break
    return tuple(
        Verdict(want, "present", f"{_name(serving[i])}", serving[i])
        if i in serving
        else _missing(bank, i, want, wanted, found, solid, serving, tau)
        for i, want in enumerate(wanted)
    )


def _missing(
    bank: Bank,
    index: int,
    want: Wanted,
    wanted: Sequence[Wanted],
    found: Sequence[Finding],
    solid: Sequence[Finding],
    serving: dict[int, Finding],
    tau: float,
) -> Verdict:
    """Why a wanted concept is not present: confused, vanished or other."""
    rivals = [other for i, other in enumerate(wanted) if i != index]
    spare = [f for f in solid if not any(f is s for s in serving.values())]
    here = [f for f in spare if in_place(f, want.place)]
    for finding in here:
        if any(_is(bank, other, finding.key, any_look=True) for other in rivals):
            return Verdict(want, "confused", f"{_name(finding)} stands in its place", finding)
        if _is(bank, want, finding.key, any_look=True) and any(_dress(other) == _dress_of(finding, other) for other in rivals):
            return Verdict(want, "confused", f"has the look of another: {_name(finding)}", finding)
    for other in rivals:
        twice = [f for f in solid if _is(bank, other, f.key, any_look=True)]
        if len(twice) > 1:
            return Verdict(want, "confused", f"{other.concept} twice instead", twice[1])
    for finding in found:
        if finding.score < tau and in_place(finding, want.place) and _hybrid(bank, finding, want, rivals):
            return Verdict(want, "confused", f"a hybrid: {_names(finding)}", finding)
    strayed = [f for f in spare if _is(bank, want, f.key, any_look=True)]
    rest = here or strayed
    if rest:
        return Verdict(want, "other", f"found {_name(rest[0])} at x {rest[0].centre[0]:.2f}", rest[0])
    return Verdict(want, "vanished", "nothing there")


def _dress(want: Wanted) -> tuple[str | None, str | None]:
    return want.style, want.look


def _dress_of(finding: Finding, like: Wanted) -> tuple[str | None, str | None]:
    """Style and look of a finding, the style left out where ``like`` does not ask for one."""
    return finding.key.style if like.style else None, finding.key.look


def _hybrid(bank: Bank, finding: Finding, want: Wanted, rivals: Sequence[Wanted]) -> bool:
    """The two best concepts at a place are both requested and within :data:`HYBRID`, ``want`` among them."""
    best: list[tuple[Key, float]] = []
    for key, score in finding.rivals:
        if not any(key.concept == seen.concept or bank.same(seen, key) for seen, _ in best):
            best.append((key, score))
        if len(best) == 2:
            break
    if len(best) < 2 or best[0][1] - best[1][1] > HYBRID:
        return False
    pairs = ((best[0][0], best[1][0]), (best[1][0], best[0][0]))
    return any(_is(bank, want, a, True) and any(_is(bank, other, b, True) for other in rivals) for a, b in pairs)


def _name(finding: Finding) -> str:
    key = finding.key
    return f"{key.concept} ({key.look or key.style}, {finding.score:.2f})"


def _names(finding: Finding) -> str:
    return " / ".join(f"{key.concept} {score:.2f}" for key, score in finding.rivals[:2])


def _worn_score(pixels: Tensor, paper: Tensor, finding: Finding, accessory: str | None) -> float:
    """Correlation of the picture with the found subject redrawn with ``accessory`` on, where one could be."""
    plain = sized(finding.key.concept, finding.key.style, finding.size)
    height, width = plain.shape[:2]
    side = window_side(finding.size)
    top, left = finding.top + (side - height) // 2, finding.left + (side - width) // 2
    art = wear(plain, accessory, finding.key.style) if accessory else plain
    if finding.key.look:
        art = apply_look(finding.key.look, art)
    if finding.flip:
        art = art[:, ::-1]
    layer = torch.zeros(pixels.shape[0] + 96, pixels.shape[1] + 96, 4)
    y, x = top - (art.shape[0] - height) + 48, left - (art.shape[1] - width) // 2 + 48
    layer[y : y + art.shape[0], x : x + art.shape[1]] = torch.from_numpy(art.copy()).float() / 255
    layer = layer[48:-48, 48:-48]
    y0, y1 = max(top - height, 0), min(top + height, pixels.shape[0])
    x0, x1 = max(left - 3, 0), min(left + width + 3, pixels.shape[1])
    drawn = layer[..., 3:] * (layer[..., :3] - paper)
    region = (slice(y0, y1), slice(x0, x1))
    weight = torch.ones(y1 - y0, x1 - x0, 1).flatten(0, 1)
    return float(correlation(drawn[region].flatten(0, 1), (pixels - paper)[region].flatten(0, 1), weight))
