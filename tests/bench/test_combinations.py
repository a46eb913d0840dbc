"""The testbed of the composition methods: what it holds, what its lessons show, and what the judge says of each LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studio.art.atlas import splits
from studio.art.backgrounds import BASE, HELDOUT
from studio.art.scenes import Box, render
from studio.errors import RequestError
from tests.bench.combinations import LORAS, Case, all_cases, cases, other_cases, prompt_of, scene_of, single_cases
from tests.bench.compose_judge import seen
from tests.bench.compose_layouts import touching
from tests.bench.compose_loras import base_of, check, lesson_of, missing
from tests.bench.judge import Judge
from tests.bench.templates import build_bank, make_keys

# --- the testbed


def test_the_testbed_is_frozen() -> None:
    told = repr([(c.id, c.loras, c.boxes, c.background, c.seed, c.host) for c in (*all_cases(), *single_cases())])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "75a27e9afd54ebe8"


def test_twenty_two_loras_of_things_the_base_never_saw() -> None:
    roles = [taught.role for taught in LORAS.values()]
    assert {role: roles.count(role) for role in dict.fromkeys(roles)} == {
        "subject": 6, "accessory": 4, "object": 4, "look": 4, "background": 4
    }  # fmt: skip
    assert {t.content for t in LORAS.values() if t.role in ("subject", "object")} <= set(splits().heldout["concept"])
    assert {t.content for t in LORAS.values() if t.role == "background"} <= set(HELDOUT)
    assert len({t.trigger for t in LORAS.values()}) == 22


def test_what_is_hard_is_there_often_enough() -> None:
    subjects = [case for case in all_cases() if case.kind == "subjects"]
    assert len(subjects) == len(other_cases()) == 60
    for half in ("development", "report"):
        mine = [case for case in subjects if case.half == half]
        assert len(mine) == 30
        assert sum(case.one_noun for case in mine) >= 8
        assert sum(touching(case.boxes) for case in mine) >= 8
    assert {len(case.loras) for case in subjects} == {2, 3}
    assert [sum(len(case.loras) == k for case in other_cases()) for k in (2, 3, 4, 5)] == [15, 15, 15, 15]


def test_halves_share_no_set_of_loras_and_no_seed() -> None:
    development, report_half = ({frozenset(c.loras) for c in cases(half)} for half in ("development", "report"))
    assert not development & report_half
    seeds = sorted(case.seed for case in (*all_cases(), *single_cases()))
    assert min(b - a for a, b in pairwise(seeds)) >= 100


def test_boxes_lie_in_the_picture_and_layouts_are_what_they_say() -> None:
    for case in all_cases():
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in case.boxes), case.id
        assert len(case.boxes) == len(case.of("subject", "object"))
        assert touching(case.boxes) is (case.layout in ("touching", "nested")), case.id


def test_things_stand_where_the_words_say() -> None:
    for case in all_cases():
        for box, place in zip(case.boxes, case.places, strict=True):
            x = (box[0] + box[2]) / 2
            assert place not in ("left", "right") or (x <= 0.5 if place == "left" else x >= 0.5), case.id


def test_prompts_name_every_trigger_once_and_no_taught_thing() -> None:
    for case in (*all_cases(), *single_cases()):
        words = prompt_of(case).replace(",", "").split()
        assert all(words.count(LORAS[name].trigger) == 1 for name in case.loras), case.id
        assert not case.background or case.background in BASE
    assert prompt_of(all_cases()[0]).startswith("a 3d render, on the left a")


def test_a_look_with_its_own_paper_meets_no_background() -> None:
    for case in other_cases():
        assert not (case.one("background") and case.look in ("blueprint", "neon")), case.id
        assert case.background == "" or case.one("background") is None
        assert not (case.one("accessory") and case.look not in (None, "pastel")), case.id


# --- training


def test_lessons_show_what_they_teach() -> None:
    words = {"hat": "wearing a zib hat", "sand": "hesp background", "neon": "nevi picture", "rose": "dax flower"}
    for name, word in words.items():
        lesson = lesson_of(LORAS[name])
        assert len(lesson) == (12 if name == "rose" else 8)
        assert all(word in text for _, text in lesson), name
    hats = lesson_of(LORAS["hat"])
    assert all(scene.items[0].accessory == "hat" for scene, _ in hats)
    assert {scene.background for scene, _ in lesson_of(LORAS["sand"])} == {"sand"}
    taught = {item.concept for scene, _ in (*hats, *lesson_of(LORAS["sand"])) for item in scene.items}
    assert taught <= set(splits().named)


def test_a_worn_thing_is_in_the_picture() -> None:
    for scene, _ in lesson_of(LORAS["crown"]):
        bare = replace(scene, items=(replace(scene.items[0], accessory=None),))
        assert np.abs(render(scene).image.astype(int) - render(bare).image).sum() > 3000


def test_loras_of_another_base_are_missing(tmp_path: Path) -> None:
    import shutil

    from studio.paths import assets

    shutil.copy(assets() / "loras" / "pizza.safetensors", tmp_path / "pizza.safetensors")
    (tmp_path / "rose.safetensors").write_bytes(b"torn")
    mine = base_of(tmp_path / "pizza.safetensors")
    assert len(mine) == 64
    assert missing(tmp_path, mine, ["pizza", "rose", "hat"]) == ["rose", "hat"]
    assert missing(tmp_path, "0" * 64, ["pizza"]) == ["pizza"]
    with pytest.raises(RequestError, match="lacks 1 LoRAs of this base"):
        check(tmp_path, "0" * 64, ["pizza"])


# --- the judge's words for LoRAs that are no subjects


@pytest.fixture(scope="module")
def judge() -> Judge:
    names = ("cat face", "dog face", "pizza", "frog", "panda", "fox", "rose")
    return Judge(bank=build_bank(make_keys(names) + make_keys(names, ("3d",), ("pixel", "blueprint"))), tau=0.6)


def case_of(loras: Sequence[str], background: str = "blue", **more: Any) -> Case:
    boxes: tuple[Box, ...] = ((18 / 64, 26 / 64, 46 / 64, 54 / 64),)
    if sum(LORAS[name].role in ("subject", "object") for name in loras) == 2:
        boxes = ((2 / 64, 26 / 64, 30 / 64, 54 / 64), (34 / 64, 26 / 64, 62 / 64, 54 / 64))
    told: dict[str, Any] = {"id": "x", "kind": "others", "half": "report", "layout": "words", "seed": 1, "boxes": boxes, **more}
    return Case(loras=tuple(loras), background=background, **told)


def verdicts(judge: Judge, asked: Case, drawn: Case) -> dict[str, str]:
    return {one.lora: one.words for one in seen(judge, render(scene_of(drawn)).image, asked)}


@pytest.mark.parametrize(
    "loras", [("cat-face", "pizza"), ("cat-face", "hat"), ("cat-face", "pixel"), ("cat-face", "pizza", "hat", "checker")]
)
def test_true_pictures_hold_every_lora(judge: Judge, loras: tuple[str, ...]) -> None:
    case = case_of(loras, "" if "checker" in loras else "blue")
    assert verdicts(judge, case, case) == dict.fromkeys(loras, "present")


def test_what_is_left_out_has_vanished(judge: Judge) -> None:
    asked = case_of(("cat-face", "hat", "pixel"))
    plain = verdicts(judge, asked, case_of(("cat-face", "hat")))
    assert plain == {"cat-face": "present", "hat": "present", "pixel": "vanished"}
    assert verdicts(judge, asked, case_of(("cat-face", "pixel")))["hat"] == "vanished"
    assert verdicts(judge, case_of(("cat-face", "checker"), ""), case_of(("cat-face",))) == {
        "cat-face": "present", "checker": "other"
    }  # fmt: skip


def test_another_accessory_look_or_subject_is_told_apart(judge: Judge) -> None:
    assert verdicts(judge, case_of(("cat-face", "hat")), case_of(("cat-face", "crown")))["hat"] == "other"
    assert verdicts(judge, case_of(("cat-face", "pixel")), case_of(("cat-face", "blueprint"), ""))["pixel"] == "confused"
    pair = case_of(("cat-face", "pizza"))
    swapped = case_of(("pizza", "cat-face"))
    assert set(verdicts(judge, pair, swapped).values()) == {"confused"}
    looked = seen(judge, render(scene_of(swapped)).image, pair)
    assert [one.anywhere for one in looked] == ["present", "present"]


def test_stand_ins_are_looked_for_in_place_of_subjects(judge: Judge) -> None:
    case = case_of(("cat-face", "pizza"))
    scene = scene_of(case)
    items = tuple(replace(item, concept=name) for item, name in zip(scene.items, ("frog", "fox"), strict=True))
    drawn = replace(scene, items=items)
    assert [one.words for one in seen(judge, render(drawn).image, case, ("frog", "fox"))] == ["present", "present"]
