"""What acts inside one forward, and the loop around it. Importing this room imports no torch: names come on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compose.bank import Adapter, LoraBank
    from compose.denoise import denoise
    from compose.run import Method
    from compose.schedulers import SAMPLERS
    from compose.text import encode, encode_pair

__all__ = [
    "METHODS",
    "SAMPLERS",
    "Adapter",
    "LoraBank",
    "Method",
    "denoise",
    "encode",
    "encode_pair",
    "method_class",
    "method_named",
]

_HOME = {
    "Adapter": "compose.bank",
    "LoraBank": "compose.bank",
    "Method": "compose.run",
    "denoise": "compose.denoise",
    "SAMPLERS": "compose.schedulers",
    "encode": "compose.text",
    "encode_pair": "compose.text",
}

METHODS = {
    "merge": ("compose.merge", "Merge"),
    "switch": ("compose.switch", "Switch"),
    "composite": ("compose.composite", "Composite"),
    "cmlora": ("compose.cmlora", "CMLoRA"),
    "clora": ("compose.clora", "CLoRA"),
    "attend": ("compose.attend", "Attend"),
    "lora-composer": ("compose.lora_composer", "LoraComposer"),
    "masked": ("compose.masked", "Masked"),
    "regional": ("compose.regional", "Regional"),
}
"""Composition methods by name: module and class. The class knows its own options."""


def method_named(name: str, /, **options: Any) -> Method:
    """A fresh composition method with checked options, which may come as text.

    Raises:
        UnknownNameError: no such method, or no such option of it. RequestError: an option does not fit.
    """
    from studio.errors import RequestError, UnknownNameError

    kind = method_class(name)
    try:
        checked = kind.takes.of(**options)
    except UnknownNameError as error:
        owners = [other for other in METHODS if other != name and error.name in method_class(other).takes.model_fields]
        hint = f"({' and '.join(repr(other) for other in owners)} have it)" if owners else ""
        raise UnknownNameError(f"option of method '{name}'", error.name, kind.takes.model_fields, hint) from error
    except RequestError as error:
        raise RequestError(f"method '{name}': option {error}") from error
    # Outside: a method that wraps another raises that one's own errors, which name it.
    return kind(checked)


def method_class(name: str) -> type[Method]:
    """The class of a method of :data:`METHODS`.

    Raises:
        UnknownNameError: there is none.
    """
    from studio.errors import UnknownNameError

    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    module, cls = METHODS[name]
    found: type[Method] = getattr(import_module(module), cls)
    return found


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'compose' has no attribute '{name}'")
