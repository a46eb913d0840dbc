"""Masks of training pictures: which part of each is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

from studio.errors import FileError, RequestError
from studio.media import opacity, open_mask
from training.config import ALPHA
from training.dataset import PICTURES, Picture, file_digest

if TYPE_CHECKING:
    from torch import Tensor


def with_masks(pictures: Sequence[Picture], where: Path | Literal["alpha"], data: Path) -> list[Picture]:
    """``pictures`` of the folder ``data`` with their masks: of the same names in the folder ``where``, or their transparency.

    Raises:
        FileError: no such folder, a mask of no picture or of two, one that cannot be read.
        RequestError: no picture has one.
    """
    if where == ALPHA:
        masked = [picture if opacity(picture.path) is None else replace(picture, mask=picture.path) for picture in pictures]
        missing = "no picture is transparent anywhere: cut the subject out, or give a folder of masks"
    else:
        masked = _from_folder(pictures, where, data)
        missing = f"no masks in '{where}': put pictures there that are white where theirs are learnt"
    if not any(picture.mask for picture in masked):
        raise RequestError(missing)
    return masked


def _from_folder(pictures: Sequence[Picture], folder: Path, data: Path) -> list[Picture]:
    if not folder.is_dir():
        raise FileError(f"the folder of masks '{folder}' does not exist: check the path, or say '{ALPHA}' for transparency")
    if folder.resolve() == data.resolve():
        raise FileError(f"masks is the folder of the pictures themselves, '{folder}': give another, or say '{ALPHA}'")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file.suffix.lower() in PICTURES and not file.name.startswith(".")
    )
    owners: dict[Path, list[Picture]] = {}
    for picture in pictures:
        owners.setdefault(_name(picture.path, data), []).append(picture)
    found: dict[Path, Path] = {}
    for file in files:
        name = _name(file, folder)
        if name not in owners:
            raise FileError(f"mask '{file}' has no picture of the same name: there is no '{data / name}' with it")
        if name in found or len(owners[name]) > 1:
            rivals = [found[name], file] if name in found else [picture.path for picture in owners[name]]
            raise FileError(f"'{rivals[0]}' and '{rivals[1].name}' share one name: a mask must belong to one picture")
        open_mask(file)  # a torn one is refused before a base is loaded
        found[name] = file
    return [
        replace(picture, mask=mask, mask_digest=file_digest(mask))
        if (mask := found.get(_name(picture.path, data)))
        else picture
        for picture in pictures
    ]


def _name(file: Path, folder: Path) -> Path:
    """What a picture and its mask have in common."""
    return file.relative_to(folder).with_suffix("")


def check_masks(pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse masks that say nothing about their picture, as it is cropped to its size (width, height).

    Raises:
        RequestError: one that is dark all over in what the crop keeps.
        FileError: one whose proportions are not its picture's.
    """
    for picture, size in zip(pictures, sizes, strict=True):
        if picture.mask is None:
            continue
        shades = _shades(picture, picture.mask)
        width, height = shades.size
        if abs(width / height - picture.width / picture.height) > 0.02 * picture.width / picture.height:
            raise FileError(
                f"mask '{picture.mask}' is {width} x {height}, but its picture {picture.width} x {picture.height}: "
                "give it the same proportions"
            )
        own = picture.mask == picture.path
        if (most := int(_fitted(shades, size).max() * 255)) < 128:
            told = f"'{picture.path}' is nearly transparent all over" if own else f"mask '{picture.mask}' is dark all over"
            raise RequestError(
                f"{told} in what a crop to {size[0]} x {size[1]} keeps (at most {most} of 255), so nothing would be learnt: "
                f"make the subject {'opaque' if own else 'white'}"
            )


def mask_pixels(picture: Picture, size: tuple[int, int]) -> Tensor:
    """What is learnt of ``picture``, scaled and cropped as it is to ``size`` (width, height): ``[1, h, w]``, 0..1; all of it
    without a mask."""
    import torch

    if picture.mask is None:
        return torch.ones(1, size[1], size[0])
    return torch.from_numpy(_fitted(_shades(picture, picture.mask), size))[None]


def _fitted(shades: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.array(ImageOps.fit(shades, size, Image.Resampling.BOX), np.float32) / 255


def _shades(picture: Picture, mask: Path) -> Image.Image:
    if mask != picture.path:
        return open_mask(mask)
    return opacity(mask) or Image.new("L", (picture.width, picture.height), 255)
