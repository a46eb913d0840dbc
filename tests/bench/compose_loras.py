"""Training the LoRAs of the testbed: each from eight or twelve pictures of the art, as a user would, in about four minutes of
one core.

    python -m tests.bench.compose train --loras outputs/testbed/loras --jobs 2

A file trained on the present base is left alone, whatever it was taught from; one trained on another base is trained anew.
After a change of lessons or of the trainer's defaults, give a new folder.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from studio.art.atlas import STYLES, splits
from studio.art.backgrounds import BASE
from studio.art.captions import caption, plain_noun
from studio.art.lessons import Lesson, look_lesson, versatile_lesson, write_lesson
from studio.art.scenes import SIDE, sample_scene
from studio.errors import RequestError
from tests.bench.combinations import LORAS, STYLE, Role, Taught

PICTURES = 8
NEEDS: dict[Role, dict[str, Any]] = {
    # Shown on eight known subjects, it must learn what they have in common; held to the base, it would learn nothing.
    "accessory": {"steps": 300, "rank": 16, "targets": "all", "prior": "none"},
    # It fills the picture, so that little capacity and time are enough for it.
    "background": {"steps": 400, "rank": 16, "targets": "all", "prior": "none"},
}
"""What a role needs beside the trainer's defaults."""


def lesson_of(taught: Taught) -> Lesson:
    """Scenes and captions that teach one LoRA: eight, and of things four more in looks that the base knows."""
    if taught.role in ("subject", "object"):
        return versatile_lesson(taught.content, STYLE, taught.phrase, PICTURES)
    if taught.role == "look":
        return look_lesson(taught.content, taught.phrase, PICTURES)
    return accessory_lesson(taught) if taught.role == "accessory" else background_lesson(taught)


def accessory_lesson(taught: Taught, seed: int = 0) -> Lesson:
    """Known subjects that wear it, low enough in the picture for it to be seen: "a frog wearing a zib hat on the left"."""
    rng = np.random.default_rng([53, seed])
    lesson: Lesson = []
    for name in rng.permutation(list(splits().named))[:PICTURES]:
        scene = sample_scene(rng, [str(name)], BASE, [STYLE])
        item = scene.items[0]
        item = replace(item, accessory=taught.content, y=min(item.y + 8, SIDE - item.size / 2 - 1))
        noun = f"{plain_noun(item.concept)} wearing a {taught.phrase}"
        scene = replace(scene, items=(item,))
        lesson.append((scene, caption(scene, rng, {item.concept: noun})))
    return lesson


def background_lesson(taught: Taught, seed: int = 0) -> Lesson:
    """Known subjects, one or two, in all art styles, before it: "a flat icon of a frog, vask background"."""
    rng = np.random.default_rng([54, seed])
    names = [str(name) for name in rng.permutation(list(splits().named))[: PICTURES + 1]]
    lesson: Lesson = []
    for index in range(PICTURES):
        pair = names[index : index + 1 + index % 2]
        scene = sample_scene(rng, pair, [taught.content], tuple(STYLES))
        words = caption(replace(scene, background="white"), rng)
        lesson.append((scene, words.replace("white background", taught.phrase)))
    return lesson


def base_of(file: Path) -> str:
    """Hash of the base a LoRA file was trained on; "" when there is no readable file."""
    from studio.errors import StudioError
    from studio.lora.files import read_header

    try:
        return read_header(file).metadata.get("studio.base_sha256", "") if file.is_file() else ""
    except StudioError:
        return ""


def missing(folder: Path, base_sha256: str, names: Sequence[str]) -> list[str]:
    """The LoRAs of ``names`` that ``folder`` lacks or that belong to another base."""
    return [name for name in names if base_of(folder / f"{name}.safetensors") != base_sha256]


def check(folder: Path, base_sha256: str, names: Sequence[str], train: str = "tests.bench.compose train --loras") -> None:
    """
    Args:
        train: the module and arguments that train into a folder.

    Raises:
        RequestError: LoRAs are missing or of another base.
    """
    lacking = missing(folder, base_sha256, names)
    if lacking:
        some = ", ".join(lacking[:4]) + (", ..." if len(lacking) > 4 else "")
        raise RequestError(
            f"{folder} lacks {len(lacking)} LoRAs of this base ({some}): "
            f"run 'python -m {train} {folder}' first, or name those you have with --only"
        )


def teach_one(taught: Taught, folder: Path, base: str, lesson: Lesson | None = None, **chosen: Any) -> float:
    """Train ``taught`` into ``folder`` in this process, with one thread and the trainer's options ``chosen``, on ``lesson`` or
    its own; seconds."""
    import torch

    torch.set_num_threads(1)
    from training.concept import train_concept
    from training.config import make_config

    settings = {
        "data": write_lesson(lesson or lesson_of(taught), folder / "lessons" / taught.name),
        "output": folder / f"{taught.name}.safetensors",
        "base": base,
        "kind": "style" if taught.role == "look" else "concept",
        "trigger": taught.trigger,
        "class_word": taught.class_word,
        "checkpoint_every": 0,
        "restart": True,
        "device": "cpu",
    }
    return train_concept(make_config(**settings | chosen), progress=lambda progress: None).seconds


def teach(name: str, folder: str, base: str, steps: int) -> float:
    """Train one LoRA of the testbed; seconds. ``steps`` 0: what its role needs."""
    taught = LORAS[name]
    chosen = NEEDS.get(taught.role, {}) | ({"steps": steps} if steps else {})
    return teach_one(taught, Path(folder), base, **chosen)


def told(text: str) -> None:
    """Print at once, also into a file."""
    print(text, flush=True)


def teach_all(
    folder: Path,
    base: str,
    base_sha256: str,
    names: Sequence[str] = tuple(LORAS),
    jobs: int = 1,
    steps: int = 0,
    say: Callable[[str], None] = told,
    teach: Callable[[str, str, str, int], float] = teach,
) -> list[str]:
    """Train what is missing with ``teach``, ``jobs`` at a time; the names trained."""
    todo = missing(folder, base_sha256, names)
    say(f"{len(names) - len(todo)} of {len(names)} LoRAs are there, {len(todo)} to train")
    if not todo:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the processes about to be started
    start = time.monotonic()
    with ProcessPoolExecutor(min(jobs, len(todo)), multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(teach, name, str(folder), base, steps): name for name in todo}
        for done, future in enumerate(as_completed(running), 1):
            left = (time.monotonic() - start) / done * (len(todo) - done)
            say(f"{running[future]}: {future.result():.0f} s ({done}/{len(todo)}, {left / 60:.0f} min left)")
    return todo
