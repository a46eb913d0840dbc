"""What regions say that nobody wrote a prompt for."""

from __future__ import annotations

import pytest

from compose.region_words import Arrangement, Place, clauses, placed_words, said_by_default, style_words
from tests.compose.conftest import adapter

CAT, DOG = adapter("cat", trigger="sks", class_word="cat"), adapter("dog", trigger="red", class_word="dog")
STYLE = adapter("night", trigger="style", class_word="photo")
PLACES = [Place((0.2, 0.5), 0.4, [DOG]), Place((0.8, 0.5), 0.4, [CAT])]


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("a sks cat on the left and a red dog, in the style of night, on grass", ["in the style of night", "on grass"]),
        ("a cat and a dog", ["style photo"]),
        ("(a sks cat, asleep:1.2), (on (green, wet) grass:1.1), style photo", ["(on (green, wet) grass:1.1)", "style photo"]),
        ("", ["style photo"]),
        ("redder doggy", ["redder doggy", "style photo"]),
        ("a drawing of a sks cat and a dog, style photo", ["a drawing", "style photo"]),
    ],
)
def test_what_a_prompt_says_about_the_whole_picture(prompt: str, kept: list[str]) -> None:
    assert style_words(prompt, Arrangement(places=PLACES, styles=[STYLE])) == kept


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (0.25, 0.9, "on the left"),
        (0.75, 0.5, "on the right"),
        (0.5, 0.5, ""),
        (0.5, 0.25, "at the top"),
        (0.5, 0.75, "at the bottom"),
    ],
)
def test_where_something_is_in_words(x: float, y: float, said: str) -> None:
    assert placed_words(x, y) == said
    assert placed_words(x, y, [0.3, 0.7]) == said


def test_what_is_in_the_middle_is_on_a_side_of_all_others() -> None:
    assert [placed_words(0.5, 0.2, others) for others in ([0.39], [0.35, 0.3], [0.65])] == [
        "on the right", "on the right", "on the left"
    ]  # fmt: skip
    assert placed_words(0.5, 0.2, [0.45]) == "at the top"


@pytest.mark.parametrize(
    ("prompt", "local", "placed"),
    [
        (
            "a drawing, on the left a red dog and on the right a sks cat, on grass",
            "sks cat, a drawing, on grass",
            "a drawing, on the right a sks cat, on grass",
        ),
        ("a photo of a sks cat and a red dog", "sks cat, a photo", "a photo, on the right a sks cat"),
        ("a sks cat, asleep, a red dog, on grass", "sks cat, asleep, on grass", "on the right a sks cat, asleep, on grass"),
        ("on grass", "sks cat, on grass", "on the right a sks cat, on grass"),
    ],
)
def test_what_is_said_in_a_region(prompt: str, local: str, placed: str) -> None:
    arrangement = Arrangement(places=PLACES, styles=[])
    assert said_by_default(prompt, 1, arrangement, "local") == local
    assert said_by_default(prompt, 1, arrangement, "placed") == placed
    assert said_by_default(prompt, 1, arrangement, "whole") == prompt
    nameless = Arrangement(places=[*PLACES, Place((0.5, 0.5), 0.2, [adapter("plain")])], styles=[])
    assert said_by_default(prompt, 2, nameless, "placed") == said_by_default(prompt, 2, nameless, "arranged") == ""


def test_a_region_may_say_where_all_subjects_are() -> None:
    nameless = adapter("bird", trigger="blue bird")  # what its trigger is called without it, nobody knows
    both = Place((0.5, 0.2), 0.4, [nameless, adapter("hat", trigger="zib", class_word="hat")])
    arrangement = Arrangement(places=[*PLACES, both, Place((0.5, 0.8), 0.4, [adapter("plain")])], styles=[])
    said = [said_by_default("a photo of a sks cat, on grass", index, arrangement, "arranged") for index in range(4)]
    assert said == [
        "a photo, on the left a red dog and on the right a cat and at the top a hat, on grass",
        "a photo, on the left a dog and on the right a sks cat and at the top a hat, on grass",
        "a photo, on the left a dog and on the right a cat and at the top a blue bird and a zib hat, on grass",
        "",
    ]


def test_a_region_speaks_for_itself_where_another_has_the_same_name() -> None:
    plain, nameless = adapter("plain", class_word="cat"), adapter("x", trigger="zqx")
    for own, other, said in ((plain, CAT, "on the right a cat"), (nameless, nameless, "on the right a zqx")):
        arrangement = Arrangement(places=[Place((0.2, 0.5), 0.4, [other]), Place((0.8, 0.5), 0.4, [own])], styles=[])
        assert said_by_default("", 1, arrangement, "arranged") == said


def test_what_lies_behind_others_is_on_no_side_of_them() -> None:
    behind = [Place((0.25, 0.5), 0.5, [DOG]), Place((0.5, 0.5), 1.0, [CAT])]
    assert said_by_default("", 1, Arrangement(places=behind, styles=[]), "placed") == "a sks cat"
    beside = [Place((0.25, 0.5), 0.5, [DOG]), Place((0.5, 0.5), 0.5, [CAT])]
    assert said_by_default("", 1, Arrangement(places=beside, styles=[]), "placed") == "on the right a sks cat"


def test_the_order_of_regions_does_not_matter_and_one_said_twice_is_one() -> None:
    bird = Place((0.5, 0.2), 0.3, [adapter("bird", trigger="zqx", class_word="bird")])
    said = "on the left a dog and on the right a sks cat and at the top a bird"
    for places in (
        [bird, PLACES[1], PLACES[0]],
        [PLACES[1], PLACES[0], bird],
        [PLACES[1], bird, Place((0.8, 0.5), 0.4, [CAT]), PLACES[0], PLACES[0]],
    ):
        assert said_by_default("", places.index(PLACES[1]), Arrangement(places=places, styles=[]), "arranged") == said


def test_clauses_are_cut_at_commas_outside_brackets() -> None:
    prompt = r"(a zarn animal, (old) grass:1.2), blue sky, [a, b], smile \(x, y"
    assert [text for text, _ in clauses(prompt, Arrangement(places=[], styles=[]))] == [
        "(a zarn animal, (old) grass:1.2)", "blue sky", "[a, b]", r"smile \(x", "y",
    ]  # fmt: skip
    unclosed = "a happy cat :( on grass, (old, blue) sky, a dog"
    assert [text for text, _ in clauses(unclosed, Arrangement(places=[], styles=[]))] == [
        "a happy cat :( on grass", "(old, blue) sky", "a dog",
    ]  # fmt: skip
