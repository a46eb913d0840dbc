"""Masks of training pictures: which part of each is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from studio.errors import FileError, RequestError
from studio.media import DAMAGED
from training.dataset import PICTURES, Picture

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = "alpha"
"""Instead of a folder of masks: what is transparent in a picture is not learnt."""


def with_masks(pictures: Sequence[Picture], where: Path) -> list[Picture]:
    """``pictures`` with their masks, of the same names in the folder ``where``, or their own transparency.

    Raises:
        FileError: no such folder, a mask of no picture, one that cannot be read.
        RequestError: no picture has one.
    """
    if str(where) == ALPHA:
        masked = [picture if _alpha(picture.path) is None else replace(picture, mask=picture.path) for picture in pictures]
        missing = "no picture is transparent anywhere: cut the subject out, or give a folder of masks"
    else:
        masked = _from_folder(pictures, where)
        missing = f"no masks in '{where}': put pictures there that are white where theirs are learnt"
    if not any(picture.mask for picture in masked):
        raise RequestError(missing)
    return masked


def _from_folder(pictures: Sequence[Picture], folder: Path) -> list[Picture]:
    if not folder.is_dir():
        raise FileError(f"the folder of masks '{folder}' does not exist: check the path, or say '{ALPHA}' for transparency")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith("."))
    by_stem = {file.stem: file for file in files}
    stems = {picture.path.stem for picture in pictures}
    for file in files:
        if file.stem not in stems or by_stem[file.stem] != file:
            rival = "has no picture of the same name" if file.stem not in stems else "is one of two of that name"
            raise FileError(f"mask '{file}' {rival}: rename or remove it")
    return [
        picture if mask is None else replace(picture, mask=mask, mask_digest=sha256(_light(mask).tobytes()).hexdigest())
        for picture in pictures
        for mask in [by_stem.get(picture.path.stem)]
    ]


def check_masks(pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse masks that leave nothing of their picture, as it is cropped to its size (width, height).

    Raises:
        RequestError: one that is black all over. FileError: one whose proportions are not its picture's.
    """
    for picture, size in zip(pictures, sizes, strict=True):
        if picture.mask is None:
            continue
        width, height = _shades(picture).size
        if abs(width / height - picture.width / picture.height) > 0.02 * picture.width / picture.height:
            raise FileError(
                f"mask '{picture.mask}' is {width} x {height}, but its picture {picture.width} x {picture.height}: "
                "give it the same proportions"
            )
        if not bool(mask_pixels(picture, size).any()):
            raise RequestError(
                f"mask '{picture.mask}' leaves nothing of '{picture.path.name}' to learn: make the subject white"
            )


def mask_pixels(picture: Picture, size: tuple[int, int]) -> Tensor:
    """What is learnt of ``picture``, scaled and cropped as it is to ``size`` (width, height): ``[1, h, w]``, 0..1; all of it
    without a mask."""
    import torch

    if picture.mask is None:
        return torch.ones(1, size[1], size[0])
    shades = ImageOps.fit(_shades(picture), size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(shades, np.float32))[None] / 255


def _shades(picture: Picture) -> Image.Image:
    if picture.mask is None:
        raise RuntimeError("a picture without a mask")
    return (_alpha(picture.mask) if picture.mask == picture.path else None) or _light(picture.mask)


def _alpha(path: Path) -> Image.Image | None:
    """The opacity of a picture; None: it is opaque."""
    try:
        with Image.open(path) as file:
            if not file.has_transparency_data:
                return None
            alpha = ImageOps.exif_transpose(file).convert("RGBA").getchannel("A")
    except DAMAGED as error:
        raise FileError(f"cannot read the picture '{path}': {getattr(error, 'strerror', None) or error}") from None
    return None if alpha.getextrema() == (255, 255) else alpha


def _light(path: Path) -> Image.Image:
    from studio.media import open_picture

    return open_picture(path).convert("L")
