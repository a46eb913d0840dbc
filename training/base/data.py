"""Which scenes the base model is trained on, and how often each part of the world is seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from studio.art.atlas import splits
from studio.art.backgrounds import BASE
from studio.art.captions import caption, made_up_word, random_noun
from studio.art.looks import BASE as LOOKS
from studio.art.looks import SEEN
from studio.art.scenes import SIDE, Scene, sample_scene


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Shares of the subjects, of pairs and triples, and of looks.

    What is left of the first two shares goes to subjects known by class word only, of ``pairs`` and ``triples`` to single ones.
    ``made_up`` of the nouns stand behind a word that means nothing, as in "a zarn animal": otherwise a prompt with triggers
    is longer than any the base has seen with as many subjects, and it draws one more.
    """

    named_a: float = 0.55
    named_b: float = 0.25
    pairs: float = 0.5
    triples: float = 0.0
    looks: float = 0.0
    made_up: float = 0.0
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


def random_look(rng: np.random.Generator, share: float) -> str | None:
    """One of the looks the base may see, ``share`` of the time."""
    return LOOKS[rng.integers(len(LOOKS))] if share and rng.random() < share else None


def sample(rng: np.random.Generator, mixture: Mixture) -> tuple[Scene, str]:
    """One training scene and its caption. No subject is in it twice."""
    count = 1
    if mixture.side >= 48:
        u = rng.random()
        count = 2 if u < mixture.pairs else 3 if u < mixture.pairs + mixture.triples else 1
    names: list[str] = []
    while len(names) < count:
        name = subject(rng, mixture)
        if name not in names:
            names.append(name)
    look = random_look(rng, mixture.looks)
    scene = sample_scene(rng, names, BASE, look=look, side=mixture.side)
    called = [name for name in names if mixture.made_up and rng.random() < mixture.made_up]
    nouns = {name: f"{made_up_word(rng)} {random_noun(name, rng)}" for name in called}
    return scene, caption(scene, rng, nouns, style_phrase=look and SEEN[look], drop=mixture.drop)
