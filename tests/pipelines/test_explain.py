"""The page that shows what a method did."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compose.figures import Boxes, Curves, Figure, Maps, Schedule, Words
from compose.profile import SUFFIX, Profile
from pipelines import generate
from pipelines.explain import regions_shown, words_shown
from pipelines.figures import COLOURS, draw, heat
from studio.base import Base
from studio.errors import FileError
from studio.lora.files import load_lora
from studio.lora.model import Lora
from studio.lora.write import save_lora
from studio.requests import GenerateRequest

MakeLora = Callable[..., Lora]
WHITE = Image.new("RGB", (32, 16), "white")


def shown(figure: Figure) -> np.ndarray:
    return np.asarray(draw(figure, WHITE).convert("RGB")).reshape(-1, 3)


def has(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == np.array(colour)).all(1).any())


@pytest.mark.parametrize(
    "figure",
    [
        Schedule(title="x", rows={"a": [1.0, 0.0], "b": [0.0, 1.0]}),
        Curves(title="x", lines={"a": [1.0, float("nan"), 3.0, 2.0], "b": [0.5]}),
        Boxes(title="x", boxes={"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}),
        Words(title="x", tokens=["a", "cat"] * 40, found={"a": [0], "b": [1, 3]}),
    ],
)
def test_every_thing_has_a_colour_of_its_own(figure: Figure) -> None:
    pixels = shown(figure)
    assert has(pixels, COLOURS[0])
    assert has(pixels, COLOURS[1])
    assert not has(pixels, COLOURS[2])


def test_a_schedule_is_read_off_its_cells() -> None:
    image = draw(Schedule(title="x", rows={"a": [0.0, 0.5, 1.0]}, marks={("a", 2)}), WHITE)
    row = np.asarray(image).astype(int)[20]
    faint, half, full = (row[(row == np.array(c)).all(-1)].size for c in ((244, 244, 244), (122, 179, 211), COLOURS[0]))
    assert min(faint, half, full) > 0
    plain = draw(Schedule(title="x", rows={"a": [0.0, 0.5, 1.0]}), WHITE)
    assert (np.asarray(image) != np.asarray(plain)).any()


def test_maps_are_dark_where_nothing_is_and_bright_where_most_is() -> None:
    values = torch.tensor([[0.0, 0.5], [float("nan"), 2.0]])
    low, middle, bad, high = np.asarray(heat(values, None)).reshape(-1, 3).sum(-1)
    assert low == bad < middle < high
    assert np.asarray(heat(values, 8.0))[1, 1].sum() < high
    assert np.asarray(heat(torch.zeros(2, 2), None)).sum() == 4 * low
    grid = draw(Maps(title="x", rows={"a": [values, torch.ones(4, 2)], "b": [torch.ones(3, 3, dtype=torch.bool)]}), WHITE)
    assert grid.width > grid.height


@pytest.fixture
def two(make_lora: MakeLora, base: Base, tmp_path: Path) -> list[str]:
    paths = []
    for seed, trigger in enumerate(("sks", "photo")):
        lora = make_lora(seed, "attn2", trigger=trigger, class_word="cat", family="embedded")
        path = save_lora(tmp_path / f"lora{seed}.safetensors", lora)
        found = Profile(lora_sha256=load_lora(path).sha256, base_sha256=base.sha256, score=0.5 - seed, curve=(0.5 - seed, 0.1))
        found.save(path.with_name(path.stem + SUFFIX))
        paths.append(str(path))
    return paths


@pytest.mark.parametrize(
    ("method", "titles"),
    [("merge", ["Words", "Weights"]), ("switch", ["Words", "Turns"]), ("composite", ["Words", "Shares"]),
     ("cmlora", ["Words", "Dominance", "Fourier profiles"])],
)  # fmt: skip
def test_a_page_with_every_figure(tiny_base: Path, two: list[str], tmp_path: Path, method: str, titles: list[str]) -> None:
    folder = tmp_path / "why"
    quick: dict[str, Any] = {"base": str(tiny_base), "steps": 4, "size": (16, 16), "seed": 7, "guidance": 1}
    result = generate("a <sks> & red dog", loras=two, method=method, explain=folder, **quick)
    page = (folder / "index.html").read_text("utf-8")
    assert re.findall(r"<h2>(.*)</h2>", page) == titles
    assert "&lt;sks&gt; &amp; red" in page
    for note in result.notes:
        assert note.split("'")[1] in page
    for name in re.findall(r"<img src='([^']+)'", page):
        with Image.open(folder / name) as image:
            image.load()
    plain = generate("a <sks> & red dog", loras=two, method=method, **quick)
    assert np.array_equal(np.asarray(plain.images[0]), np.asarray(result.images[0]))


def test_words_are_those_of_each_lora(base: Base, two: list[str]) -> None:
    from compose.bank import Adapter
    from compose.text import words_of

    adapters = [Adapter(name=path, lora=load_lora(Path(path))) for path in two]
    request = GenerateRequest.of(prompt="a sks cat on a photo cat", loras=two)
    words = words_shown(words_of(base)["text_encoder"], request, adapters)
    assert isinstance(words, Words)
    assert list(words.tokens) == ["a", "sks", "cat", "on", "a", "photo", "cat"]
    assert words.found == {"lora0: sks": [1], "lora0: cat": [2], "lora1: photo": [5], "lora1: cat": [6]}


def test_regions_are_boxes_and_masks(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "m.png")
    request = GenerateRequest.of(prompt="x", loras=["a", "b"], regions=["a+b@0,0,0.5,1", f"b@{tmp_path / 'm.png'}"], size=32)
    boxes, masks = regions_shown(request)
    assert isinstance(boxes, Boxes)
    assert boxes.boxes == {"1 a + b": (0, 0, 0.5, 1)}
    assert isinstance(masks, Maps)
    assert [tuple(mask.shape) for mask in masks.rows["2 b"]] == [(32, 32)]


def test_a_folder_that_cannot_be_written_is_said_before_sampling(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="cannot write to the folder"):
        generate("a", base=str(tiny_base), explain=tmp_path / "file", on_step=lambda event: pytest.fail("sampled"))
