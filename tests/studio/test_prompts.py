from __future__ import annotations

import random
import re
import time
from itertools import pairwise

import pytest

from studio.errors import RequestError
from studio.prompts import LoraTag, Piece, escape, not_followed, parse, take_tags

UP, DOWN = 1.1, 1 / 1.1


def pieces(text: str) -> list[tuple[str, float]]:
    (section,) = parse(text).sections
    return [(piece.text, pytest.approx(piece.weight)) for piece in section]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("an (important) word", [("an ", 1), ("important", UP), (" word", 1)]),
        ("(unbalanced", [("unbalanced", UP)]),
        ("((twice))", [("twice", UP**2)]),
        ("[less]", [("less", DOWN)]),
        ("[[less]] [", [("less", DOWN**2), (" ", 1)]),
        ("(word:1.3)", [("word", 1.3)]),
        ("(word: 1.3 ) x", [("word", 1.3), (" x", 1)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        ("(zero:0) (minus:-0.5) (dot:.5)", [("zero", 0), (" ", 1), ("minus", -0.5), (" ", 1), ("dot", 0.5)]),
        (r"cat \(animal\) \[x\] \\", [("cat (animal) [x] \\", 1)]),
        (r"(\(deep\):1.2)", [("(deep)", 1.2)]),
        (r"lone \ slash", [("lone  slash", 1)]),
        ("time 12:30, x:1.2)", [("time 12:30, x:1.2)", 1)]),
        ("closed) twice]", [("closed) twice]", 1)]),
        ("(a:b)", [("a:b", UP)]),
        ("(a:1.2.3)", [("a:1.2.3", UP)]),
        ("([even])", [("even", 1)]),
        ("([crossed)]", [("crossed", 1)]),
        ("((((", []),
        ("))] [[", [("))] ", 1)]),
        ("(:1.2) () []", [("  ", 1)]),
        ("(a:nan) (b:1e3) (c:1,2)", [("a:nan", UP), (" ", 1), ("b:1e3", UP), (" ", 1), ("c:1,2", UP)]),
        ("(a:1.1:1.2)", [("a:1.1", 1.2)]),
        (r"\(a\:1.2\)", [("(a:1.2)", 1)]),
        ("(((a)))[[[b]]]", [("a", UP**3), ("b", DOWN**3)]),
    ],
)
def test_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(text) == expected


def test_break_separates_sections_also_inside_brackets() -> None:
    assert parse("a cat BREAK a dog").sections == ((Piece("a cat"),), (Piece("a dog"),))
    assert parse("(a BREAK b:2)").sections == ((Piece("a", 2.0),), (Piece("b", 2.0),))
    assert parse("BREAK a").sections == ((), (Piece("a"),))
    assert parse("BREAKFAST and break").sections == ((Piece("BREAKFAST and break"),),)
    assert parse("a BREAK (b)").plain == "a b"
    assert parse("BREAK BREAK").sections == ((), (), ())
    assert parse("(BREAK:2) a").sections == ((), (Piece(" a"),))


def random_texts(count: int) -> list[str]:
    source = random.Random(7)
    alphabet = ["(", ")", "[", "]", "\\", ":", "1.2", "-3", " ", "cat", "ä", ",", "BREAK", "<", ">", "\n", "|", "."]
    return ["".join(source.choices(alphabet, k=source.randrange(12))) for _ in range(count)]


def test_escaped_texts_are_read_as_they_are() -> None:
    for text in random_texts(2000):
        sections = parse(escape(text)).sections
        assert ["".join(piece.text for piece in section) for section in sections] == re.split(r"\s*\bBREAK\b\s*", text)
        assert all(piece.weight == 1 for section in sections for piece in section)


def test_no_letter_is_lost_and_neighbours_differ() -> None:
    for text in random_texts(2000):
        prompt = parse(text)
        letters = re.compile(r"[^a-zäA-Z]")
        assert letters.sub("", prompt.plain) == letters.sub("", re.sub(r"\bBREAK\b", "", text))
        for section in prompt.sections:
            assert all(piece.text for piece in section)
            assert all(one.weight != two.weight for one, two in pairwise(section))


def test_brackets_around_anything_multiply_its_weights() -> None:
    for text in random_texts(1000):
        if re.search(r"[()\[\]\\]", text) or not text:
            continue
        inner = parse(text)
        outer = parse(f"({text}:2)")
        assert outer.plain == inner.plain
        assert all(piece.weight == 2 for section in outer.sections for piece in section)


def test_weights_that_are_only_noise_are_refused() -> None:
    with pytest.raises(RequestError, match="'cat' has the weight 1e\\+03 in the prompt: use at most 100"):
        parse("(cat:1000)")
    with pytest.raises(RequestError, match="at most 100"):
        parse("(" * 60 + "cat")


def test_texts_that_are_none_are_one_sentence() -> None:
    with pytest.raises(RequestError, match=r"opens more than 200 brackets '\('"):
        parse("(a" * 50_000)
    with pytest.raises(RequestError, match="bytes that are no text"):
        parse("a cat \udcff")


def test_long_texts_take_no_long_time() -> None:
    for text in ("[" * 190 + "|" * 50_000, "(a:1.0)" * 5000, "<lora:" * 20_000, "[a:" * 180 + "b" * 20_000):
        started = time.process_time()
        parse(text)
        take_tags(text)
        not_followed(text)
        assert time.process_time() - started < 2


def test_lora_tags_are_taken_out() -> None:
    assert take_tags("a cat <lora:ink style:0.8>") == ("a cat", (LoraTag("ink style", 0.8),))
    assert take_tags("<lora:a> x <LyCO:b:-1>") == ("x", (LoraTag("a", 1.0), LoraTag("b", -1.0)))
    assert take_tags("<lora:a:0.5:0.5><lora:b:te=0.3:unet=0.3>")[1] == (LoraTag("a", 0.5), LoraTag("b", 0.3))
    assert take_tags("x < lora:a:1 > <lora: my style v1.0 : .5 >") == ("x < lora:a:1 >", (LoraTag("my style v1.0", 0.5),))
    assert take_tags("<lora:a:0.5> <lora:a:0.25>")[1] == (LoraTag("a", 0.75),)
    for plain in ("a <cat-toy> on grass ", "1 < 2 > 0", "<other:x:1>"):
        assert take_tags(plain) == (plain, ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<lora:a:x>", "'x' is no number"),
        ("<lora:a:0.5:1>", "two weights"),
        ("<lora:a:1:1:1>", "is not <lora:NAME:WEIGHT>"),
        ("<lora:a:dyn=2>", "is not <lora:NAME:WEIGHT>"),
        ("<lora:a:nan>", "must be a finite number"),
        ("<lora:a:1e400>", "must be a finite number"),
        ("<lora::1>", "is not <lora:NAME:WEIGHT>"),
        ("<lora:a:0,8>", "'0,8' is no number"),
        ("<lora:a:1:lbw=1,0>", "is not <lora:NAME:WEIGHT>"),
        ("<hypernet:a:1>", "hypernetwork"),
    ],
)
def test_tags_that_cannot_be_followed_are_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        take_tags(text)


def test_notations_that_are_not_followed_are_said() -> None:
    assert len(not_followed("[cat:dog:0.5] and [x|y] AND z")) == 3
    assert len(not_followed("[to: .5 ], [[in|ner]] [a::2]")) == 3
    assert not_followed(r"[cat], (dog:1.2) \[a|b\] and [a:b] a:0.5] [a|") == []
