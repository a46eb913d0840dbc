"""Captions: from a scene to words, with synonyms and free word order.

A place may stand before or after its noun, half and half: a causal text encoder's noun cannot see a place that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from studio.art.atlas import STYLES, concepts, splits
from studio.art.backgrounds import PHRASES
from studio.art.looks import PHRASES as LOOKS
from studio.art.scenes import Placement, Scene, place_of
from studio.prompts import article

SYNONYM_RATE = 0.3
#: Where a subject stands, in words; the one in the centre needs none.
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
ONSETS = (
    "b", "bl", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m",
    "n", "p", "pl", "qu", "r", "s", "sk", "t", "tr", "v", "w", "y", "z",
)  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "rn", "sk", "t", "v", "x", "z")


def plain_noun(concept: str) -> str:
    """What the base model calls a concept: the name of a named one, the class word of any other."""
    return concept if concept in splits().named else concepts()[concept].class_word


def random_noun(concept: str, rng: np.random.Generator) -> str:
    """As :func:`plain_noun`, with a synonym :data:`SYNONYM_RATE` of the time."""
    synonyms = concepts()[concept].synonyms
    if synonyms and concept in splits().named and rng.random() < SYNONYM_RATE:
        return str(rng.choice(list(synonyms)))
    return plain_noun(concept)


@cache
def words() -> frozenset[str]:
    """Every word that names something in this world."""
    named = concepts()
    texts = [*PLACES.values(), *(phrase for style in STYLES.values() for phrase in style), *LOOKS.values(), *PHRASES.values()]
    texts += [*named, *(c.class_word for c in named.values()), *(s for c in named.values() for s in c.synonyms)]
    return frozenset(word for text in texts for word in text.lower().replace("-", " ").split())


def made_up_word(rng: np.random.Generator) -> str:
    """A word of one or two syllables that names nothing, like the triggers people choose."""
    while True:
        syllables = 2 if rng.random() < 0.3 else 1
        word = "".join(str(rng.choice(part)) for _ in range(syllables) for part in (ONSETS, VOWELS, CODAS))
        if len(word) > 2 and word not in words():
            return word


def caption(
    scene: Scene,
    rng: np.random.Generator | None = None,
    nouns: Mapping[str, str] | None = None,
    style_phrase: str | None = None,
    drop: float = 0.0,
) -> str:
    """Words for ``scene``.

    Args:
        rng: chooses wording; without it the plain form is used, e.g.
            ``a 3d render of a frog on the left and a car on the right, blue background``.
        nouns: concept -> noun phrase (``"sks animal"``) for subjects the base does not know.
        style_phrase: replaces the art style's own phrase, e.g. the trigger of a look.
        drop: with ``rng``, the chance that the style goes unnamed, and the same for the background.
    """
    phrases = STYLES[scene.items[0].style]
    style: str | None = style_phrase or (str(rng.choice(list(phrases))) if rng else phrases[0])
    background: str | None = PHRASES[scene.background]
    if rng and drop:
        style = None if rng.random() < drop else style
        background = None if rng.random() < drop else background
    return compose_caption([_subject(item, scene, rng, nouns) for item in scene.items], style, background, rng)


def _subject(
    item: Placement, scene: Scene, rng: np.random.Generator | None, nouns: Mapping[str, str] | None
) -> tuple[str, str]:
    if nouns and item.concept in nouns:
        noun = nouns[item.concept]
    else:
        noun = random_noun(item.concept, rng) if rng else plain_noun(item.concept)
    place = place_of(item, scene.side) if scene.side >= 48 else "center"
    if place == "center" and len(scene.items) == 3 and rng and rng.random() < 0.5:
        place = "top" if item.y < scene.side / 2 else "bottom"
    return article(noun), place


def compose_caption(
    subjects: list[tuple[str, str]],
    style: str | None,
    background: str | None,
    rng: np.random.Generator | None = None,
    *,
    place_first: bool | None = None,
) -> str:
    """Put ``(noun phrase, place)`` pairs, a style and a background phrase (either may be left out) into one sentence.

    Args:
        rng: draws whether places stand before their nouns, and the background before all; None: neither does.
        place_first: not drawn, but so.
    """
    before: Callable[[], bool] = (lambda: bool(rng.random() < 0.5)) if rng else (lambda: False)
    place_first = before() if place_first is None else place_first
    parts = []
    for noun, place in subjects:
        where = PLACES.get(place)
        parts.append(noun if where is None else f"{where} {noun}" if place_first else f"{noun} {where}")
    picture = " and ".join(parts)
    if style:
        placed_first = place_first and any(place != "center" for _, place in subjects)
        picture = f"{article(style)}{',' if placed_first else ' of'} {picture}"
    if not background:
        return picture
    return f"{background}, {picture}" if before() else f"{picture}, {background}"
