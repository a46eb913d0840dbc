from __future__ import annotations

import math
from pathlib import Path

import pytest

from studio.errors import RequestError, UnknownNameError
from studio.family import FAMILIES
from studio.requests import GenerateRequest, LoraRef, Region, as_request


def test_round_trip_through_json() -> None:
    request = GenerateRequest.of(prompt="a cat", loras=["x:0.5", ("y", 2)], size="64x128", seed=3)
    assert request.loras == (LoraRef(name="x", weight=0.5), LoraRef(name="y", weight=2.0))
    assert request.size == (64, 128)
    assert as_request(request.model_dump(mode="json")) == request


def test_unknown_key_offers_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown setting 'promt'.*'prompt'"):
        GenerateRequest.of(prompt="x", promt="y")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "'prompt' is missing"),
        ({"prompt": "x", "steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        ({"prompt": "x", "guidance": math.nan}, "guidance: .*got nan"),
        ({"prompt": "x", "guidance": 0.5}, "guidance: .*got 0.5"),
        ({"prompt": "x", "size": "64by64"}, "size: must be WIDTHxHEIGHT"),
        ({"prompt": "x", "loras": ["a", "a:2"]}, "LoRA 'a' is named twice"),
        ({"prompt": "x", "loras": [("a", math.inf)]}, "weight: must be a finite number, got inf"),
        ({"prompt": "x", "loras": [""]}, "name"),
        ({"prompt": "x", "seed": -1}, "seed: .*got -1"),
        ({"prompt": "x", "version": 2}, "version"),
        ({"prompt": "x", "strength": 0.5}, "strength 0.5 is given without a picture"),
        ({"prompt": "x", "init_image": "a.png", "strength": 0}, "strength: .*got 0"),
        ({"prompt": "x", "triggers": "maybe"}, "triggers: .*got 'maybe'"),
        ({"prompt": "x", "regions": [{"loras": ["a"]}]}, "either a box or a mask"),
        ({"prompt": "x", "regions": [{"loras": ["a"], "box": (0, 0, 1, 1), "mask": "m.png"}]}, "either a box or a mask"),
        ({"prompt": "x", "regions": [{"loras": [], "box": (0, 0, 1, 1)}]}, "loras"),
    ],
)
def test_bad_values_are_one_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        GenerateRequest.of(**fields)
    assert "\n" not in str(caught.value)


def test_requests_are_frozen() -> None:
    request = GenerateRequest.of(prompt="x")
    with pytest.raises(ValueError, match="frozen"):
        request.prompt = "y"  # type: ignore[misc]


def test_lora_words() -> None:
    assert LoraRef.parse("cat") == LoraRef(name="cat")
    assert LoraRef.parse("cat:0.7") == LoraRef(name="cat", weight=0.7)
    assert LoraRef.parse("cat:-1") == LoraRef(name="cat", weight=-1.0)
    assert LoraRef.parse("C:\\loras\\cat.safetensors") == LoraRef(name="C:\\loras\\cat.safetensors")
    with pytest.raises(RequestError, match="finite"):
        LoraRef.parse("cat:nan")


def test_family_fills_what_is_left_open() -> None:
    family = FAMILIES["sd15"]
    filled = GenerateRequest.of(prompt="x", steps=7).sampling(family, 99)
    assert (filled.steps, filled.guidance, filled.size, filled.scheduler, filled.seed) == (7, 7.0, (512, 512), "dpmpp_2m", 99)
    assert GenerateRequest.of(prompt="x", seed=0).sampling(family, 99).seed == 0


def test_changes_are_checked_like_new_requests() -> None:
    request = GenerateRequest.of(prompt="x", loras=["a:0.5"], size=64)
    changed = as_request(request, seed=4)
    assert (changed.seed, changed.loras, changed.size) == (4, request.loras, (64, 64))
    with pytest.raises(RequestError, match="steps"):
        as_request(request, steps="many")


def test_regions_as_text() -> None:
    request = GenerateRequest.of(prompt="x", loras=["a", "b"], regions=["a:0.5+b@0,.25,0.5,1 = a=b @ sea", "b@my mask.png"])
    first, second = request.regions
    assert first == Region(
        loras=(LoraRef(name="a", weight=0.5), LoraRef(name="b")), box=(0.0, 0.25, 0.5, 1.0), prompt="a=b @ sea"
    )
    assert (second.mask, second.box, second.prompt) == (Path("my mask.png"), None, None)
    assert (first.place, second.place) == ("0,0.25,0.5,1", "my mask.png")
    assert as_request(request.model_dump(mode="json")) == request
    assert request.with_(init_image="a.png").pictures == (Path("a.png"), Path("my mask.png"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a", "is not NAME"),
        ("@0,0,1,1", "is not NAME"),
        ("a+@0,0,1,1", "is not NAME"),
        ("a@", "is not NAME"),
        ("a@0,0,1", "is not four numbers"),
        ("a@x,0,1,1", "is not four numbers"),
        ("a@0,0,nan,1", "finite"),
        ("a@-0.1,0,1,1", "0 <= x0 < x1 <= 1"),
        ("a@0,0,1,1.01", "y0 < y1 <= 1"),
        ("a@0.5,0,0.5,1", "x0 < x1"),
        ("a+a@0,0,1,1", "'a' of a region is named twice"),
        ("a:inf@0,0,1,1", "LoRA 'a' has the weight inf"),
    ],
)
def test_bad_regions_are_one_sentence_that_repeats_them(text: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        GenerateRequest.of(prompt="x", regions=[text])
    assert f"region '{text}'" in str(caught.value)
    assert "\n" not in str(caught.value)
