from __future__ import annotations

import time

import pytest

from studio.infotext import hashes, parse, write

A1111 = """a photo of a (cat:1.2), masterpiece
second line <lora:ink:0.8> <lora:my style:0.5>
Negative prompt: blurry, (bad:1.4)
lowres
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 3121598, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse.safetensors, Clip skip: 2, \
Lora hashes: "ink: 0123456789ab, my style: abcdefabcdef", TI hashes: "bad-hands: aa7651be154c", Version: v1.10.1"""


def test_is_what_other_programs_parse() -> None:
    text = write("a cat", "blurry", [("cat", 0.5, "0123456789ab")], {"Steps": 20, "Model hash": "abc", "Model": "a, b"})
    assert text.split("\n") == [
        "a cat <lora:cat:0.5>",
        "Negative prompt: blurry",
        'Steps: 20, Model hash: abc, Model: "a, b", Lora hashes: "cat: 0123456789ab"',
    ]
    assert write("a cat", "", [], {"Steps": 20}) == "a cat\nSteps: 20"


def test_takes_apart_what_a1111_writes() -> None:
    found = parse(A1111)
    assert found.prompt == "a photo of a (cat:1.2), masterpiece\nsecond line <lora:ink:0.8> <lora:my style:0.5>"
    assert found.negative == "blurry, (bad:1.4)\nlowres"
    assert found.settings["Sampler"] == "DPM++ 2M"
    assert found.settings["Schedule type"] == "Karras"
    assert found.settings["Model"] == "v1-5-pruned-emaonly"
    assert hashes(found.settings["Lora hashes"]) == {"ink": "0123456789ab", "my style": "abcdefabcdef"}
    assert hashes(found.settings["TI hashes"]) == {"bad-hands": "aa7651be154c"}
    assert found.settings["Version"] == "v1.10.1"


@pytest.mark.parametrize(
    ("prompt", "negative"), [("a cat", ""), ("a, b: c\nnext (line)", 'no "quotes", x: y'), ("", ""), ("Steps: 1", "")]
)
def test_round_trip(prompt: str, negative: str) -> None:
    settings = {"Steps": "20", "Model": 'x, "y": \\z', "Size": "64x64", "Lora hashes": "a: 01234567, b c: abcdef12"}
    found = parse(write(prompt, negative, [], settings))
    assert (found.prompt, found.negative, dict(found.settings)) == (prompt, negative, settings)


@pytest.mark.parametrize(
    ("text", "prompt", "negative", "some"),
    [
        ("Steps: 20, Sampler: Euler, CFG scale: 7", "", "", {"Steps": "20"}),
        ("a\r\nNegative prompt: b\r\nSteps: 20, Sampler: Euler, CFG scale: 7", "a", "b", {"CFG scale": "7"}),
        ("a\nNegative prompt: \nSteps: 20, Sampler: Euler, Seed: , Size: ", "a", "", {"Seed": "", "Size": ""}),
        ("a\nSteps: 20, Model: we:ird, Version: f2.0.1v1.10.1-previous", "a", "", {"Model": "we:ird"}),
        ('a\nSteps: 9, Model: "x, \\"y\\"", Hires prompt: "q\\nw", CFG scale: 1', "a", "", {"Hires prompt": "q\nw"}),
        ("a\nSteps: 30, Schedule type: Karras, Distilled CFG Scale: 3.5, Module 1: ae", "a", "", {"Module 1": "ae"}),
    ],
)
def test_odd_values(text: str, prompt: str, negative: str, some: dict[str, str]) -> None:
    found = parse(text)
    assert (found.prompt, found.negative) == (prompt, negative)
    assert some.items() <= found.settings.items()


def test_hashes_that_are_none_are_passed_over() -> None:
    assert hashes("gone: None, b c: 0123456789AB, d: 12") == {"b c": "0123456789ab"}


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "a " * 50_000, 'a: "' * 20_000, "x" + " " * 100_000 + "x", "Negative prompt:\n" * 9000]
)
def test_long_texts_take_no_long_time(text: str) -> None:
    started = time.process_time()
    parse(text)
    hashes(text)
    assert time.process_time() - started < 2


def test_a_text_without_settings_is_all_prompt() -> None:
    assert parse("a cat: red, a dog: blue").prompt == "a cat: red, a dog: blue"
    assert parse("a cat\nNegative prompt: x").negative == "x"
    assert parse("").prompt == ""
