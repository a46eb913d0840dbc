"""What became of every LoRA of a combination in one picture.

Subjects and objects are judged by the judge itself, under three readings of "in its place": the *words* of the prompt (left,
right; what every method was told), the *box* (overlap >= .3), *anywhere*. A subject counts as present in the asked look or in
none: whether the look reached it is the look's own verdict.

* **accessory**: what the first subject wears. Worn by another thing: confused.
* **look**: all things found are in it; where nothing is found, the paper it brings tells. In another look: confused.
* **background**: the name of the paper. Another known background: other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studio.art.atlas import splits
from tests.bench.combinations import LOOKS, STYLE, Case
from tests.bench.judge import Judge, Judgement, Kind, Picture, Verdict, Wanted
from tests.bench.templates import RoundTrip, build_bank, make_keys

READINGS = ("words", "box", "anywhere")


@dataclass(frozen=True)
class Seen:
    """One LoRA in one picture: a verdict under each reading (the same for all where place does not matter), and why."""

    lora: str
    words: Kind
    box: Kind
    anywhere: Kind
    why: str

    def row(self) -> dict[str, Any]:
        return asdict(self)


def make_judge(roundtrip: RoundTrip, cache: Path) -> Judge:
    """A judge that knows the whole atlas as it is drawn, and named and held-out concepts in the looks of the testbed."""
    redrawn = (*splits().named, *splits().heldout["concept"])
    keys = make_keys(None) + make_keys(redrawn, (STYLE,), tuple(t.content for t in LOOKS))
    return Judge(bank=build_bank(keys, roundtrip, cache=cache))


def wanted(case: Case, things: Sequence[str], reading: str, look: str | None) -> list[Wanted]:
    """What the judge is asked for."""
    places = {"words": case.places, "box": case.boxes, "anywhere": (None,) * len(things)}[reading]
    return [Wanted(thing, STYLE, look, place) for thing, place in zip(things, places, strict=True)]


def seen(judge: Judge, picture: Picture, case: Case, things: Sequence[str] = ()) -> list[Seen]:
    """The verdict on each LoRA of ``case``; ``things``: other concepts stand in for its own."""
    drawn = tuple(things) or case.things
    looked = judge.verdicts(picture, wanted(case, drawn, "anywhere", case.look))
    by_reading = {reading: _things(judge, looked, case, drawn, reading) for reading in READINGS}
    found: list[Seen] = []
    for index, taught in enumerate(case.of("subject", "object")):
        verdicts = [by_reading[reading][index] for reading in READINGS]
        words, box, anywhere = (v.kind for v in verdicts)
        found.append(Seen(taught.name, words, box, anywhere, verdicts[0].why))
    things_there = by_reading["anywhere"]
    for taught in case.of("accessory", "look", "background"):
        if taught.role == "accessory":
            kind, why = accessory_verdict(judge, picture, looked, things_there, taught.content)
        elif taught.role == "look":
            kind, why = look_verdict(looked, things_there, taught.content, judge.tau)
        else:
            kind, why = background_verdict(looked.paper.name, taught.content)
        found.append(Seen(taught.name, kind, kind, kind, why))
    return found


def _things(judge: Judge, looked: Judgement, case: Case, things: Sequence[str], reading: str) -> list[Verdict]:
    """Verdicts on the things in the asked look; where one is missing, but present without it, the latter."""
    asked = judge.again(looked, wanted(case, things, reading, case.look)).verdicts
    if case.look is None:
        return list(asked)
    plain = judge.again(looked, wanted(case, things, reading, None)).verdicts
    return [p if p.kind == "present" and a.kind != "present" else a for a, p in zip(asked, plain, strict=True)]


def accessory_verdict(
    judge: Judge, picture: Picture, looked: Judgement, things: Sequence[Verdict], accessory: str
) -> tuple[Kind, str]:
    """Whether the first thing wears it; where that is missing, the best subject found."""
    solid = [finding for finding in looked.findings if finding.score >= judge.tau]
    wearer = things[0].finding if things[0].kind == "present" else solid[0] if solid else None
    if wearer is None:
        return "vanished", "nobody there to wear it"
    worn = judge.accessory(picture, wearer)
    if worn == accessory:
        return "present", f"{wearer.key.concept} wears it"
    if any(judge.accessory(picture, other) == accessory for other in solid if other is not wearer):
        return "confused", "another wears it"
    return ("vanished", "not worn") if worn is None else ("other", f"wears {worn}")


def look_verdict(looked: Judgement, things: Sequence[Verdict], look: str, tau: float) -> tuple[Kind, str]:
    """Whether all that is drawn is in ``look``."""
    serving = [v.finding for v in things if v.kind == "present" and v.finding is not None]
    shown = serving or [finding for finding in looked.findings if finding.score >= tau][:1]
    if not shown:
        paper = looked.paper.look
        return ("present", "by its paper") if paper == look else ("vanished", "nothing drawn in it")
    looks = {finding.key.look for finding in shown}
    if looks == {look}:
        return "present", "all in it"
    strange = looks - {look, None}
    return ("confused", f"in {min(map(str, strange))}") if strange else ("vanished", "drawn plainly")


def background_verdict(name: str | None, background: str) -> tuple[Kind, str]:
    """Whether the paper is the one asked for."""
    if name == background:
        return "present", "its paper"
    return ("vanished", "no known paper") if name is None else ("other", f"{name} instead")
