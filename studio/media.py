"""Pictures in and out: between latents, tensors and images, and PNG files that carry the request they came from.

Media tensors are ``[B, F, C, H, W]`` in 0..1; latents are as diffusers has them, ``[B, c, h, w]``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from studio.errors import FileError, NumericsError, RequestError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CHUNK = "studio"
A1111_CHUNK = "parameters"


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
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as stream:
            image.save(stream, "PNG", pnginfo=texts)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def read_request(path: str | Path) -> dict[str, Any]:
    """The JSON that :func:`save_png` wrote into a picture.

    Raises:
        FileError: no PNG, or one that was not made here.
    """
    try:
        with Image.open(path) as image:
            text = image.text.get(CHUNK) if isinstance(image, PngImageFile) else None
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise FileError(f"cannot read the picture {path}: {error}") from error
    if text is None:
        raise FileError(f"{path} carries no request of this studio: only PNGs that it wrote can be run again")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise FileError(f"the request in {path} is damaged: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
        raise FileError(f"the request in {path} is damaged: it holds no 'request'")
    return found


def infotext(
    prompt: str,
    negative: str,
    loras: Sequence[tuple[str, float, str]],
    settings: Mapping[str, object],
) -> str:
    """A1111's ``parameters`` text. ``loras`` are (name, weight, AutoV3 hash); ``settings`` follow in their order."""
    tags = "".join(f" <lora:{name}:{weight:g}>" for name, weight, _ in loras)
    lines = [prompt + tags] + ([f"Negative prompt: {negative}"] if negative else [])
    shown = {**settings}
    if loras:
        hashes = ", ".join(f"{name}: {digest}" for name, _, digest in loras)
        shown["Lora hashes"] = f'"{hashes}"'
    lines.append(", ".join(f"{key}: {value}" for key, value in shown.items()))
    return "\n".join(lines)
