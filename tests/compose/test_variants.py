"""One prompt per LoRA, and which tokens speak of the same subject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from compose.bank import Adapter
from compose.clora import CLoRA
from compose.text import words_of
from compose.variants import Variants, subjects_of, variants_of, without
from studio.base import Base
from studio.errors import RequestError
from studio.lora.model import Lora

Sample = Callable[..., Tensor]
Make = Callable[..., Lora]
PROMPT = "a red cat on the green dog"


def concept(make_lora: Make, seed: int, trigger: str, noun: str) -> Adapter:
    return Adapter(f"lora {seed}", make_lora(seed, "attn2", size=0.25, trigger=trigger, class_word=noun))


@pytest.fixture(scope="module")
def two(make_lora: Make) -> list[Adapter]:
    return [concept(make_lora, 1, "red", "cat"), concept(make_lora, 2, "green", "dog")]


def found(base: Base, prompt: str, adapters: list[Adapter], **told: Any) -> Variants:
    words = words_of(base)["text_encoder"]
    return variants_of(words, prompt, subjects_of(words, prompt, adapters, triggers={}, nouns={}, **told), 16)


def test_prompts_and_groups_of_two_subjects(base: Base, two: list[Adapter]) -> None:
    got = found(base, PROMPT, two)
    assert got.prompts == ("a cat on the dog", "a red cat on the dog", "a cat on the green dog")
    where = [[row.nonzero().flatten().tolist() for row in sets] for sets in got.sets]
    assert where == [[[2], [5], []], [[3], [6], [2]], [[2], [9], [5, 6, 7, 8]]]
    groups = {k: [m for m, c in zip(got.maps, got.classes, strict=True) if c == k] for k in (0, 1)}
    assert groups == {0: [(0, 0), (1, 0), (1, 2), (2, 0)], 1: [(0, 1), (1, 1), (2, 1), (2, 2)]}
    assert [got.own(number) for number in range(3)] == [[0, 1], [0, 2], [1, 2]]


def test_one_noun_for_two_subjects_is_told_apart_by_its_place(base: Base, make_lora: Make) -> None:
    cats = [concept(make_lora, 1, "red", "cat"), concept(make_lora, 2, "green", "cat")]
    for order, wanted in ((cats, [[2], [4]]), (cats[::-1], [[4], [2]])):
        got = found(base, "a red cat, green cat", order)
        assert [row.nonzero().flatten().tolist() for row in got.sets[0][:2]] == wanted
        assert len({(m, tuple(got.sets[m].flatten().tolist())) for m in got.maps}) == len(got.maps)
    with pytest.raises(RequestError, match="says 'cat' 1 times"):
        found(base, "a red cat, green", cats)


def test_triggers_of_several_tokens_with_weights_and_nouns_inside(base: Base, make_lora: Make) -> None:
    one, other = concept(make_lora, 1, "xyzq red cat", "cat"), concept(make_lora, 2, "green", "dog")
    got = found(base, "a (xyzq red cat:1.2) on (green) dog", [one, other])
    assert got.prompts[0] == "a (cat:1.2) on () dog" and got.prompts[1] == "a (xyzq red cat:1.2) on () dog"
    assert len(got.sets[1][2].nonzero()) > 2
    assert [int(s.sum()) for s in got.sets[0]] == [1, 1, 0]


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("red cat, RED dog, redder", "cat, dog, redder"),
        ("a red animal and A  red ox", "an animal and An  ox"),
        ("an old red cat, an red cat", "an old cat, a cat"),
        ("a red, a (red) animal", "a , a () animal"),
        ("media red animal", "media animal"),
    ],
)
def test_triggers_go_and_articles_follow(prompt: str, left: str) -> None:
    assert without(prompt, "red") == left


def test_a_lora_without_a_trigger_keeps_its_noun(base: Base, make_lora: Make, two: list[Adapter]) -> None:
    plain = Adapter("plain", make_lora(9))
    words = words_of(base)["text_encoder"]
    subjects = subjects_of(words, PROMPT, [plain, two[1]], triggers={}, nouns={"plain": "cat"})
    got = variants_of(words, PROMPT, subjects, 16)
    assert got.prompts == ("a red cat on the dog", "a red cat on the dog", "a red cat on the green dog")
    assert got.own(1) == [0] and got.own(2) == [1, 2]
    assert subjects_of(words, PROMPT, [plain, two[1]], triggers={"plain": "red"}, nouns={"plain": "cat"})[0].trigger == "red"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("a cat on the green dog", "lacks the trigger 'red' of LoRA 'lora 1': write 'red cat'"),
        ("a red apple on the green dog", "'cat' of LoRA 'lora 1' does not stand in the prompt, so its class"),
        ("a red cat " * 8 + "green dog", "must fit 14 tokens"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_grouped_are_one_sentence(
    sample: Sample, two: list[Adapter], prompt: str, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        sample(CLoRA(), two, prompt=prompt)


def test_loras_that_cannot_be_told_apart_are_one_sentence(sample: Sample, two: list[Adapter], make_lora: Make) -> None:
    twin = concept(make_lora, 3, "red", "dog")
    with pytest.raises(RequestError, match="have the same trigger 'red'"):
        sample(CLoRA(), [two[0], twin], prompt=PROMPT)
    with pytest.raises(RequestError, match="'what' does not say what it draws"):
        sample(CLoRA(), [two[0], Adapter("what", make_lora(4))], prompt=PROMPT)
    inside = concept(make_lora, 5, "the green", "dog")
    swallowed = concept(make_lora, 6, "red", "green")
    with pytest.raises(RequestError, match="is part of another LoRA's trigger"):
        sample(CLoRA(), [swallowed, inside], prompt=PROMPT)
    with pytest.raises(RequestError, match="'nouns' names 'else'"):
        sample(CLoRA.of(nouns='{"else": "cat"}'), two, prompt=PROMPT)
    with pytest.raises(RequestError, match="as text"):
        sample(CLoRA(), two, prompt=PROMPT, wording=None)


def test_a_trigger_inside_another_or_that_cannot_go_is_refused(base: Base, make_lora: Make) -> None:
    inside = [concept(make_lora, 1, "red", "cat"), concept(make_lora, 2, "red green", "dog")]
    with pytest.raises(RequestError, match="one is part of the other"):
        found(base, "a red cat and a red green dog", inside)
    pair = [concept(make_lora, 1, "red old", "cat"), concept(make_lora, 2, "green", "dog")]
    with pytest.raises(RequestError, match="'red old' of LoRA 'lora 1' cannot be taken out"):
        found(base, "a (red:1.2) old cat on the green dog", pair)
