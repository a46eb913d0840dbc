"""Where a base runs: device, number format, and what to do when the card is small.

With *offload* the models stay in main memory and each is brought to the device when it is asked, the one before it is sent
back: only one is on the card at a time. The rest of the studio does not notice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from studio.errors import RequestError
from studio.family import Family

Memory = Literal["low", "auto", "high"]
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "full": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
WORKING_ROOM = 2 * 10**9
"""What sampling needs beside the weights on a card, about: a 512 x 512 picture of SD 1.x in half precision."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How one base is held.

    Args:
        device: where it computes.
        dtype: of UNet and text encoders; the VAE stays in single precision, half overflows in many of them.
        memory: what was asked for.
        offload: whether its models wait in main memory.
    """

    device: torch.device
    dtype: torch.dtype
    memory: str = "auto"
    offload: bool = False


def place(
    family: Family,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
) -> Placement:
    """Where a base is asked to run. Whether it offloads is decided when it is loaded, by :func:`fitted`.

    Args:
        device: ``cuda``, ``cuda:1``, ``mps``, ``cpu``; None or ``auto``: the best there is.
        dtype: a name of :data:`DTYPES`; None or ``auto``: half on a card for families that gain from it, else single.
        memory: ``high`` keeps everything on the card and never tiles the VAE; ``low`` offloads and always tiles; ``auto``
            offloads when the weights leave less than :data:`WORKING_ROOM`, and tiles pictures that would not fit.

    Raises:
        RequestError: an unknown word, or a device this machine does not have.
    """
    where = as_device(device)
    half = family.half and where.type in ("cuda", "mps")
    precision = as_dtype(dtype) or (torch.float16 if half else torch.float32)
    if memory not in get_args(Memory):
        raise RequestError(f"unknown memory setting '{memory}': use low, auto or high")
    return Placement(device=where, dtype=precision, memory=memory)


def fitted(placement: Placement, weights: Callable[[], int]) -> Placement:
    """The placement with its ``offload`` decided, by the memory that is free now.

    Args:
        weights: counts the numbers of the base's weights; asked only where the answer matters.
    """
    where = placement.device
    short = placement.memory == "low" and where.type != "cpu"
    if placement.memory == "auto" and where.type == "cuda":
        free = free_bytes(where)
        short = free is not None and weights() * torch.finfo(placement.dtype).bits // 8 + WORKING_ROOM > free
    return replace(placement, offload=short)


def as_device(device: str | torch.device | None) -> torch.device:
    """A device of this machine, with its index."""
    if device is None or device == "auto":
        return best_device()
    try:
        found = torch.device(device)
    except RuntimeError:
        raise RequestError(f"unknown device '{device}': use auto, cuda, mps or cpu") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = found.index if found.index is not None else (torch.cuda.current_device() if count else 0)
        if index >= count:
            told = "none that torch can use" if count == 0 else f"{count}, numbered from 0"
            raise RequestError(f"device '{device}' is not there: this machine has {told}; use auto or cpu")
        return torch.device("cuda", index)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError("device 'mps' is not there: this machine has no Metal device that torch can use; use auto or cpu")
    if found.type not in ("cpu", "mps"):
        raise RequestError(f"unknown device '{device}': use auto, cuda, mps or cpu")
    return found


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A number format by name; None when the choice is left open."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise RequestError(f"unknown dtype '{dtype}': use auto, float32, float16 or bfloat16")
    return DTYPES[dtype]


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


class Turns:
    """At most one of several models is on the device; it stays until another one is asked.

    A model comes when one of its *entrances* is called (itself, or for a VAE, whose parts are called alone, each of those);
    its inputs come along.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.here: nn.Module | None = None

    def take(self, model: nn.Module, entrances: Iterable[nn.Module]) -> None:
        """Let ``model`` take turns; it is sent to main memory now."""
        model.to("cpu")

        def bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if self.here is not model:
                if self.here is not None:
                    self.here.to("cpu")
                model.to(self.device)
                self.here = model
            return tuple(self._along(value) for value in args), {key: self._along(value) for key, value in kwargs.items()}

        for entrance in entrances:
            entrance.register_forward_pre_hook(bring, with_kwargs=True)

    def _along(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, dict):
            return {key: self._along(one) for key, one in value.items()}
        return value
