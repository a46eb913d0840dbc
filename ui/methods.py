"""What methods there are and what options they have, told from the methods themselves.

One line per method is read from the source, without importing it, so that ``--help`` needs no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from compose.run import Options

NUMBERS = {int: "whole number", float: "number", str: "text", bool: "true | false"}


@dataclass(frozen=True, kw_only=True)
class OptionHelp:
    """One option of a method: what it takes, what it is when left out, and what it does."""

    name: str
    values: str
    default: Any
    help: str


@dataclass(frozen=True, kw_only=True)
class MethodHelp:
    """One method. ``regions``: "none", "optional" or "required"."""

    name: str
    summary: str
    regions: str
    options: tuple[OptionHelp, ...]


@cache
def summaries() -> dict[str, str]:
    """One line per method: the first of its class's docstring."""
    from compose import METHODS

    return {name: _first_line(module, cls) for name, (module, cls) in METHODS.items()}


def _first_line(module: str, cls: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls), None)
    text = (ast.get_docstring(found) or "") if found else ""
    return _plain(text.split("\n\n")[0])


def listing() -> str:
    """A line per method, for help texts."""
    lines = summaries()
    wide = max(map(len, lines))
    return "\n".join(f"  {name:<{wide}}  {text}" for name, text in lines.items())


def describe(name: str) -> MethodHelp:
    """Everything about the method called ``name``.

    Raises:
        UnknownNameError: there is none.
    """
    from compose import method_named

    method = method_named(name)
    told = option_texts(method.takes)
    options = tuple(
        OptionHelp(
            name=key,
            values=values_of(field.annotation, field.metadata),
            default=field.get_default(call_default_factory=True),
            help=_plain(field.description or told.get(key, "")),
        )
        for key, field in method.takes.model_fields.items()
    )
    return MethodHelp(name=name, summary=summaries()[name], regions=type(method).regions, options=options)


def option_texts(options: type[Options]) -> dict[str, str]:
    """What the docstrings of an options class and its bases say of each option.

    Each stands on a line of its own, ``name: what it does``, and goes on until the next one's.
    """
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        text = cleandoc(cls.__doc__ or "")
        if text and set(vars(cls).get("__annotations__", {})):
            found |= _texts(text, list(options.model_fields))
    return found


def _texts(text: str, names: Sequence[str]) -> dict[str, str]:
    heads = list(re.finditer(rf"^\s*({'|'.join(map(re.escape, names))}):\s", text, re.MULTILINE))
    ends = [match.start() for match in heads[1:]] + [len(text)]
    return {match[1]: text[match.end() : end].strip() for match, end in zip(heads, ends, strict=True)}


def _plain(text: str) -> str:
    """One line, without the marks of a docstring."""
    text = re.sub(r":\w+:`~?([^`]*)`", lambda match: match[1].rsplit(".", 1)[-1], " ".join(text.split()))
    return text.replace("``", "").strip()


def range_of(limits: Iterable[Any]) -> str:
    """The bounds among the marks of a type, in words: `` 0..1``, `` over 0``; "" when there are none."""
    found = {
        name: value for one in limits for name in ("ge", "gt", "le", "lt") if (value := getattr(one, name, None)) is not None
    }
    match found:
        case {"ge": low, "le": high}:
            return f" {low}..{high}"
        case {"ge": low, "lt": high}:
            return f" from {low}, under {high}"
        case {"gt": low, "le": high}:
            return f" over {low}, to {high}"
        case {"ge": low}:
            return f" from {low}"
        case {"gt": low}:
            return f" over {low}"
    return ""


def values_of(kind: Any, limits: Iterable[Any] = ()) -> str:
    """What an option takes, in words; ``limits`` are the marks of its type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in NUMBERS:
        return NUMBERS[kind] + range_of(limits)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(values_of(part) for part in inner if part is not NoneType)
    if hasattr(kind, "__metadata__"):
        marks = [deep for mark in kind.__metadata__ for deep in (mark, *getattr(mark, "metadata", ()))]
        return values_of(inner[0], [*limits, *marks])
    if origin is tuple and inner[1:] == (...,):
        one = "name" if inner[0] is str else values_of(inner[0])
        return f"{one},..."
    if origin is tuple:
        return ",".join(values_of(part) for part in inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "JSON"
    return getattr(kind, "__name__", str(kind))


def shown(value: Any) -> str:
    """A default as it would be written."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "-"
    return "-" if value in (None, {}) else str(value)


def page(methods: Sequence[MethodHelp]) -> Iterator[Any]:
    """What ``studio methods`` prints: for each method its line and a table of options."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for method in methods:
        where = {"none": "", "optional": " Takes regions.", "required": " Needs regions."}[method.regions]
        yield Text.assemble((method.name, "bold"), f"  {method.summary}{where}")
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title, ratio in (("--set", None), ("values", 2), ("default", None), ("what it does", 5)):
            drawn.add_column(title, overflow="fold", ratio=ratio)
        for option in method.options:
            drawn.add_row(option.name, Text(option.values), Text(shown(option.default)), Text(option.help))
        yield Padding(drawn if method.options else Text("no options"), (0, 0, 0, 2))
