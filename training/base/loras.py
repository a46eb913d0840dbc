"""The example LoRAs in ``assets/loras``: held-out subjects and looks, each taught from eight pictures, as a user would."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from studio.art.atlas import concepts
from studio.art.lessons import Lesson, concept_lesson, look_lesson, write_lesson

RANK = 4
"""Of the shipped files, so that six of them stay below 2 MB."""
STEPS = 400


@dataclass(frozen=True)
class Example:
    """One LoRA to ship: its file name, the word that calls it, and what it is taught."""

    name: str
    trigger: str
    class_word: str
    kind: str
    lesson: Callable[[], Lesson]


def subject(name: str, concept: str, trigger: str, style: str = "3d") -> Example:
    class_word = concepts()[concept].class_word
    return Example(name, trigger, class_word, "concept", lambda: concept_lesson(concept, style, f"{trigger} {class_word}"))


def look(name: str, trigger: str) -> Example:
    return Example(name, trigger, "picture", "style", lambda: look_lesson(name, f"{trigger} picture"))


def examples() -> tuple[Example, ...]:
    return (
        subject("cat-face", "cat face", "zarn"),
        subject("pizza", "pizza", "plov"),
        subject("dog-face", "dog face", "wexi"),
        subject("unicorn", "unicorn", "quil"),
        look("pastel", "sopi"),
        look("neon", "nevi"),
    )


def teach(example: Example, out: Path, base: str) -> Path:
    """Train one example with the trainer's own defaults, but for :data:`RANK` and :data:`STEPS`; returns the file."""
    from training.concept import train_concept
    from training.config import make_config

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            data=write_lesson(example.lesson(), Path(folder) / example.name),
            output=out / f"{example.name}.safetensors",
            base=base,
            kind=example.kind,
            trigger=example.trigger,
            class_word=example.class_word,
            rank=RANK,
            steps=STEPS,
            checkpoint_every=0,
            restart=True,
        )
        return train_concept(config).path
