"""Which scenes the base model is trained on, and how often each part of the world is seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from studio.art.atlas import splits
from studio.art.backgrounds import BASE
from studio.art.captions import caption
from studio.art.scenes import SIDE, Scene, sample_scene


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Shares of the subjects and of pairs. What is left of the first two shares goes to subjects known by class word only."""

    named_a: float = 0.55
    named_b: float = 0.25
    pairs: float = 0.5
    drop: float = 0.08
    side: int = SIDE


def subject(rng: np.random.Generator, mixture: Mixture) -> str:
    u = rng.random()
    names = (
        splits().named_a if u < mixture.named_a
        else splits().named_b if u < mixture.named_a + mixture.named_b
        else splits().class_seen
    )  # fmt: skip
    return names[rng.integers(len(names))]


def sample(rng: np.random.Generator, mixture: Mixture) -> tuple[Scene, str]:
    """One training scene and its caption. The two subjects of a pair differ."""
    first = subject(rng, mixture)
    names = [first]
    if mixture.side >= 48 and rng.random() < mixture.pairs:
        second = subject(rng, mixture)
        while second == first:
            second = subject(rng, mixture)
        names.append(second)
    scene = sample_scene(rng, names, BASE, side=mixture.side)
    return scene, caption(scene, rng, drop=mixture.drop)
