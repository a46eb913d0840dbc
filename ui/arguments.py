"""The command line's own small notations, and names for files nobody named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOT_PLAIN = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What PyYAML raises beside its own errors where a value is not what it looks like, such as ``2024-02-30`` or ``!!int foo``."""


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """``OPTION=VALUE`` pairs, values read as YAML (``0.5``, ``true``, ``[a, b]``, ``null``).

    Raises:
        RequestError: no equals sign, or a value that is not YAML.
    """
    import yaml

    from studio.errors import RequestError

    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RequestError(f"--set '{text}' is not OPTION=VALUE, for example rank=8")
        key = key.strip().replace("-", "_")
        if key in values:
            raise RequestError(f"--set {key} is given twice: give it once")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, *NOT_PLAIN):
            raise RequestError(f"--set '{text}': '{value}' is not a YAML value, for example 5, true or [a, b]") from None
    return values


def slug(words: str) -> str:
    """``words`` as part of a file's name: ``a-red-fox``."""
    return "-".join(re.findall(r"[a-z0-9]+", words.lower()))[:48].strip("-") or "picture"


def free_path(folder: Path, words: str, suffix: str) -> Path:
    """A path in ``folder`` that nothing has yet, named after ``words``: ``0007-a-red-fox.png``."""
    taken = [int(match[1]) for path in folder.glob("*") if (match := re.match(r"(\d{4,})-", path.name))]
    return folder / f"{max(taken, default=0) + 1:04d}-{slug(words)}{suffix}"
