"""Whether a picture fits the device's memory, and what would."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from studio.errors import OutOfMemoryError

if TYPE_CHECKING:
    from studio.base import Base

LIVE_MAPS = 6
"""Feature maps of the widest level that surely live at once in a block: a lower bound, to refuse nothing that fits."""


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
    vae = LIVE_MAPS * width * height * int(base.vae.config.block_out_channels[0]) * 4
    return max(unet, vae)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on ``device``; None when nobody can tell."""
    if device.type == "cuda":
        return (
            int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    try:
        with open("/proc/meminfo", encoding="ascii") as table:
            for line in table:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return None


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
    from compose.denoise import Run, joined
    from compose.text import encode

    width, height = (side // base.latent_factor for side in size)
    try:
        x = torch.zeros(rows, base.latent_channels, height, width, device=base.device)
        one = encode(base, [""])
        many = one.rows([0] * rows)
        run = Run(base=base, positive=one, negative=one, size=size, guidance=1.0, generators=[], scheduler=None, latents=x[:1])
        run.forward(x, torch.zeros((), device=base.device), many if rows > 1 else joined(one, one).rows([0]))
        base.vae.decode(x[:1].to(base.vae.dtype))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return False
    return True
