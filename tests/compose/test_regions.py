"""The regions of a request: their places, and the words that stand for their subjects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter
from compose.finder import locate
from compose.lora_composer import LoraComposer
from compose.plan import Regions
from compose.regions import (
    Layout,
    bounds,
    named_by,
    places_of,
    read_mask,
    targets_of,
)
from compose.text import words_of
from studio.base import Base
from studio.errors import FileError, RequestError, UnknownNameError
from studio.lora.model import Lora
from studio.requests import Region
from tests.compose.conftest import adapter

CAT, DOG = adapter("my/cat.safetensors", trigger="sks", class_word="cat"), adapter("dog", trigger="red", class_word="dog")


PROMPT = "a cat on the left of a dog"
PLAIN: dict[str, Any] = {"isolation": False, "step": 0, "reinit": False}
Sample = Callable[..., Tensor]


@pytest.fixture(scope="module")
def pair(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [
        Adapter("cat", make_lora(1, size=0.2, trigger="sks", class_word="cat")),
        Adapter("dog", make_lora(2, size=0.2, trigger="red", class_word="dog")),
    ]


def test_loras_are_named_as_in_the_request_or_by_their_files() -> None:
    assert named_by(Region.parse("cat:0.5+dog@0,0,1,1"), [CAT, DOG]) == {0: 0.5, 1: 1.0}
    assert named_by(Region(loras=("my/cat.safetensors",), box=(0, 0, 1, 1)), [DOG, CAT]) == {1: 1.0}
    with pytest.raises(UnknownNameError, match="did you mean 'dog'"):
        named_by(Region.parse("dogg@0,0,1,1"), [CAT, DOG])


def test_targets_are_the_trigger_and_the_class_word_after_it(base: Base) -> None:
    words = words_of(base)["text_encoder"]
    #                                   1 2   3   4  5   6
    assert targets_of(words, "a cat and a sks cat", [CAT]) != ((2,),)
    trigger, noun = targets_of(words, "a cat and a sks cat", [CAT])
    assert noun[0] == trigger[-1] + 1
    assert len(targets_of(words, "sks cat and red dog", [CAT, DOG])) == 4
    # Beside another LoRA's trigger stands that one's noun; without any trigger, LoRAs of one noun have different ones.
    other = adapter("other", trigger="zqx", class_word="cat")
    assert targets_of(words, "a zqx cat and a sks", [CAT, other], [0])[0] != targets_of(words, "a zqx cat", [other])[1]
    assert len(targets_of(words, "a zqx cat and a sks", [CAT, other], [0])) == 1
    first, second = (targets_of(words, "a cat and a cat", [CAT, other], [index], strict=True) for index in (0, 1))
    assert (first, second) == tuple((locate(words, "a cat and a cat", "cat", index).columns,) for index in (0, 1))
    # A word of several tokens is one set, and what is not said does not count.
    ((*several,),) = targets_of(words, "a zebra", [adapter("zebra", trigger="zebra")])
    assert several == list(range(2, 2 + len(several))) and len(several) > 1
    assert targets_of(words, "red cat", [adapter("plain")]) == ((1, 2),)
    with pytest.raises(RequestError, match="draw regions"):
        targets_of(words, "red cat", [adapter("plain")], strict=True)
    with pytest.raises(RequestError, match="says nothing"):
        targets_of(words, "", [CAT])


def test_masks_and_boxes_go_together(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (16, 4, 32, 16))
    picture.save(tmp_path / "mask.png")
    regions = (Region(loras=("cat",), mask=tmp_path / "mask.png"), Region.parse("dog@0,0,0.5,1"))
    places, boxes = places_of(regions, (64, 32), 8)
    assert boxes == ((0.5, 0.25, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0))
    assert torch.equal(places.at(8, 16), Regions(boxes).at(8, 16))
    with pytest.raises(RequestError, match=r"mask\.png is 32 x 24 pixels of 64 x 32: too small, make it at least 25 x 25"):
        places_of(regions, (64, 32), 24.5)


def test_masks_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "none.png", "."):
        with pytest.raises(FileError, match="cannot read the mask"):
            read_mask(tmp_path / name, (8, 8))


def test_bounds() -> None:
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[1, 2], mask[2, 5] = True, True
    assert bounds(mask) == (0.25, 0.25, 0.75, 0.75)


def test_shares_of_overlapping_regions_are_equal_and_styles_act_everywhere(make_lora: Callable[..., Lora]) -> None:
    from dataclasses import replace

    from compose.regions import Spot
    from compose.text import Encoded

    none = Encoded(states=torch.zeros(1, 1, 1), ids=torch.zeros(1, 1))
    spot = Spot(name="cat", own=(0,), weights=(0.5, 0, 1), prompt="", targets=((1,),), negative=none, positive=none)
    spots = (spot, replace(spot, own=(1,), weights=(0, 2, 1)))
    regions = Regions(((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0)))
    layout = Layout(regions=regions, boxes=regions.places, spots=spots, everywhere=(0, 0, 1))
    assert layout.names == ["cat 1", "cat 2"]
    assert layout.shares(1, 8)[:, 0].tolist() == [[1, 1, 0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 1, 1, 0, 0]]
    placed = layout.placed(1, 8)
    expected = [[0.5, 0, 1]] * 2 + [[0.25, 1, 1]] * 2 + [[0, 2, 1]] * 2 + [[0, 0, 1]] * 2
    assert placed.places[0, 0, 0, :, 0].tolist() == expected
    assert placed.text.flatten().tolist() == [0, 0, 1]


# In a run.


@pytest.mark.parametrize(
    ("texts", "error", "says"),
    [
        ((), RequestError, "needs regions"),
        (("bird@0,0,1,1",), UnknownNameError, "unknown LoRA of a region 'bird'"),
        (("cat@0,0,0.2,1",), RequestError, "at least 16 x 16"),
        (("cat@0.1,0.1,0.9,0.4",), RequestError, "51 x 10 pixels of 64 x 32: too small"),
        (("cat@missing.png",), FileError, "cannot read the mask"),
        (("cat@0,0,1,1=,",), None, "lacked the trigger 'sks'"),
    ],
)
def test_bad_regions_are_refused_before_sampling(
    sample: Sample, pair: list[Adapter], texts: tuple[str, ...], error: type[Exception] | None, says: str
) -> None:
    steps: list[object] = []
    notes: list[str] = []
    wanted: dict[str, Any] = {
        "prompt": PROMPT, "regions": tuple(map(Region.parse, texts)), "on_step": steps.append, "notes": notes, "steps": 1
    }  # fmt: skip
    if error is None:
        sample(LoraComposer.of(**PLAIN), pair, **wanted)
        assert says in " ".join(notes)
        return
    with pytest.raises(error, match=says):
        sample(LoraComposer.of(**PLAIN), pair, **wanted)
    assert steps == []


@pytest.mark.parametrize("box", ["0,0,nan,1", "0,0,1.2,1", "0.5,0,0.5,1", "-0.1,0,1,1", "0,0,inf,1"])
def test_boxes_that_are_none_are_refused(box: str) -> None:
    with pytest.raises(RequestError):
        Region.parse(f"cat@{box}")


def test_a_black_mask_and_a_reversed_window_are_refused(sample: Sample, pair: list[Adapter], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (64, 32)).save(tmp_path / "black.png")
    with pytest.raises(RequestError, match="black all over"):
        sample(LoraComposer.of(), pair, prompt=PROMPT, regions=(Region(loras=("cat",), mask=tmp_path / "black.png"),))
    with pytest.raises(RequestError, match="ends before it begins"):
        sample(LoraComposer.of(window="0.8,0.2"), pair, prompt=PROMPT, regions=(Region.parse("cat@0,0,0.5,1"),))


def test_loras_without_words_say_the_whole_prompt(sample: Sample, make_lora: Callable[..., Lora]) -> None:
    nameless = [Adapter("plain", make_lora(5, "attn2", size=0.2))]
    notes: list[str] = []
    method = LoraComposer.of(**PLAIN)
    got = sample(method, nameless, prompt=PROMPT, regions=(Region.parse("plain@0,0,0.5,1"),), notes=notes)
    assert any("name no trigger" in note for note in notes)
    told = sample(method, nameless, prompt=PROMPT, regions=(Region.parse(f"plain@0,0,0.5,1={PROMPT}"),))
    assert torch.equal(got, told)
