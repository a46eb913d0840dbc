"""How far the judge can be trusted: recall on true pictures, false presence on pictures without the concept.

    python -m tests.bench.reliability --vae assets/base/vae --n 200            # the table
    python -m tests.bench.reliability --vae assets/base/vae --n 200 --calibrate
    python -m tests.bench.reliability --vae assets/base/vae --n 20 --look all --every 24    # clean and decoded

Tau is fixed on one half of the concepts (``--calibrate``), the table is measured on the other. True pictures: at least 99 % of
the subjects must be present on clean renders, 97 % after the VAE, 95 % after the VAE and noise, blur or a shift of colour.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from studio.art.atlas import concepts
from studio.art.backgrounds import BASE, HELDOUT, background
from studio.art.looks import HELDOUT as LOOKS
from studio.art.scenes import Placement, Scene, mirrored, render, sample_scene
from tests.bench.judge import TAU, Judge, Wanted, vae_roundtrip, wanted_of
from tests.bench.statistics import Rate, rate
from tests.bench.templates import RoundTrip, groups

BARS = {"clean": 0.99, "decoded": 0.97, "decoded + noise": 0.95, "decoded + blur": 0.95, "decoded + colour": 0.95}
FALSE_PRESENCE = 0.01


@dataclass(frozen=True)
class Sample:
    """A picture ``[H, W, 3]`` in 0..1 and what a request for it would be."""

    picture: Tensor
    wanted: tuple[Wanted, ...]
    background: str


def split_names(calibrate: bool, every: int = 1) -> tuple[str, ...]:
    """Every second concept for fixing tau, the others for the table; ``every``: of every so manieth concept only."""
    return tuple(concepts())[::every][0 if calibrate else 1 :: 2]


def true_scene(rng: np.random.Generator, names: Sequence[str], count: int, look: str | None = None) -> Scene:
    """A random scene of ``count`` subjects on any background, mirrored half of the time."""
    scene = sample_scene(rng, [str(x) for x in rng.choice(names, count, replace=False)], BASE + HELDOUT, look=look)
    return mirrored(scene) if rng.random() < 0.5 else scene


def pixels_of(scene: Scene) -> Tensor:
    return torch.from_numpy(render(scene).image.copy()).float() / 255


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``[H, W, 3]``."""
    reach = int(3 * sigma) + 1
    kernel = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    x = F.pad(picture.permute(2, 0, 1)[None], (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return x[0].permute(1, 2, 0)


def decoded(picture: Tensor, roundtrip: RoundTrip | None) -> Tensor:
    """Through the VAE; without one a light blur stands in."""
    if roundtrip is None:
        return blurred(picture, 0.7)
    return roundtrip(picture.permute(2, 0, 1)[None])[0].permute(1, 2, 0)


def noisy(picture: Tensor, rng: np.random.Generator, sigma: float) -> Tensor:
    return (picture + sigma * torch.from_numpy(rng.standard_normal(picture.shape, np.float32))).clamp(0, 1)


def recoloured(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Gain 0.85..1.15 and shift -0.05..0.05 in each channel."""
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, 3)).float()
    return (picture * gain + torch.from_numpy(rng.uniform(-0.05, 0.05, 3)).float()).clamp(0, 1)


def true_samples(
    kind: str, n: int, names: Sequence[str], roundtrip: RoundTrip | None, seed: int, look: str | None = None
) -> list[Sample]:
    """``n`` pictures with their subjects, singles and pairs in turn, degraded as ``kind`` (a key of :data:`BARS`) says."""
    rng = np.random.default_rng([seed, 1])
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda x: x,
        "decoded": lambda x: decoded(x, roundtrip),
        "decoded + noise": lambda x: noisy(decoded(x, roundtrip), rng, 0.05),
        "decoded + blur": lambda x: blurred(decoded(x, roundtrip), 0.8),
        "decoded + colour": lambda x: recoloured(decoded(x, roundtrip), rng),
    }
    samples = []
    for i in range(n):
        scene = true_scene(rng, names, 1 + i % 2, look)
        samples.append(Sample(change[kind](pixels_of(scene)), wanted_of(scene), scene.background))
    return samples


def counterpart(item: Placement, ground: str, names: Sequence[str], rng: np.random.Generator) -> Placement:
    """What to blend ``item`` with: another concept of like weight and unlike drawing in the same place.

    The blend with a pale or small subject is a picture of ``item``, only lighter, and the blend with its own likeness is no
    blend: a person names both. So the two layers (picture less background) must have energies within a factor of two and a
    cosine under 0.3. Without such a concept among ``names`` the least unlike of them is taken.
    """
    plain = pixels_of(Scene((), ground))
    mine = (pixels_of(Scene((item,), ground)) - plain).flatten()
    best, least = item, math.inf
    for name in rng.permutation([name for name in names if name != item.concept]):
        other = replace(item, concept=str(name))
        layer = (pixels_of(Scene((other,), ground)) - plain).flatten()
        apart = abs(math.log2(max(float(layer.square().sum() / mine.square().sum()), 1e-6)))
        alike = float(F.cosine_similarity(mine, layer, dim=0))
        misfit = max(apart, alike / 0.3)
        if misfit < least:
            best, least = other, misfit
        if least <= 1:
            break
    return best


ABSENT = ("blank", "noise", "blurred", "half-denoised", "blend", "other concepts")


def absent_samples(kind: str, n: int, names: Sequence[str], roundtrip: RoundTrip | None, seed: int) -> list[Sample]:
    """``n`` pictures that do not show what is asked for.

    *Blurred* by 3 to 5 pixels; *half-denoised*: blurred by 2.5 pixels, noise of 0.1 to 0.3 added, through the VAE; a *blend* is
    half one subject and half another in the same place, see :func:`counterpart`. Nobody can name what is blurred or half-
    denoised like this. In a blend one can often guess; but neither subject is drawn, and both shine through each other.
    """
    rng = np.random.default_rng([seed, 2])
    samples = []
    for i in range(n):
        scene = true_scene(rng, names, 1 + i % 2)
        wanted = wanted_of(scene)
        picture = pixels_of(scene)
        if kind == "blank":
            picture = decoded(torch.from_numpy(background(scene.background, scene.side).copy()).float() / 255, roundtrip)
        elif kind == "noise":
            picture = noisy(torch.full_like(picture, 0.5), rng, float(rng.uniform(0.1, 0.5)))
        elif kind == "blurred":
            picture = blurred(picture, float(rng.uniform(3, 5)))
        elif kind == "half-denoised":
            picture = decoded(noisy(blurred(picture, 2.5), rng, float(rng.uniform(0.1, 0.3))), roundtrip)
        elif kind == "blend":
            other = Scene(tuple(counterpart(item, scene.background, names, rng) for item in scene.items), scene.background)
            picture = decoded(0.5 * picture + 0.5 * pixels_of(other), roundtrip)
            wanted = (*wanted, *wanted_of(other))
        elif kind == "other concepts":
            picture = decoded(picture, roundtrip)
            shown = {w.concept for w in wanted}
            unshown = [name for name in names if name not in shown]
            wanted = tuple(Wanted(str(rng.choice(unshown)), w.style, None, w.place) for w in wanted)
        else:
            raise ValueError(f"unknown kind '{kind}': one of {', '.join(ABSENT)}")
        samples.append(Sample(picture, wanted, scene.background))
    return samples


def presence_scores(judge: Judge, samples: Sequence[Sample]) -> list[float]:
    """Per picture the highest tau at which a requested concept would still count as present; 0 when none ever would."""
    out = []
    for sample in samples:
        judgement = judge.verdicts(sample.picture, sample.wanted)
        singly = [judge.again(judgement, [want], tau=0.0).verdicts[0] for want in sample.wanted]
        out.append(max((v.finding.score for v in singly if v.kind == "present" and v.finding), default=0.0))
    return out


def recall(judge: Judge, samples: Sequence[Sample]) -> tuple[Rate, Rate, Rate]:
    """Shares of subjects present, of subjects present in any style, and of right backgrounds."""
    strict, loose, papers = [], [], []
    for sample in samples:
        judgement = judge.verdicts(sample.picture, sample.wanted)
        strict += [kind == "present" for kind in judgement.kinds]
        anywhere = [Wanted(want.concept, None, want.look, want.place) for want in sample.wanted]
        loose += [kind == "present" for kind in judge.again(judgement, anywhere).kinds]
        papers.append(judgement.paper.name in (sample.background, None))
    return rate(strict), rate(loose), rate(papers)


def calibrate(judge: Judge, n: int, roundtrip: RoundTrip | None, seed: int = 1) -> dict[str, float]:
    """For each kind of absent picture the tau with false presence <= 1 %, and ``all``: the same over all kinds together."""
    names = split_names(calibrate=True)
    scores = {kind: presence_scores(judge, absent_samples(kind, n, names, roundtrip, seed)) for kind in ABSENT}
    together = [score for values in scores.values() for score in values]
    return {kind: float(np.quantile(v, 1 - FALSE_PRESENCE)) for kind, v in {**scores, "all": together}.items()}


def absent_table(
    judge: Judge, n: int, names: Sequence[str], roundtrip: RoundTrip | None, seed: int, say: Callable[[str], None] = print
) -> dict[str, float]:
    """False presence on each kind of absent picture and on ``all`` together."""
    false = {
        kind: [score >= judge.tau for score in presence_scores(judge, absent_samples(kind, n, names, roundtrip, seed))]
        for kind in ABSENT
    }
    rates = {kind: rate(hits) for kind, hits in {**false, "all": [*chain(*false.values())]}.items()}
    for kind, found in rates.items():
        say(f"false presence on {kind:18s} {found}")
    return {f"false presence, {kind}": found.value for kind, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, help="diffusers AutoencoderKL folder; without it a light blur stands in")
    parser.add_argument("--n", type=int, default=200, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tau", type=float, default=TAU)
    parser.add_argument("--look", choices=(*LOOKS, "all"), help="procedural looks to measure instead of the art styles")
    parser.add_argument("--every", type=int, default=1, help="a smaller bank: only every so manieth concept of the atlas")
    parser.add_argument("--calibrate", action="store_true", help="print tau per kind of absent picture and stop")
    parser.add_argument("--cache", type=Path, help="folder for templates that went through the VAE (default: the user's cache)")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    given = parser.parse_args()
    roundtrip = None
    if given.vae:
        from diffusers import AutoencoderKL

        roundtrip = vae_roundtrip(AutoencoderKL.from_pretrained(given.vae, local_files_only=True).eval())
    looks = tuple(LOOKS) if given.look == "all" else (given.look,) if given.look else ()
    judge = Judge(roundtrip=roundtrip, cache=given.cache, tau=given.tau, looks=looks, names=tuple(concepts())[:: given.every])
    for group in groups(judge.bank.equivalents):
        print("one drawing:", " = ".join(f"{name} ({style})" for name, style in group))
    numbers: dict[str, object] = {"tau": given.tau, "n": given.n}
    if given.calibrate:
        numbers["calibration"] = calibrate(judge, given.n, roundtrip, given.seed)
        print(json.dumps(numbers, indent=1))
    else:
        names = split_names(calibrate=False, every=given.every)
        for look in looks or (None,):
            for kind, bar in list(BARS.items())[: 2 if look else None]:
                strict, loose, papers = recall(judge, true_samples(kind, given.n, names, roundtrip, given.seed, look))
                numbers[f"{look} {kind}" if look else kind] = [strict.value, loose.value, papers.value]
                title = f"{look or '':10s}{kind:18s}"
                print(f"{title} present {strict}  bar {100 * bar:.0f} %  | any style {loose} | background {papers}", flush=True)
        numbers |= absent_table(judge, given.n, names, roundtrip, given.seed) if not looks else {}
    if given.out:
        given.out.write_text(json.dumps(numbers, indent=1), "utf-8")


if __name__ == "__main__":
    main()
