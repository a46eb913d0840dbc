"""Reading folders of pictures, buckets, captions and the order of batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from studio.errors import FileError, RequestError, StudioError
from training.dataset import (
    BatchPlan,
    bucket_of,
    bucket_sizes,
    digest,
    pixels,
    read_folder,
    swap_sides,
    with_trigger,
    without_trigger,
)


def draw(path: Path, size: tuple[int, int] = (8, 8), colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_text_files_and_missing_captions(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.jpg", (6, 4))
    (tmp_path / "a.txt").write_text("\ufeffa  cat\n")
    found = read_folder(tmp_path)
    assert [(p.path.name, p.caption, p.width, p.height) for p in found] == [("a.png", "a cat", 8, 8), ("b.jpg", None, 6, 4)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_tables(tmp_path: Path, kind: str) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "sub" / "b.png")
    if kind == "jsonl":
        rows = [{"file_name": "a.png", "text": "a cat"}, {"image_path": "sub/b.png", "caption": "a dog", "repeats": 3}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        (tmp_path / "metadata.csv").write_text('file_name,prompt,repeats\na.png,a cat,\nsub/b.png,"a dog",3\n')
    found = [(p.path.name, p.caption, p.repeats) for p in read_folder(tmp_path)]
    assert found == [("a.png", "a cat", 1), ("b.png", "a dog", 3)]


def test_kohya_subfolders(tmp_path: Path) -> None:
    draw(tmp_path / "10_zqx cat" / "a.png")
    draw(tmp_path / "2_cat" / "b.png")
    (tmp_path / "2_cat" / "b.txt").write_text("a cat asleep")
    draw(tmp_path / "unrelated" / "c.png")
    assert [(p.caption, p.repeats) for p in read_folder(tmp_path)] == [("zqx cat", 10), ("a cat asleep", 2)]


def broken(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])


def orphan(folder: Path) -> None:
    (folder / "b.txt").write_text("a cat")


def twins(folder: Path) -> None:
    draw(folder / "a.jpg")
    (folder / "a.txt").write_text("a cat")


def two_captions(folder: Path) -> None:
    (folder / "a.txt").write_text("a cat")
    (folder / "a.caption").write_text("a dog")


def empty_caption(folder: Path) -> None:
    (folder / "a.txt").write_text(" \n")


def table(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "metadata.jsonl").write_text(text)

    write.__name__ = text or "empty table"
    return write


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (broken, "cannot read the picture .*b.png"),
        (orphan, "b.txt' has no picture"),
        (twins, "share one name"),
        (two_captions, "share one name"),
        (empty_caption, "is empty"),
        (table('{"file_name": "x.png", "text": "a"}'), "no such picture"),
        (table('{"file_name": "../x.png", "text": "a"}'), "outside the folder"),
        (table('{"text": "a"}'), "names no picture"),
        (table("{oops"), "line 1"),
        (table('{"file_name": "a.png", "text": 3}'), "must be text"),
        (table('{"file_name": "a.png", "repeats": 0.5}'), "repeats"),
        (table('{"file_name": "a.png"}\n{"file_name": "a.png"}'), "second time"),
        (table(""), "no row for 'a.png'"),
    ],
)
def test_every_flaw_is_one_sentence(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    draw(tmp_path / "a.png")
    spoil(tmp_path)
    with pytest.raises(FileError, match=said.replace("(", r"\(")) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_pictures_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no pictures in"):
        read_folder(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        read_folder(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(StudioError, match="is a file"):
        read_folder(tmp_path / "file")


def test_pixels_flatten_transparency_on_white_and_turn_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (pixels(read_folder(tmp_path)[0], (4, 4)) == 1).all()
    image = Image.new("RGB", (8, 4), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "clear.png", exif=exif)
    assert (read_folder(tmp_path)[0].width, read_folder(tmp_path)[0].height) == (4, 8)


def test_buckets_keep_area_and_choose_the_nearest_shape() -> None:
    sizes = bucket_sizes(64, 16)
    assert (64, 64) in sizes
    assert all(w * h <= 64 * 64 and w % 16 == h % 16 == 0 and max(w / h, h / w) <= 2 for w, h in sizes)
    assert bucket_of(500, 500, sizes) == (64, 64)
    assert bucket_of(300, 200, sizes) == (80, 48)
    assert bucket_of(200, 300, sizes) == (48, 80)
    assert bucket_of(900, 100, sizes) == max(sizes, key=lambda size: size[0] / size[1])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_item_is_seen_equally_often_and_batches_stay_in_one_bucket(batch: int) -> None:
    groups = ((0, 1, 2, 2, 2), (3, 4))
    plan = BatchPlan(groups, batch, seed=7)
    batches = [plan.items(k) for k in range(7 * 40)]
    assert all(any(set(items) <= set(group) for group in groups) for items in batches)
    seen = Counter(item for items in batches for item in items)
    assert seen[2] == pytest.approx(3 * seen[0], rel=0.05)
    assert seen[3] == pytest.approx(seen[0], rel=0.05)


def test_batches_depend_on_number_and_seed_only() -> None:
    plan, same, other = (BatchPlan((tuple(range(20)),), 4, seed) for seed in (1, 1, 2))
    assert plan.items(33) == same.items(33)
    assert [plan.items(k) for k in range(9)] != [other.items(k) for k in range(9)]
    assert sorted(item for k in range(5) for item in plan.items(k)) == list(range(20))


def test_caption_edits() -> None:
    assert swap_sides("Left a cat, a dog on the right; leftover") == "Right a cat, a dog on the left; leftover"
    assert with_trigger("a Cat on grass", "zqx", "cat") == "a zqx Cat on grass"
    assert with_trigger("a ZQX cat", "zqx", "cat") == "a ZQX cat"
    assert with_trigger("category", "zqx", "cat") == "zqx cat, category"
    assert without_trigger("a zqx cat", "zqx") == "a cat"


def test_digest_sees_captions_and_pixels(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    first = digest(read_folder(tmp_path))
    (tmp_path / "a.txt").write_text("a cat")
    second = digest(read_folder(tmp_path))
    draw(tmp_path / "a.png", colour="blue")
    assert len({first, second, digest(read_folder(tmp_path))}) == 3
