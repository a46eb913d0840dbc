"""Models, LoRA files, media and requests; no sampling. Importing this room imports no torch: names are fetched on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.base import Base, load_base
    from studio.errors import StudioError
    from studio.family import FAMILIES, Family
    from studio.requests import GenerateRequest, LoraRef

__version__ = "0.1.0"
__all__ = ["FAMILIES", "Base", "Family", "GenerateRequest", "LoraRef", "StudioError", "__version__", "load_base"]

_HOME = {
    "Base": "studio.base",
    "load_base": "studio.base",
    "StudioError": "studio.errors",
    "FAMILIES": "studio.family",
    "Family": "studio.family",
    "GenerateRequest": "studio.requests",
    "LoraRef": "studio.requests",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'studio' has no attribute '{name}'")
