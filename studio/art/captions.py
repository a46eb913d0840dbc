"""Captions: from a scene to words, with synonyms and free word order.

A place may stand before or after its noun, half and half: a causal text encoder's noun cannot see a place that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from studio.art.atlas import STYLES, concepts, splits
from studio.art.backgrounds import PHRASES
from studio.art.scenes import Placement, Scene, place_of

SYNONYM_RATE = 0.3


def article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def plain_noun(concept: str) -> str:
    """What the base model calls a concept: the name of a named one, the class word of any other."""
    return concept if concept in splits().named else concepts()[concept].class_word


def random_noun(concept: str, rng: np.random.Generator) -> str:
    """As :func:`plain_noun`, with a synonym :data:`SYNONYM_RATE` of the time."""
    synonyms = concepts()[concept].synonyms
    if synonyms and concept in splits().named and rng.random() < SYNONYM_RATE:
        return str(rng.choice(list(synonyms)))
    return plain_noun(concept)


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
        where = f"on the {place}"
        parts.append(noun if place == "center" else f"{where} {noun}" if place_first else f"{noun} {where}")
    picture = " and ".join(parts)
    if style:
        placed_first = place_first and any(place != "center" for _, place in subjects)
        picture = f"{article(style)}{',' if placed_first else ' of'} {picture}"
    if not background:
        return picture
    return f"{background}, {picture}" if before() else f"{picture}, {background}"
