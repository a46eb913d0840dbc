"""One call, one result. Importing this room imports no torch: names are fetched on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.again import rerun
    from pipelines.image import GenerateResult, generate
    from pipelines.preview import previewer

__all__ = ["GenerateResult", "generate", "previewer", "rerun"]

_HOME = {
    "GenerateResult": "pipelines.image",
    "generate": "pipelines.image",
    "previewer": "pipelines.preview",
    "rerun": "pipelines.again",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
