"""Where shipped files lie: ``assets/`` of a checkout, or the copy packed into the wheel."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from studio.errors import MissingAssetError

EMBEDDED = "embedded"
"""The name of the base model in ``assets/base``; no folder of that name takes its place."""


@lru_cache(maxsize=1)
def assets() -> Path:
    """The folder of shipped assets (atlas, embedded base, example LoRAs).

    Raises:
        MissingAssetError: the installation is incomplete.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "assets", here.parent / "assets"):
        if (folder / "atlas").is_dir():
            return folder
    raise MissingAssetError(f"no shipped assets beside {here}: reinstall diffusion-customization-studio")
