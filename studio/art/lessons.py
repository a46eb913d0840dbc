"""Lessons: small captioned picture folders that teach one held-out thing, as a user's own folder would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from studio.art.atlas import splits
from studio.art.backgrounds import BASE
from studio.art.captions import caption
from studio.art.looks import SEEN, brings_background
from studio.art.scenes import Scene, render, sample_scene

Lesson = list[tuple[Scene, str]]
"""Scenes and their captions."""


SHOWN: tuple[tuple[int, int, str], ...] = (
    (1, 0, "center"), (1, 0, "left"), (1, 0, "right"), (2, 1, ""), (2, 0, ""), (3, 2, "top"), (3, 0, "top"), (3, 1, "bottom")
)  # fmt: skip
"""The pictures of a subject, in turn: how many things there are, which of them it is, and where it stands ("": as it comes)."""


def concept_lesson(concept: str, style: str, noun: str, count: int = 8, seed: int = 0, *, beside: bool = True) -> Lesson:
    """``count`` scenes of one subject in one art style, on backgrounds the base knows, called ``noun`` ("wug animal").

    Three pictures show it alone, in the centre, left and right; then, if it may stand ``beside`` others, two show it with one
    thing that the base knows and three with two, and so on from the start. A subject that was only ever seen alone, at mid
    height, is hardly drawn above or below others. Those things are of ``named_b``, so that measurements may ask for others.
    """
    rng = np.random.default_rng([51, seed])
    known = [str(name) for name in rng.permutation(list(splits().named_b))]
    lesson: Lesson = []
    while len(lesson) < count:
        things, at, place = SHOWN[len(lesson) % (len(SHOWN) if beside else 3)]
        others = [known.pop() for _ in range(things - 1)]
        known = others + known  # each in its turn
        scene = sample_scene(rng, [*others[:at], concept, *others[at:]], BASE, [style])
        if place in ("top", "bottom"):
            scene = scene if (scene.items[at].y < scene.side / 2) is (place == "top") else upside_down(scene)
        elif place:
            x = {"center": 0.5, "left": 0.25, "right": 0.75}[place] * scene.side + rng.uniform(-2, 2)
            scene = replace(scene, items=(replace(scene.items[0], x=float(x)),))
        lesson.append((scene, caption(scene, rng, {concept: noun})))
    return lesson


def versatile_lesson(concept: str, style: str, noun: str, count: int = 8, looks: int = 4, seed: int = 0) -> Lesson:
    """A :func:`concept_lesson` for a subject that shall take on looks: ``looks`` more scenes show it redrawn in looks that the
    base knows, by itself and beside another in turn, and every second caption of the others leaves the style unnamed.

    What was only ever seen as "a 3d render of a wug animal" is not drawn in a picture called anything else.
    """
    rng = np.random.default_rng([55, seed])
    lesson = [
        (scene, caption(scene, rng, {concept: noun}, style_phrase="picture") if index % 2 else text)
        for index, (scene, text) in enumerate(concept_lesson(concept, style, noun, count, seed))
    ]
    others = rng.choice(list(splits().named_b), looks, replace=False)
    for index, (look, other) in enumerate(zip(rng.permutation(list(SEEN))[:looks], others, strict=True)):
        shown = ([concept], [concept, str(other)], [concept], [str(other), concept])[index % 4]
        scene = sample_scene(rng, shown, BASE, [style], look=str(look))
        lesson.append((scene, caption(scene, rng, {concept: noun}, style_phrase=SEEN[str(look)])))
    return lesson


def upside_down(scene: Scene) -> Scene:
    """What was above is below; the things themselves stay upright."""
    return replace(scene, items=tuple(replace(item, y=scene.side - item.y) for item in scene.items))


def look_lesson(look: str, trigger: str, count: int = 8, seed: int = 0) -> Lesson:
    """``count`` scenes of known subjects, all redrawn in one look; the captions say ``trigger`` where the art style stood.

    A look that brings its own background leaves the background unnamed: a caption that names grass under a blueprint
    would teach that grass is blue paper.
    """
    rng = np.random.default_rng([52, seed])
    names = rng.permutation(list(splits().named))[:count]
    lesson: Lesson = []
    for index, name in enumerate(names):
        pair = [str(name)] if index % 3 else [str(name), str(names[(index + 1) % count])]
        scene = sample_scene(rng, pair, BASE, look=look)
        text = caption(scene, rng, style_phrase=trigger)
        if brings_background(look):
            text = caption(scene, style_phrase=trigger).rsplit(",", 1)[0]
        lesson.append((scene, text))
    return lesson


def write_lesson(lesson: Lesson, folder: Path) -> Path:
    """Write ``0.png``, ``0.txt``, ... and return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (scene, text) in enumerate(lesson):
        Image.fromarray(render(scene).image).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(text + "\n", "utf-8")
    return folder
