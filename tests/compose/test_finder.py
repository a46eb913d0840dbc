from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compose.bank import Adapter
from compose.finder import Found, find, locate, noun_of, spell, with_triggers
from compose.text import encode, words_of
from compose.tokens import Words
from studio.base import Base
from studio.embeddings import Embedding
from studio.errors import RequestError
from studio.lora.model import Lora


@pytest.fixture(scope="module")
def words(base: Base) -> Words:
    return words_of(base)["text_encoder"]


def tokens(words: Words, base: Base, prompt: str, columns: tuple[int, ...]) -> str:
    """What the text encoder really has in these columns."""
    ids = encode(base, [prompt]).ids[0][list(columns)].tolist()
    return words.tokenizer.decode(ids).strip()


@pytest.mark.parametrize(
    ("prompt", "phrase", "expected"),
    [
        ("a red apple on grass", "apple", [(3,)]),
        ("a red apple on grass", "Red  Apple", [(2, 3)]),
        ("apple", "apple", [(1,)]),
        ("a zebra on grass", "zebra", [(2, 3, 4, 5, 6)]),
        ("a cat, a cat on a Cat", "cat", [(2,), (5,), (8,)]),
        ("a cat and a category", "cat", [(2,)]),
        ("a (red:1.3) [apple]", "red apple", [(2, 3)]),
        ("a \\(red\\) apple", "(red)", [(2, 3, 4)]),
        ("a red apple", "dog", []),
        ("a red apple", " ", []),
        ("a cat BREAK a dog", "dog", [(16 + 2,)]),
        ("a " * 14 + "red apple", "apple", [(16 + 2,)]),
        ("a <|endoftext|> cat", "cat", [(3,)]),
    ],
)
def test_columns_of_words(base: Base, words: Words, prompt: str, phrase: str, expected: list[tuple[int, ...]]) -> None:
    found = find(words, prompt, phrase)
    assert [each.columns for each in found] == expected
    for each in found:
        said = tokens(words, base, prompt, each.columns).replace(" ", "")
        assert said == phrase.lower().replace(" ", "")


def test_every_column_but_the_special_ones_is_spelled(words: Words) -> None:
    spelling = spell(words, "a (red:1.2) zebra, BREAK the dog")
    assert spelling.plain[slice(*spelling.spans[1])] == "red"
    assert list(spelling.columns) == [*range(1, 9), 17, 18]


def test_a_learnt_word_has_all_its_columns(base: Base) -> None:
    learnt = Embedding("swirl", ("swirl",), {"text_encoder": torch.zeros(3, 32)}, Path("swirl.safetensors"), "")
    words = Words(base.tokenizer, base.context_length, "text_encoder", (learnt,))
    assert find(words, "a swirl apple", "swirl")[0].columns == (2, 3, 4)
    assert find(words, "a swirl apple", "apple")[0].columns == (5,)


def test_the_second_of_two_equal_nouns(words: Words) -> None:
    assert locate(words, "a cat left of a cat", "cat", 1).columns == (6,)
    with pytest.raises(RequestError, match=r"'cat' stands 2 times in the prompt .* not 3 times"):
        locate(words, "a cat left of a cat", "cat", 2)
    with pytest.raises(RequestError, match="'dog' does not stand in the prompt 'a cat'"):
        locate(words, "a cat", "dog")


def lora(name: str, trigger: str, class_word: str = "", weight: float = 1.0) -> Adapter:
    return Adapter(name, Lora({}, {"studio.trigger": trigger, "studio.class_word": class_word}), weight)


def test_missing_triggers_are_added_and_said() -> None:
    adapters = [lora("one", "sks", "cat"), lora("two", "ohwx"), lora("off", "zzz", weight=0), lora("none", "")]
    prompt, notes = with_triggers("a SKS cat", adapters)
    assert prompt == "a SKS cat, ohwx"
    assert notes == ["the prompt lacked the trigger 'ohwx' of LoRA 'two': 'ohwx' was added at its end"]
    assert with_triggers("", adapters[:1])[0] == "sks cat"
    assert with_triggers("the (sks:1.2) cat", adapters[:1]) == ("the (sks:1.2) cat", [])
    assert with_triggers("grass,", [lora("x", "in the style (sks)")])[0] == "grass, in the style \\(sks\\)"
    assert with_triggers("grass", [lora("x", "sks cat", "cat")])[0] == "grass, sks cat"
    with pytest.raises(RequestError, match="lacks the trigger 'sks' of LoRA 'one'"):
        with_triggers("grass", adapters, strict=True)


def test_the_noun_of_a_trigger_is_the_next_free_one_else_the_last_before() -> None:
    nouns = [Found("cat", (2,)), Found("cat", (5,)), Found("cat", (9,))]
    trigger = Found("sks", (4,))
    assert noun_of(nouns, trigger) == nouns[1]
    assert noun_of(nouns, trigger, taken=nouns[1:2]) == nouns[2]
    assert noun_of(nouns, trigger, taken=nouns[1:]) == nouns[0]
    assert noun_of(nouns, Found("sks cat", (4, 5))) == nouns[1]
    assert noun_of(nouns, None) == nouns[0]
    assert noun_of(nouns, trigger, taken=nouns) is None
    assert noun_of([], trigger) is None
