r"""Prompts as people write them, taken apart without any model.

    (word) weighs 1.1 times as much, ((word)) 1.21 times; [word] weighs 1 / 1.1 times as much
    (word:1.3) weighs 1.3 times as much; brackets nest, and their factors multiply
    \( \) \[ \] \\ stand for the characters themselves
    BREAK begins a new chunk of the text encoder
    <lora:name:0.8> asks for a LoRA

Every text is a prompt: a bracket that is never closed acts to the end, one that was never opened is text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from studio.errors import RequestError

STEP = 1.1
MAX_WEIGHT = 100.0
MAX_DEPTH = 200

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_TOKEN = re.compile(
    rf"(?P<escaped>\\[()\[\]\\])|(?P<lone>\\)|(?P<weight>:\s*({_NUMBER})\s*\))|(?P<bracket>[()\[\]])|(?P<text>:|[^\\()\[\]:]+)"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]+)>", re.IGNORECASE)
_SPECIAL = re.compile(r"[()\[\]\\]")
_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_NUMBER_ALONE = re.compile(rf"\s*{_NUMBER}\s*")
_AND = re.compile(r"\bAND\b")


@dataclass(frozen=True)
class Piece:
    """Words with one weight; 1 is as written."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt taken apart: ``sections`` are what BREAK separates, each a run of pieces with different weights."""

    sections: tuple[tuple[Piece, ...], ...]

    @property
    def plain(self) -> str:
        """The words alone."""
        return " ".join("".join(piece.text for piece in section) for section in self.sections)


@dataclass(frozen=True)
class LoraTag:
    """``<lora:name:weight>``."""

    name: str
    weight: float


def parse(text: str) -> Prompt:
    """Take ``text`` apart.

    Raises:
        RequestError: a weight over 100 in size, whose effect could only be noise; too many open brackets; no text.
    """
    if not _is_text(text):
        raise RequestError("the prompt holds bytes that are no text: write it in UTF-8")
    runs: list[tuple[str, float] | None] = []  # None is a BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        for index in range(opened[kind].pop(), len(runs)):
            run = runs[index]
            if run is not None:
                runs[index] = (run[0], run[1] * factor)

    for match in _TOKEN.finditer(text):
        token = match.group()
        if match["escaped"]:
            runs.append((token[1], 1.0))
        elif match["lone"]:
            continue  # as elsewhere: a backslash that escapes nothing is dropped
        elif match["weight"] and opened["("]:
            close("(", float(match.group(4)))
        elif token in opened:
            opened[token].append(len(runs))
            if len(opened[token]) > MAX_DEPTH:
                raise RequestError(f"the prompt opens more than {MAX_DEPTH} brackets '{token}' without closing them")
        elif token == ")" and opened["("]:
            close("(", STEP)
        elif token == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            for index, part in enumerate(_BREAK.split(token)):
                runs += ([None] if index else []) + [(part, 1.0)]
    for kind, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[kind]:
            close(kind, factor)
    return Prompt(_sections(runs))


def _is_text(text: str) -> bool:
    """Whether ``text`` holds whole characters: a command line's wrong bytes and JSON's half ones arrive as surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _sections(runs: list[tuple[str, float] | None]) -> tuple[tuple[Piece, ...], ...]:
    """Neighbours of equal weight joined, empty texts left out."""
    sections: list[list[Piece]] = [[]]
    for run in runs:
        if run is None:
            sections.append([])
            continue
        text, weight = run
        if abs(weight) > MAX_WEIGHT:
            raise RequestError(f"'{text.strip()[:40]}' has the weight {weight:.3g} in the prompt: use at most {MAX_WEIGHT:g}")
        last = sections[-1]
        if last and last[-1].weight == weight:
            last[-1] = Piece(last[-1].text + text, weight)
        elif text:
            last.append(Piece(text, weight))
    return tuple(tuple(section) for section in sections)


def escape(text: str) -> str:
    """``text`` with its brackets and backslashes marked as plain characters; a BREAK in it stays one."""
    return _SPECIAL.sub(lambda match: "\\" + match.group(), text)


def article(noun: str) -> str:
    """``noun`` with the article that its first letter asks for."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def take_tags(text: str) -> tuple[str, tuple[LoraTag, ...]]:
    """The prompt without its ``<lora:...>`` tags, and the tags; a missing weight is 1, weights of one LoRA named twice add up.

    Raises:
        RequestError: a tag that cannot be followed: a weight that is no number, two weights, a hypernetwork.
    """
    weights: dict[str, float] = {}

    def take(match: re.Match[str]) -> str:
        tag = _read_tag(match.group(1).lower(), match.group(2), match.group())
        weights[tag.name] = weights.get(tag.name, 0.0) + tag.weight
        return ""

    rest = _TAG.sub(take, text)
    return (rest.strip() if weights else text), tuple(LoraTag(name, weight) for name, weight in weights.items())


def _read_tag(kind: str, inside: str, whole: str) -> LoraTag:
    if kind == "hypernet":
        raise RequestError(f"the prompt asks for a hypernetwork ({whole}), which the studio does not have: take it out")
    name, *arguments = (part.strip() for part in inside.split(":"))
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    given = [argument for argument in arguments if "=" not in argument]
    given += [named[key] for key in ("te", "unet") if key in named]
    if not name or set(named) - {"te", "unet"} or len(given) > 2:
        raise RequestError(f"{whole} in the prompt is not <lora:NAME:WEIGHT>")
    try:
        numbers = {float(number) for number in given} or {1.0}
    except ValueError:
        raise RequestError(f"{whole} in the prompt is not <lora:NAME:WEIGHT>: '{':'.join(given)}' is no number") from None
    if not all(math.isfinite(number) for number in numbers):
        raise RequestError(f"{whole} in the prompt is not <lora:NAME:WEIGHT>: the weight must be a finite number")
    if len(numbers) > 1:
        raise RequestError(f"{whole} asks for two weights, but a LoRA acts on text encoder and UNet with one: write one")
    return LoraTag(name, numbers.pop())


def not_followed(text: str) -> list[str]:
    """Notes on notations of other programs that are read here as ordinary words and brackets."""
    bare = re.sub(r"\\.", "  ", text)
    notes = [
        f"'{match.group()[:80]}' changes with the step in other programs; here it is read as words in square brackets"
        for match in _INNERMOST.finditer(bare)
        if _is_scheduled(match.group(1))
    ]
    if _AND.search(bare):
        notes.append("'AND' joins whole prompts in other programs; here it is read as a word")
    return notes


def _is_scheduled(inside: str) -> bool:
    """Whether ``[inside]`` is ``[from:to:when]``, ``[to:when]`` or ``[one|other]``."""
    _, colon, when = inside.rpartition(":")
    return "|" in inside or (colon != "" and _NUMBER_ALONE.fullmatch(when) is not None)
