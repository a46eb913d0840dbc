"""LoRA files: read any trainer's, write diffusers' and kohya's layouts, find them by name. Imports stay light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.lora.convert import convert_pickle as convert_pickle
    from studio.lora.files import Match as Match
    from studio.lora.files import check_against as check_against
    from studio.lora.files import check_values as check_values
    from studio.lora.files import load_lora as load_lora
    from studio.lora.files import module_shapes as module_shapes
    from studio.lora.files import read_header as read_header
    from studio.lora.files import require_match as require_match
    from studio.lora.identity import LoraHeader as LoraHeader
    from studio.lora.library import find_lora as find_lora
    from studio.lora.library import list_loras as list_loras
    from studio.lora.model import Lora as Lora
    from studio.lora.write import save_lora as save_lora

_HOMES = {
    "convert_pickle": "convert",
    "Match": "files",
    "check_against": "files",
    "check_values": "files",
    "load_lora": "files",
    "module_shapes": "files",
    "read_header": "files",
    "require_match": "files",
    "LoraHeader": "identity",
    "find_lora": "library",
    "list_loras": "library",
    "Lora": "model",
    "save_lora": "write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'studio.lora' has no attribute '{name}'")
    return getattr(import_module(f"studio.lora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
