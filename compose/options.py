"""How the options of methods may be written: what several of them have in common."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from studio.requests import Finite

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Strength = Annotated[Finite, Field(ge=0)]


def names(value: object) -> object:
    """A list of names, also written ``name,name``."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def numbers(value: object) -> object:
    """A list of numbers, also written ``2,3``, or as the only one that it has."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return names(value)


def from_json(value: object) -> object:
    """A mapping, also written as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
