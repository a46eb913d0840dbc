"""What is said in the regions of a request, where their makers say nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compose.finder import says
from studio.prompts import article, escape

if TYPE_CHECKING:
    from compose.bank import Adapter

Said = Literal["placed", "arranged", "local", "whole"]
"""What a region without a prompt says: "local": its subject, as "trigger class", and what the prompt says about the whole
picture: its clauses, cut at commas, that name no subject; "placed": that in the prompt's own order, with where it is, as in "a
3d render, on the left a zarn animal, blue background"; "arranged": the same with all subjects in their places, those of other
regions by their class words if their LoRAs tell any, as in "a 3d render, on the left a zarn animal and on the right a flower
and at the top a bird"; "whole": the prompt.
"""
SIDES = ("on the left", "on the right")
"""The places that come first in a sentence, in this order."""
HEAD = re.compile(r"(?!.*\b(?:on|in|at|to|by|with|and)\b)[\w-]+(?: [\w-]+){0,3}")
"""What a picture is, as in "a 3d render of": few words and no place."""
APART = 0.1
"""How far to one side of all others, as a share of the width, something in the middle must be to be said to be there."""
WIDE = 0.9
"""Regions wider than this share of the picture are on no side of others: they lie behind or around them."""


@dataclass(frozen=True, eq=False)
class Place:
    """A region's ``middle`` (x, y) and ``width``, shares of the picture, and the LoRAs it names."""

    middle: tuple[float, float]
    width: float
    own: Sequence[Adapter]

    def named(self, how: Literal["called", "class"]) -> str:
        """What is there, as in "a zarn animal", or by its class word alone, "an animal"; "": nothing is known."""
        words = [adapter.lora.class_word if how == "class" else adapter.lora.called for adapter in self.own]
        return " and ".join(escape(article(each)) for each in words if each)


@dataclass(frozen=True, eq=False, kw_only=True)
class Arrangement:
    """The regions of a request in order, and the LoRAs that act everywhere."""

    places: Sequence[Place]
    styles: Sequence[Adapter]

    @property
    def subjects(self) -> list[Adapter]:
        """The LoRAs that some region names."""
        return [adapter for place in self.places for adapter in place.own]

    def besides(self, index: int) -> list[int]:
        """The other regions, each once: one may be in the request several times."""
        seen, found = [self.places[index]], []
        for at, place in enumerate(self.places):
            if not any((place.middle, place.own) == (other.middle, other.own) for other in seen):
                seen.append(place)
                found.append(at)
        return found

    def in_order(self, indices: Sequence[int]) -> list[int]:
        """Regions as people name them, whatever their order in the request: from left to right, then those between."""

        def key(index: int) -> tuple[int, float, float]:
            (x, y), where = self.places[index].middle, self.where(index)
            return SIDES.index(where) if where in SIDES else len(SIDES), y, x

        return sorted(indices, key=key)

    def where(self, index: int) -> str:
        """Where the region ``index`` is, as in "on the left"; "": nowhere that has a name."""
        place = self.places[index]
        others = [other.middle[0] for other in self.places if other is not place] if place.width <= WIDE else []
        return placed_words(*place.middle, others)

    def told(self, index: int, how: Literal["called", "class"]) -> str:
        """Where the region ``index`` is and what is there, as in "on the left a zarn animal"; "": nothing is known."""
        named = self.places[index].named(how)
        return f"{self.where(index)} {named}".strip() if named else ""


def said_by_default(whole: str, index: int, arrangement: Arrangement, how: Said) -> str:
    """What is said in the region ``index`` if the picture says ``whole``; "" when its LoRAs name no subject."""
    if how == "whole":
        return whole
    told = arrangement.told(index, "called")
    if not told:
        return ""
    about = style_words(whole, arrangement)
    if how == "local":
        subjects = [escape(phrase) for adapter in arrangement.places[index].own if (phrase := adapter.lora.called)]
        return ", ".join([" and ".join(subjects), *about])
    if how == "arranged":
        own, others = arrangement.places[index], arrangement.besides(index)
        # Two of one name: nobody could say which of them is this region's.
        if own.named("called") not in [arrangement.places[other].named("class") for other in others]:
            every = [
                arrangement.told(at, "called" if at == index else "class") for at in arrangement.in_order([index, *others])
            ]
            told = " and ".join(each for each in every if each)
    before = next((at for at, (_, names_subject) in enumerate(clauses(whole, arrangement)) if names_subject), 0)
    return ", ".join([*about[:before], told, *about[before:]])


def placed_words(x: float, y: float, others: Sequence[float] = ()) -> str:
    """Where something is, in words, whose middle is at ``x``, ``y``; before its noun, as text encoders that are causal need it.

    What is on a side is said to be there, however high, and so is what stands in the middle with all ``others`` (their x) to
    one side of it; "" for anything else in the middle.
    """
    left, right = SIDES
    if not 0.4 <= x <= 0.6:
        return left if x < 0.5 else right
    if others and (min(others) - x >= APART or x - max(others) >= APART):
        return left if x < min(others) else right
    return "at the top" if y < 0.4 else "at the bottom" if y > 0.6 else ""


def style_words(prompt: str, arrangement: Arrangement) -> list[str]:
    """What a prompt says about the whole picture: its clauses that name no subject of a region; and how styles are called that
    it does not name.
    """
    kept = [clause for clause, names_subject in clauses(prompt, arrangement) if not names_subject]
    return [*kept, *unnamed_styles(kept, arrangement)]


def clauses(prompt: str, arrangement: Arrangement) -> list[tuple[str, bool]]:
    """What stands between the commas of a prompt, and whether it names a subject of a region.

    A head such as "a photo", as in "a photo of a cat", is a clause of its own when it names none.
    """
    names = [word for adapter in arrangement.subjects for word in (adapter.lora.trigger, adapter.lora.class_word) if word]

    def about(text: str) -> bool:
        return any(says(text, name) for name in names)

    found: list[tuple[str, bool]] = []
    for clause in (part.strip() for part in _parts(prompt)):
        head, of, _ = clause.partition(" of ")
        if of and about(clause) and not about(head) and HEAD.fullmatch(head):
            found.append((head, False))
        if clause:
            found.append((clause, about(clause)))
    return found


def _parts(prompt: str) -> list[str]:
    """``prompt`` cut at its commas, but for those in brackets; an escaped bracket, and one that is never closed, is a sign like
    any other."""
    signs = re.findall(r"\\.|.", prompt, re.DOTALL)
    opened: list[int] = []
    inside = [0] * (len(signs) + 1)
    for at, sign in enumerate(signs):
        if sign in ("(", "["):
            opened.append(at)
        elif sign in (")", "]") and opened:
            inside[opened.pop()] += 1
            inside[at] -= 1
    found, depth = [""], 0
    for sign, change in zip(signs, inside, strict=False):
        depth += change
        if sign == "," and depth == 0:
            found.append("")
        else:
            found[-1] += sign
    return found


def unnamed_styles(said: Sequence[str], arrangement: Arrangement) -> list[str]:
    """How styles are called that no clause of ``said`` names."""
    return [
        escape(phrase)
        for adapter in arrangement.styles
        if (phrase := adapter.lora.called) and not any(says(clause, adapter.lora.trigger or phrase) for clause in said)
    ]
