"""Which pictures are compared with each other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.pairs import arranged, labels_of, read_gallery
from studio.errors import FileError, RequestError
from tests.vote_pictures import duels, paint


def test_pictures_that_differ_in_their_method_alone_are_pairs(tmp_path: Path) -> None:
    gallery = read_gallery(duels(tmp_path, ("merge", "switch", "composite"), seeds=2))
    assert Counter(pair.labels for pair in gallery.pairs) == {
        ("composite", "merge"): 2, ("composite", "switch"): 2, ("merge", "switch"): 2,
    }  # fmt: skip
    for pair in gallery.pairs:
        a, b = pair.pictures
        assert a.path.parent == b.path.parent
        assert (a.method, b.method) == pair.labels
        assert (pair.turned.pictures, pair.turned.labels, pair.turned.key) == ((b, a), pair.labels[::-1], pair.key)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"prompt": "a cat and a cow"},
        {"negative": "blurry"},
        {"loras": ("cat", "dog:0.6")},
        {"loras": ("cat",)},
        {"size": (8, 8)},
        {"steps": 6},
        {"guidance": 3},
        {"scheduler": "ddim"},
        {"clip_skip": 2},
        {"init_image": "x.png"},
    ],
)
def test_any_other_difference_makes_none(tmp_path: Path, other: dict[str, Any]) -> None:
    paint(tmp_path / "a.png", "merge")
    paint(tmp_path / "b.png", "switch", **other)
    with pytest.raises(RequestError, match=r"no two pictures .* \(of 2 pictures of this studio\): draw the same thing"):
        read_gallery(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        {"regions": "cat@0,0,0.5,1=a cat"},
        {"triggers": "keep"},
        {"prompt": "a cat  and a dog "},
        {"loras": ("cat-moved", "dog:0.5")},
    ],
)
def test_what_makes_no_difference(tmp_path: Path, other: dict[str, Any]) -> None:
    """Regions belong to the method, and files are known by their hashes."""
    paint(tmp_path / "a.png", "merge")
    paint(tmp_path / "b.PNG", "masked", **other)
    assert len(read_gallery(tmp_path).pairs) == 1


def test_options_are_named_where_they_tell_variants_apart(tmp_path: Path) -> None:
    for index, options in enumerate(({}, {"tau": 1, "order": "random"}, {"tau": 2, "order": "random"})):
        paint(tmp_path / f"{index}.png", "switch", options=options)
    paint(tmp_path / "m.png", "merge", options={"how": "ties"})
    gallery = read_gallery(tmp_path)
    labels = {
        picture.path.stem: label for picture in gallery.pictures for label in [labels_of(gallery.pictures)[picture.sha256]]
    }
    assert labels == {
        "0": "switch", "1": "switch (order=random, tau=1)", "2": "switch (order=random, tau=2)", "m": "merge",
    }  # fmt: skip
    assert len(gallery.pairs) == 6


def test_everything_else_is_counted(tmp_path: Path) -> None:
    duels(tmp_path, seeds=1)
    copy(tmp_path / "seed0" / "merge.png", tmp_path / "again.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name, text in (("a1111", ("parameters", "a cat")), ("odd", ("studio", '{"request": {"prompt": 5}, "loras": 3}'))):
        info = PngInfo()
        info.add_text(*text)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png", pnginfo=info)
    gallery = read_gallery(tmp_path)
    assert (len(gallery.pictures), gallery.foreign, gallery.copies, len(gallery.pairs)) == (2, 4, 1, 1)
    assert gallery.notes == [
        "left out: 4 pictures without a request of this studio", "left out: 1 picture again in another file",
    ]  # fmt: skip


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is not a folder"):
        read_gallery(tmp_path / "none")


def test_order_and_sides_follow_the_seed_and_are_even(tmp_path: Path) -> None:
    pairs = read_gallery(duels(tmp_path, ("merge", "switch", "composite"), seeds=5)).pairs
    placed = arranged(pairs, 7)
    assert placed == arranged(pairs, 7)
    assert {pair.key for pair in placed} == {pair.key for pair in pairs}
    orders = {tuple(pair.key for pair in arranged(pairs, seed)) for seed in range(5)}
    assert len(orders) == 5
    sides = Counter(pair.labels for pair in placed)
    for labels in {pair.labels for pair in pairs}:
        assert sorted((sides[labels], sides[labels[::-1]])) == [2, 3]
    firsts = Counter(arranged(pairs[:1], seed)[0].labels for seed in range(60))
    assert len(firsts) == 2
    assert min(firsts.values()) > 15
