"""Whether a picture fits the device's memory, and what would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from studio.errors import OutOfMemoryError
from studio.media import decode
from studio.placement import free_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from studio.base import Base

LIVE_MAPS = 6
"""Feature maps of the widest level that surely live at once in a block: a lower bound, to refuse nothing that fits."""
TILED = "memory was short: the VAE worked in tiles, which may show faintly"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that memory ran out; on the CPU it is an ordinary RuntimeError."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in told or "out of memory" in told)
    )


def least_bytes(base: Base, size: tuple[int, int], rows: int) -> int:
    """A lower bound for the working memory of denoising ``rows`` rows of ``size`` and decoding one picture."""
    width, height = size
    item = torch.finfo(base.dtype).bits // 8
    cells = (width // base.latent_factor) * (height // base.latent_factor)
    unet = LIVE_MAPS * rows * cells * int(base.unet.config.block_out_channels[0]) * item
    tile = int(base.vae.config.sample_size)
    whole = base.placement.memory == "high"
    return max(unet, vae_bytes(base, size if whole else (min(width, tile), min(height, tile))))


def vae_bytes(base: Base, size: tuple[int, int]) -> int:
    """A lower bound for the working memory of decoding one picture of ``size`` in one piece."""
    return LIVE_MAPS * size[0] * size[1] * int(base.vae.config.block_out_channels[0]) * 4


def decode_within(base: Base, latents: Tensor, notes: list[str]) -> list[Image]:
    """Latents to pictures; in tiles where memory is asked to stay low or a whole picture does not fit."""
    memory, size = base.placement.memory, (latents.shape[-1] * base.latent_factor, latents.shape[-2] * base.latent_factor)
    free = free_bytes(base.device)
    if memory != "low" and (memory == "high" or free is None or vae_bytes(base, size) <= free):
        try:
            return decode(base.vae, latents)
        except (RuntimeError, MemoryError) as error:
            if memory == "high" or not is_out_of_memory(error):
                raise
    with tiles(base):
        images = decode(base.vae, latents)
    if memory != "low" and TILED not in notes:
        notes.append(TILED)
    return images


@contextmanager
def tiles(base: Base) -> Iterator[None]:
    """Meanwhile the VAE works in overlapping tiles of its own picture size."""
    before = base.vae.use_tiling
    base.vae.enable_tiling()
    try:
        yield
    finally:
        if not before:
            base.vae.disable_tiling()


def check_memory(base: Base, size: tuple[int, int], rows: int) -> None:
    """Refuse before sampling what can never fit.

    Raises:
        OutOfMemoryError: with a size that would fit.
    """
    free = free_bytes(base.device)
    need = least_bytes(base, size, rows)
    if free is not None and need > free:
        raise OutOfMemoryError(
            _sentence(base, size, rows, f"at least {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        )


def out_of_memory(base: Base, size: tuple[int, int], rows: int) -> OutOfMemoryError:
    """The error for memory that ran out while sampling."""
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    free = free_bytes(base.device)
    return OutOfMemoryError(_sentence(base, size, rows, f"{(free or 0) / 1e9:.1f} GB are free"))


def _sentence(base: Base, size: tuple[int, int], rows: int, why: str) -> str:
    best = largest_fitting(base, size, rows)
    advice = (
        f"{best[0]}x{best[1]} would fit"
        if best
        else "not even the smallest size would fit: close other programs or use another device"
    )
    return f"{size[0]}x{size[1]} does not fit the memory of {base.device} ({why}): {advice}"


def largest_fitting(base: Base, size: tuple[int, int], rows: int) -> tuple[int, int] | None:
    """The largest smaller size of about the same shape that fits. On a GPU each candidate is really tried for one pass."""
    step = base.size_step
    shorter = size
    while min(shorter) > step:
        shorter = (max(int(shorter[0] * 0.8) // step, 1) * step, max(int(shorter[1] * 0.8) // step, 1) * step)
        free = free_bytes(base.device)
        # On the CPU nothing is tried: an attempt could take minutes, or the whole machine.
        if free is not None and 2 * least_bytes(base, shorter, rows) > free:
            continue
        if base.device.type != "cuda" or _runs(base, shorter, rows):
            return shorter
    return None


@torch.no_grad()
def _runs(base: Base, size: tuple[int, int], rows: int) -> bool:
    """Whether one pass of the UNet over ``rows`` rows and one of the VAE's decoder fit."""
    from compose.text import added_conditions, encode

    width, height = (side // base.latent_factor for side in size)
    try:
        x = torch.zeros(rows, base.latent_channels, height, width, device=base.device)
        text = encode(base, [""]).rows([0] * rows)
        added = added_conditions(base, text, size)
        more = {} if added is None else {"added_cond_kwargs": added}
        base.unet(x.to(base.dtype), torch.zeros((), device=base.device), encoder_hidden_states=text.states, **more)
        decode_within(base, x[:1], [])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return False
    return True
