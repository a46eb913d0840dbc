"""Training pictures: reading a folder, sorting into aspect buckets, and which picture is in which batch.

The order of batches is a pure function of the seed and the batch number: the data position of a run is its step count.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from studio.errors import FileError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
CAPTIONS = (".txt", ".caption")
FILE_KEYS = ("file_name", "image_path", "image", "path")
TEXT_KEYS = ("caption", "text", "prompt")
WIDEST = 2.0
"""Largest aspect ratio of a bucket; beyond it a picture is cropped."""


@dataclass(frozen=True)
class Picture:
    """One training picture. ``caption`` is None when the folder gives none; ``digest`` is the SHA-256 of the file. ``mask``:
    the file that says what of it is learnt, the picture itself where its transparency does; ``mask_digest``: of another one."""

    path: Path
    caption: str | None
    repeats: int
    width: int
    height: int
    digest: str
    mask: Path | None = None
    mask_digest: str = ""


def read_folder(folder: Path) -> list[Picture]:
    """All pictures of ``folder``, every one decoded once.

    Captions come from ``metadata.jsonl`` or ``metadata.csv`` when there is one, else from text files beside the pictures.
    Subfolders named ``<repeats>_<caption>`` (kohya's layout) are read too, if the folder itself holds no picture.

    Raises:
        FileError: folder missing, broken picture, caption without picture, two pictures for one caption, bad metadata.
        RequestError: no pictures.
    """
    if not folder.is_dir():
        missing = f"the folder of training pictures '{folder}' does not exist: check the path"
        raise FileError(f"'{folder}' is a file: give a folder of pictures" if folder.exists() else missing)
    found = _read_one(folder, None, 1)
    if not found:
        for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
            match = re.fullmatch(r"(\d+)_(.+)", sub.name)
            if match and int(match[1]) > 0:
                found += _read_one(sub, match[2].replace("_", " "), int(match[1]))
    if not found:
        raise RequestError(f"no pictures in '{folder}': put {', '.join(sorted(PICTURES))} files there")
    return found


def _read_one(folder: Path, default: str | None, repeats: int) -> list[Picture]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in PICTURES]
    for name, parse in (("metadata.jsonl", _jsonl), ("metadata.csv", _csv)):
        if (folder / name).is_file():
            return _from_metadata(folder / name, parse(folder / name), images, default, repeats)
    captions = [p for p in files if p.suffix.lower() in CAPTIONS]
    by_stem: dict[str, list[Path]] = {}
    for image in images:
        by_stem.setdefault(image.stem, []).append(image)
    texts: dict[str, str] = {}
    for path in captions:
        owners = by_stem.get(path.stem, [])
        if not owners:
            raise FileError(f"caption '{path}' has no picture of the same name: add the picture or remove the caption")
        if len(owners) > 1 or path.stem in texts:
            rivals = owners if len(owners) > 1 else [p for p in captions if p.stem == path.stem]
            raise FileError(f"'{rivals[0]}' and '{rivals[1].name}' share one name: a caption must belong to one picture")
        texts[path.stem] = _text(path)
    return [_open(path, texts.get(path.stem, default), repeats) for path in images]


def _text(path: Path) -> str:
    try:
        text = " ".join(path.read_text("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read the caption '{path}': {error}") from None
    if not text:
        raise FileError(f"caption '{path}' is empty: write one, or remove the file to use the caption template")
    return text


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read '{path}': {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise FileError(f"line {number} of '{path}' is not a JSON object")
            yield row


def _csv(path: Path) -> Iterable[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"cannot read '{path}': {error}") from None


def _from_metadata(
    table: Path, rows: Iterable[dict[str, Any]], images: list[Path], default: str | None, repeats: int
) -> list[Picture]:
    pictures: dict[Path, Picture] = {}
    root = table.parent.resolve()
    for number, row in enumerate(rows, 1):
        name = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        if not isinstance(name, str):
            raise FileError(f"row {number} of '{table}' names no picture: it needs one of {', '.join(FILE_KEYS)}")
        path = table.parent / name
        if not path.resolve().is_relative_to(root):
            raise FileError(f"row {number} of '{table}' names '{name}', which lies outside the folder")
        if not path.is_file():
            raise FileError(f"row {number} of '{table}' has a caption for '{name}', but there is no such picture")
        if path in pictures:
            raise FileError(f"row {number} of '{table}' names '{name}' a second time")
        caption = next((row[key] for key in TEXT_KEYS if row.get(key)), default)
        if caption is not None and not isinstance(caption, str):
            raise FileError(f"row {number} of '{table}' has the caption {caption!r}: it must be text")
        pictures[path] = _open(path, " ".join(caption.split()) if caption else None, _repeats(row, number, table) * repeats)
    missing = [p.name for p in images if p not in pictures]
    if missing:
        raise FileError(f"'{table}' has no row for '{missing[0]}' ({len(missing)} pictures): add the rows or move the pictures")
    return list(pictures.values())


def _repeats(row: dict[str, Any], number: int, table: Path) -> int:
    value = row.get("repeats") or 1
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise FileError(f"row {number} of '{table}' has repeats {value!r}: it must be a whole number from 1")
    return count


def _open(path: Path, caption: str | None, repeats: int) -> Picture:
    width, height = _decode(path).size
    return Picture(path, caption, repeats, width, height, file_digest(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a picture file.

    Raises:
        FileError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FileError(f"cannot read the picture '{path}': {error.strerror}") from None


def _decode(path: Path) -> Image.Image:
    """The picture as people see it."""
    from studio.media import open_picture

    try:
        return open_picture(path)
    except FileError as error:
        raise FileError(f"{' '.join(str(error).split())}: replace or remove it") from None


def pixels(picture: Picture, size: tuple[int, int]) -> Tensor:
    """The picture scaled and centre-cropped to ``size`` (width, height): ``[3, h, w]`` float32 in -1..1."""
    import torch

    image = ImageOps.fit(_decode(picture.path), size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 127.5 - 1


def bucket_sizes(side: int, step: int) -> list[tuple[int, int]]:
    """Sizes (width, height) in multiples of ``step`` with at most ``side**2`` pixels and aspect ratio up to :data:`WIDEST`."""
    sizes = set()
    for width in range(step, int(side * WIDEST**0.5) + 1, step):
        height = side * side // width // step * step
        if height and max(width / height, height / width) <= WIDEST:
            sizes.add((width, height))
    sizes.add((side, side))
    return sorted(sizes)


def bucket_of(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest (in logarithm), the larger one of equals."""
    wanted = np.log(width / height)
    return min(sizes, key=lambda size: (round(abs(np.log(size[0] / size[1]) - wanted), 9), -size[0] * size[1], size))


def swap_sides(caption: str) -> str:
    """The caption of the mirrored picture: "left" and "right" change places, keeping capitals."""
    other = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub(r"\b(left|right|Left|Right)\b", lambda match: other[match[0]], caption)


def with_trigger(caption: str, trigger: str, class_word: str) -> str:
    """``caption`` with the trigger put before the class word, or in front when that is not mentioned."""
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    if class_word:
        noun = re.compile(rf"(?<!\w){re.escape(class_word)}(?!\w)", re.IGNORECASE)
        filled, count = noun.subn(lambda match: f"{trigger} {match[0]}", caption, count=1)
        if count:
            return filled
    return f"{trigger} {class_word}, {caption}" if class_word else f"{trigger}, {caption}"


def without_trigger(caption: str, trigger: str) -> str:
    """``caption`` speaking of the class only."""
    return " ".join(re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", " ", caption, flags=re.IGNORECASE).split())


@dataclass(frozen=True)
class BatchPlan:
    """Which items each batch holds. ``groups[g]`` lists the items that may share a batch (one aspect bucket), repeats included.

    Groups take turns in proportion to their size; inside a group the items run through one random order after the other,
    so every item is seen equally often, whatever the batch size.
    """

    groups: tuple[tuple[int, ...], ...]
    batch: int
    seed: int

    def items(self, index: int) -> list[int]:
        """Items of batch number ``index``: a pure function of the plan and the number."""
        owners, turns = self._cycle
        cycle, offset = divmod(index, len(owners))
        group = int(owners[offset])
        members = self.groups[group]
        start = (cycle * len(members) + int(turns[offset])) * self.batch
        places = range(start, start + self.batch)
        orders = {k: self._order(group, k) for k in {place // len(members) for place in places}}
        return [members[orders[place // len(members)][place % len(members)]] for place in places]

    @cached_property
    def _cycle(self) -> tuple[np.ndarray, np.ndarray]:
        """The pattern of turns that repeats: for each batch its group, and how many batches of that group came before.

        The k-th batch of a group of n items is due at ``(k + 1/2) / n``; batches come in the order of their due times.
        """
        due = np.concatenate([(np.arange(len(group)) + 0.5) / len(group) for group in self.groups])
        owners = np.concatenate([np.full(len(group), index) for index, group in enumerate(self.groups)])
        turns = np.concatenate([np.arange(len(group)) for group in self.groups])
        order = np.argsort(due, kind="stable")
        return owners[order], turns[order]

    def _order(self, group: int, round_: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1, group, round_]).permutation(len(self.groups[group]))


def digest(pictures: Sequence[Picture]) -> str:
    """Identity of a data set: files, captions, repeats and masks, in order."""
    rows = [[p.path.name, p.digest, p.caption, p.repeats, *([p.mask_digest] if p.mask_digest else [])] for p in pictures]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
