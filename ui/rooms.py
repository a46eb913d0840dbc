"""A start-up check: are the five rooms really ours?

Five plain top-level names (``studio``, ``ui``, ...) can be taken by another installed package. Python then imports whichever
comes first on its path, and the failure reads like a bug of ours. Nothing here may import another room.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path

ROOMS = ("studio", "compose", "training", "pipelines", "ui")
DISTRIBUTION = "diffusion-customization-studio"
HOME = Path(__file__).resolve().parent.parent
"""The folder that holds all five rooms."""


def shadowed(home: Path = HOME, path: Iterable[str] | None = None) -> list[str]:
    """One line for each room that Python would import from elsewhere than ``home``; an empty list when all is well.

    Args:
        home: folder of our rooms.
        path: what to search instead of ``sys.path``.
    """
    search = list(sys.path if path is None else path)
    lines = []
    for room in ROOMS:
        spec = PathFinder.find_spec(room, search)
        places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
        if spec and not places and spec.origin:
            places = [Path(spec.origin)]
        found = places[0].resolve() if places else None
        if found != (home / room).resolve():
            where = f"is imported from {found}" if found else "is not found"
            lines.append(f"package '{room}' {where}, not from {home / room}")
    return lines


def shared_with() -> dict[str, list[str]]:
    """Room -> other installed distributions that also bring a package of that name (slow: reads every installed record)."""
    owners = packages_distributions()
    others = {room: sorted({name for name in owners.get(room, []) if name.lower() != DISTRIBUTION}) for room in ROOMS}
    return {room: names for room, names in others.items() if names}
