"""The measurement of single LoRAs: fair questions, and right counts on pictures whose truth is known."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio.art.atlas import splits
from studio.art.lessons import concept_lesson, look_lesson
from studio.art.scenes import render
from studio.base import load_base
from tests.bench import lessons
from tests.bench.combinations import LORAS, STYLE
from tests.bench.compose_loras import PICTURES
from tests.bench.judge import Judge
from tests.bench.lessons import PRIORS, Question, answers, heldout, questions, section_of, shipped, table
from tests.bench.templates import build_bank, make_keys
from training.config import make_config
from training.plan import settled
from training.text import known_words


def test_held_out_subjects_are_new_to_base_testbed_and_examples() -> None:
    pupils = heldout()
    assert Counter(taught.role for taught in pupils) == {"subject": 12, "look": 4}
    assert heldout() == pupils
    contents = {taught.content for taught in pupils if taught.role == "subject"}
    assert contents <= set(splits().heldout["concept"])
    assert not contents & {taught.content for taught in LORAS.values()}
    assert len({taught.trigger for taught in pupils}) == len(pupils)
    assert {taught.content for taught in shipped()} <= {taught.content for taught in LORAS.values()}


def test_triggers_are_words_the_base_does_not_know() -> None:
    base = load_base("embedded", device="cpu")
    assert [taught.trigger for taught in (*LORAS.values(), *heldout()) if known_words(base, taught.trigger)] == []


def test_the_other_prior_is_not_the_trainers_own() -> None:
    base = load_base("embedded", device="cpu")
    for role, kind in (("subject", "concept"), ("look", "style")):
        config = make_config(data="d", output="o.safetensors", trigger="vlim", kind=kind)
        assert settled(config, base).prior == PRIORS[role]


@pytest.mark.parametrize(
    ("given", "title", "mark", "options"),
    [
        ({}, "LoRAs of held-out subjects", "lessons", "--out a"),
        ({"prior": "none"}, "Held-out LoRAs with the other prior: none", "lessons, prior none", "--out a --prior none"),
        ({"shipped": True}, "Shipped LoRAs", "shipped lessons", "--shipped"),
    ],
)
def test_each_measurement_has_a_section_of_its_own(given: dict[str, Any], title: str, mark: str, options: str) -> None:
    found = section_of(Namespace(**({"shipped": False, "prior": None, "out": Path("a")} | given)))
    assert found[0].startswith(title)
    assert found[1:3] == (mark, options)


def test_questions_are_none_of_the_lessons() -> None:
    subject, look = heldout()[0], heldout()[-1]
    asked = list(questions(subject))
    assert Counter(question.kind for question in asked) == {"alone": 20, "beside": 10, "among": 10, "kept": 10}
    assert [q.prompt for q in questions(subject)] == [q.prompt for q in asked]
    assert all((subject.trigger in question.prompt) is (question.kind != "kept") for question in asked)
    lesson = concept_lesson(subject.content, STYLE, subject.phrase, PICTURES)
    taught = {item for scene, _ in lesson for item in scene.items}
    assert not taught & {item for question in asked for item in question.scene.items}
    beside = {item.concept for scene, _ in lesson for item in scene.items} - {subject.content}
    assert beside and not beside & {item.concept for question in asked for item in question.scene.items}
    learnt = {item.concept for scene, _ in look_lesson(look.content, look.phrase, PICTURES) for item in scene.items}
    styled = [question for question in questions(look) if question.kind == "look"]
    assert len(styled) == 40
    assert not learnt & {question.scene.items[0].concept for question in styled}


@pytest.fixture(scope="module")
def judge() -> Judge:
    names = [*splits().named_a, heldout()[0].content]
    return Judge(bank=build_bank(make_keys(names, looks=(None, "pastel"))))


def test_true_pictures_count_and_blank_ones_do_not(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, look = heldout()[0], LORAS["pastel"]
    for name, few in (("ALONE", 3), ("BESIDE", 2), ("AMONG", 2), ("KEPT", 2), ("HOSTS", 2), ("EACH", 2)):
        monkeypatch.setattr(lessons, name, few)

    def scene_of(pupil: lessons.Taught, prompt: str, seed: int) -> Question:
        return next(q for q in questions(pupil) if (q.prompt, q.seed) == (prompt, seed))

    true = answers(judge, lambda p, s, _: Image.fromarray(render(scene_of(subject, p, s).scene).image), subject, "file")
    assert {measure: sum(outcomes) for measure, outcomes in true.items()} == {
        "subject present": 3,
        "background right": 3,
        "present beside a known one": 2,
        "present among two known ones": 2,
        "known subject kept": 2,
        "known subject, base alone": 2,
    }
    looked = answers(judge, lambda p, s, _: Image.fromarray(render(scene_of(look, p, s).scene).image), look, "file")
    assert sum(looked["look there"]) == sum(looked["subject there"]) == 4

    blank = answers(judge, lambda *_: Image.fromarray(np.full((64, 64, 3), 128, np.uint8)), subject, "file")
    assert not any(blank["subject present"] + blank["present beside a known one"])
    page = table({subject.name: true, look.name: looked})
    assert any(line.startswith("| subject present | 100.0 % |") for line in page)
    assert any(line.startswith(f"| {look.name} |") and "4/4" in line for line in page)
