"""Fourier profiles of LoRAs (:mod:`compose.profile`), measured once and kept beside their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compose.bank import Adapter, LoraBank
from compose.profile import Profile, kept, measure, places, stored
from studio.base import load_base
from studio.lora.files import load_lora
from studio.lora.library import find_lora
from studio.paths import EMBEDDED

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """The profile of one LoRA, whether it was ``measured`` just now, and where it is kept (None: nowhere could be written)."""

    name: str
    profile: Profile
    measured: bool
    path: Path | None


def profile(
    names: Sequence[str | Path],
    *,
    base: str = EMBEDDED,
    again: bool = False,
    lora_dirs: Sequence[str | Path] = (),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
) -> Iterator[Profiled]:
    """The profile of each LoRA on ``base``, one after the other; measured where none is kept, or where asked for ``again``.

    Every name is looked up, and every file read, before the first is measured.

    Raises:
        studio.errors.StudioError: with one sentence.
    """
    files = [find_lora(name, lora_dirs) for name in names]
    adapters = [Adapter(name=str(name), lora=load_lora(file)) for name, file in zip(names, files, strict=True)]
    loaded = load_base(base, device, dtype, memory=memory)
    for adapter in adapters:
        found = None if again else stored(adapter, loaded)
        if found is not None:
            yield Profiled(name=adapter.name, profile=found, measured=False, path=kept(found, places(adapter, loaded)))
            continue
        with LoraBank.on(loaded, [adapter]) as bank:
            fresh = measure(loaded, bank, 0)
        yield Profiled(name=adapter.name, profile=fresh, measured=True, path=kept(fresh, places(adapter, loaded)))
