"""Pictures in and out: between latents, tensors and images, and PNG files that carry the request they came from.

Media tensors are ``[B, F, C, H, W]`` in 0..1; latents are as diffusers has them, ``[B, c, h, w]``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from studio.errors import FileError, NumericsError, RequestError
from studio.files import whole

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CHUNK = "studio"
A1111_CHUNK = "parameters"
MAX_TEXT = 2**20
"""Bytes that are read of a text file with an infotext."""
DAMAGED = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises on files that are no pictures, broken, or too large to open safely."""


def images_to_media(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size to ``[B, 1, 3, H, W]`` in 0..1."""
    stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)[:, None].float() / 255


def media_to_images(media: Tensor) -> list[Image.Image]:
    """The first frame of each item of ``[B, F, 3, H, W]`` in 0..1, rounded to 8 bits."""
    pixels = (media[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents ``[B, c, h, w]`` to pictures. One at a time: flat memory, and the same bits in any batch.

    Raises:
        NumericsError: the VAE produced NaN.
    """
    scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels = torch.cat([vae.decode(item[None], return_dict=False)[0] for item in scaled])
    if not bool(torch.isfinite(pixels).all()):
        raise NumericsError("the VAE produced NaN or infinity while decoding: lower the guidance or the LoRA weights")
    return media_to_images(pixels.float()[:, None] / 2 + 0.5)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size to latents ``[B, c, h, w]``: the mean of the posterior, scaled."""
    pixels = images_to_media(images)[:, 0].to(vae.device, vae.dtype) * 2 - 1
    means = torch.cat([vae.encode(item[None]).latent_dist.mode() for item in pixels])
    return means * vae.config.scaling_factor


def open_picture(path: Path) -> Image.Image:
    """A picture file as people see it: turned upright as its camera noted, on white where it is transparent, RGB.

    Raises:
        FileError: no picture, or one too large to open safely.
    """
    return _on(_upright(path, "picture"), "white").convert("RGB")


def open_mask(path: Path) -> Image.Image:
    """A mask file as greys: turned upright as its camera noted, on black where it is transparent.

    Raises:
        FileError: no picture, or one too large to open safely.
    """
    return _on(_upright(path, "mask"), "black").convert("L")


def _on(picture: Image.Image, colour: str) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture)


def _upright(path: Path, what: str) -> Image.Image:
    try:
        with Image.open(path.expanduser()) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I;16"):  # Pillow would cut its gray off at 255 instead of scaling it
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGBA")
    except DAMAGED as error:
        raise FileError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from error


def opacity(path: Path) -> Image.Image | None:
    """How opaque a picture file is, as greys, turned upright; None: it is opaque everywhere.

    Raises:
        FileError: no picture, or one too large to open safely.
    """
    alpha = _upright(path, "picture").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def save_png(path: Path, image: Image.Image, request: Mapping[str, Any], parameters: str) -> None:
    """Write a PNG with ``request`` as JSON and A1111's ``parameters`` text; the file appears whole or not at all.

    Raises:
        RequestError: another suffix than .png. FileError: the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise RequestError(f"cannot write '{path}': pictures are written as .png, which carries the request")
    texts = PngInfo()
    texts.add_text(A1111_CHUNK, parameters)
    texts.add_text(CHUNK, json.dumps(request, ensure_ascii=False))
    with whole(path) as fresh:
        image.save(fresh, "PNG", pnginfo=texts)


@dataclass(frozen=True)
class Carried:
    """What a file tells about how it was made: our own record, and A1111's text."""

    record: dict[str, Any] | None = None
    parameters: str = ""


def read_carried(path: str | Path) -> Carried:
    """What a PNG, JPEG or WebP carries, or an infotext in a ``.txt``.

    Raises:
        FileError: no picture, one without any such text, or a damaged record.
    """
    file = Path(path)
    if file.suffix.lower() == ".txt":
        return Carried(parameters=_short_text(file))
    try:
        with Image.open(file) as image:
            texts: Mapping[str, Any] = image.text if isinstance(image, PngImageFile) else {}
            parameters = str(texts.get(A1111_CHUNK, "")) or _user_comment(image)
    except DAMAGED as error:
        raise FileError(f"cannot read the picture {path}: {error}") from error
    if CHUNK not in texts:
        if not parameters:
            what = "a ComfyUI workflow, which is not read here" if "workflow" in texts else "nothing of how it was made"
            raise FileError(f"{path} carries {what}: give a picture of this studio, or one with A1111's or Forge's infotext")
        return Carried(parameters=parameters)
    try:
        found = json.loads(texts[CHUNK])
    except (ValueError, RecursionError) as error:
        raise FileError(f"the request in {path} is damaged: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
        raise FileError(f"the request in {path} is damaged: it holds no 'request'")
    return Carried(found, parameters)


def _short_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_TEXT).decode("utf-8", "replace")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def _user_comment(image: Image.Image) -> str:
    """EXIF's ``UserComment``, where A1111 writes its text into JPEG and WebP: eight bytes name the encoding."""
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if isinstance(comment, str):
        return comment
    encoding = "utf-16-be" if comment.startswith(b"UNICODE") else "utf-8"
    return comment[8:].decode(encoding, "replace").strip("\0")
