"""The testbed of the composition methods: 22 LoRAs and 120 combinations of them, frozen by seed.

60 combinations of two or three subjects with boxes, 60 of one subject with one to four others (an accessory, a look, a
background, an object). Half of each kind is for choosing constants (*development*), half for the tables (*report*); no set of
LoRAs is in both halves, and no seed. With six subjects, both halves know all six.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from typing import Literal, get_args

import numpy as np

from studio.art.atlas import STYLES, concepts
from studio.art.backgrounds import BASE, PHRASES
from studio.art.captions import compose_caption
from studio.art.looks import brings_background
from studio.art.scenes import SIDE, Box, Placement, Scene, draw
from studio.prompts import article
from tests.bench.compose_layouts import Layout, boxes_of, level

Role = Literal["subject", "object", "accessory", "look", "background"]
ROLES: tuple[Role, ...] = get_args(Role)
Kind = Literal["subjects", "others"]
Half = Literal["development", "report"]

STYLE = "3d"
"""Art style in which subjects and objects are taught and asked for."""
FREEZE = 61
"""Seed of everything that is drawn here."""
SEEDS = 1000
"""Pictures a case can have before its seeds meet those of the next."""


@dataclass(frozen=True)
class Taught:
    """One LoRA of the testbed. ``content``: the concept, accessory, look or background it is taught; ``name``: of its file."""

    name: str
    role: Role
    content: str
    trigger: str

    @property
    def class_word(self) -> str:
        """What the thing is, for people and for the trainer."""
        if self.role in ("subject", "object"):
            return concepts()[self.content].class_word
        return {"accessory": self.content, "look": "picture", "background": "background"}[self.role]

    @property
    def phrase(self) -> str:
        """Trigger and class word: what prompts say."""
        return f"{self.trigger} {self.class_word}"


SUBJECTS = (
    Taught("cat-face", "subject", "cat face", "zarn"),
    Taught("dog-face", "subject", "dog face", "wexi"),
    Taught("unicorn", "subject", "unicorn", "quil"),
    Taught("helicopter", "subject", "helicopter", "wug"),
    Taught("rooster", "subject", "rooster", "fip"),
    Taught("rose", "subject", "rose", "dax"),
)
"""Three of one class word, three of others."""
ACCESSORIES = (
    Taught("hat", "accessory", "hat", "zib"),
    Taught("crown", "accessory", "crown", "torv"),
    Taught("bow", "accessory", "bow", "mip"),
    Taught("halo", "accessory", "halo", "gav"),
)
OBJECTS = (
    Taught("pizza", "object", "pizza", "plov"),
    Taught("teapot", "object", "teapot", "kez"),
    Taught("police-car", "object", "police car", "rud"),
    Taught("star", "object", "star", "yol"),
)
LOOKS = (
    Taught("pixel", "look", "pixel", "pixu"),
    Taught("pastel", "look", "pastel", "sopi"),
    Taught("blueprint", "look", "blueprint", "blupo"),
    Taught("neon", "look", "neon", "nevi"),
)
BACKGROUNDS = (
    Taught("stripes", "background", "stripes", "vask"),
    Taught("checker", "background", "checker", "chom"),
    Taught("night", "background", "night", "lurn"),
    Taught("sand", "background", "sand", "hesp"),
)
LORAS: dict[str, Taught] = {t.name: t for t in (*SUBJECTS, *ACCESSORIES, *OBJECTS, *LOOKS, *BACKGROUNDS)}


@dataclass(frozen=True)
class Case:
    """One combination, or one LoRA alone (``kind`` "single").

    Args:
        id: unique and stable.
        loras: names, subjects first; the order of the request. K is their number.
        boxes: one per LoRA that draws a thing (subjects, then the object), in fractions.
        background: a background the base knows; "" when a LoRA brings it.
        host: for singles of accessories, looks and backgrounds: the named concept that wears or shows them.
        seed: of the first picture; the others count on from it.
    """

    id: str
    kind: Literal["subjects", "others", "single"]
    half: Half
    layout: Layout
    loras: tuple[str, ...]
    boxes: tuple[Box, ...]
    background: str
    seed: int
    host: str = ""

    def of(self, *roles: Role) -> tuple[Taught, ...]:
        return tuple(LORAS[name] for name in self.loras if LORAS[name].role in roles)

    def one(self, role: Role) -> Taught | None:
        return next(iter(self.of(role)), None)

    @property
    def things(self) -> tuple[str, ...]:
        """Concepts drawn, one per box."""
        return tuple(t.content for t in self.of("subject", "object")) or (self.host,)

    @property
    def look(self) -> str | None:
        found = self.one("look")
        return found.content if found else None

    @property
    def one_noun(self) -> bool:
        """Whether two subjects share their class word."""
        nouns = [t.class_word for t in self.of("subject")]
        return len(set(nouns)) < len(nouns)

    @property
    def places(self) -> tuple[str | None, ...]:
        """What the words say of each thing's place; None: nothing (the third of three stands above or below the others)."""
        if len(self.boxes) == 1:
            return (third_of(self.boxes[0]),)
        return ("left", "right", None)[: len(self.boxes)]


def third_of(box: Box) -> str:
    """``left``, ``right`` or ``center`` by where the middle of a box lies, as captions have it."""
    x = (box[0] + box[2]) / 2
    return "left" if x < 0.4 else "right" if x > 0.6 else "center"


def prompt_of(case: Case, stand_ins: dict[str, str] | None = None) -> str:
    """What is asked for in words. ``stand_ins``: other nouns for some concepts.

    Places come first, as users are told to have it: a causal text encoder cannot tell a noun of a place that follows it.
    """
    accessory, look, paper = case.one("accessory"), case.one("look"), case.one("background")
    phrases = {t.content: t.phrase for t in case.of("subject", "object")} | (stand_ins or {})
    subjects = []
    for index, (thing, place) in enumerate(zip(case.things, case.places, strict=True)):
        noun = phrases.get(thing, thing)
        if index == 0 and accessory:
            noun += f" wearing {article(accessory.phrase)}"
        subjects.append((article(noun), place or "center"))
    background = paper.phrase if paper else PHRASES[case.background] if case.background else None
    return compose_caption(subjects, look.phrase if look else STYLES[STYLE][0], background, place_first=True)


def scene_of(case: Case) -> Scene:
    """The true picture of a combination: every thing in its box, a nested one's host in the corner that stays free."""
    accessory, paper = case.one("accessory"), case.one("background")
    items = []
    for index, (thing, box) in enumerate(zip(case.things, case.boxes, strict=True)):
        x0, y0, x1, y1 = (side * SIDE for side in box)
        size = min(round(max(x1 - x0, y1 - y0)), 28)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        if case.layout == "nested" and index == 0:
            inner = case.boxes[1]
            y = y0 + size / 2 if inner[1] > box[1] else y1 - size / 2
            x = x0 + size / 2 if inner[0] > box[0] else x1 - size / 2
        item = Placement(thing, STYLE, x, y, size)
        if accessory and index == 0:
            worn = replace(item, accessory=accessory.content)
            # A drawing is placed by its middle: what sits on the head moves the middle up.
            item = replace(worn, y=y - (draw(worn).shape[0] - draw(item).shape[0]) / 2)
        items.append(item)
    return Scene(tuple(items), paper.content if paper else case.background or "white", case.look)


@lru_cache(maxsize=1)
def all_cases() -> tuple[Case, ...]:
    """All 120 combinations, development before report."""
    return (*subject_cases(), *other_cases())


def cases(half: Half, kind: Kind | None = None) -> tuple[Case, ...]:
    return tuple(case for case in all_cases() if case.half == half and kind in (None, case.kind))


@lru_cache(maxsize=1)
def subject_cases() -> tuple[Case, ...]:
    """60 combinations of two or three subjects: 24 of one noun, 24 whose boxes touch or lie in one another."""
    rng = np.random.default_rng([FREEZE, 1])
    # Per half: sets of (size, one noun?), how many combinations, and their layouts.
    plan: tuple[tuple[int, bool, int, tuple[Layout, ...]], ...] = (
        (2, True, 6, ("apart", "touching", "nested")),
        (2, False, 12, ("apart", "apart", "touching", "apart", "nested", "apart")),
        (3, True, 6, ("apart", "touching", "apart")),
        (3, False, 6, ("apart", "touching", "apart")),
    )
    found: list[Case] = []
    for size, one_noun, count, layouts in plan:
        sets = [s for s in combinations(SUBJECTS, size) if (len({t.class_word for t in s}) < size) is one_noun]
        order = rng.permutation(len(sets))
        cut = len(sets) // 2
        for half, mine in (("development", order[:cut]), ("report", order[cut:])):
            for index in range(count):
                subjects = [sets[mine[index % len(mine)]][i] for i in rng.permutation(size)]
                layout, boxes = layouts[index % len(layouts)], boxes_of(rng, layouts[index % len(layouts)], size)
                background = str(rng.choice(BASE))
                found.append(
                    Case(
                        id=f"{half[:3]}-s{sum(c.half == half for c in found):02d}",
                        kind="subjects",
                        half=half,  # type: ignore[arg-type]
                        layout=layout,
                        loras=tuple(t.name for t in subjects),
                        boxes=boxes,
                        # With three subjects a background would not fit what the text encoder reads at once.
                        background=background if size < 3 else "",
                        seed=SEEDS * (1 + len(found)),
                    )
                )
    return tuple(sorted(found, key=lambda case: (case.half, _spread(case.id))))


def _spread(name: str) -> tuple[int, str]:
    """Mixes the groups, so that the first few combinations show all of them."""
    return int(name[-2:]) * 7 % 30, name


@lru_cache(maxsize=1)
def other_cases() -> tuple[Case, ...]:
    """60 combinations of one subject with one to four others, 15 of each number; at most one other of a role."""
    rng = np.random.default_rng([FREEZE, 2])
    found: list[Case] = []
    taken: set[frozenset[str]] = set()
    used: Counter[str] = Counter()
    roles = {"accessory": ACCESSORIES, "object": OBJECTS, "look": LOOKS, "background": BACKGROUNDS}
    for others in range(1, 5):
        groups = list(combinations(roles, others))
        sets = [
            (subject, *more)
            for group in groups
            for more in product(*(roles[role] for role in group))
            for subject in SUBJECTS
            if _goes_together(more)
        ]
        by_group = [[s for s in sets if tuple(t.role for t in s[1:]) == group] for group in groups]
        for half, count in (("development", 8 if others % 2 else 7), ("report", 7 if others % 2 else 8)):
            for index in range(count):
                group = by_group[index % len(by_group)]
                free = [s for s in group if frozenset(t.name for t in s) not in taken]
                # Some looks fit few groups: those used least so far go first.
                fewest = min(used[_look(s)] for s in free)
                free = [s for s in free if used[_look(s)] == fewest]
                picked = free[int(rng.integers(len(free)))]
                taken.add(frozenset(t.name for t in picked))
                look = _look(picked)
                used[look] += look != ""
                paper = any(t.role == "background" for t in picked)
                things = [t for t in picked if t.role in ("subject", "object")]
                found.append(
                    Case(
                        id=f"{half[:3]}-o{sum(c.half == half for c in found):02d}",
                        kind="others",
                        half=half,  # type: ignore[arg-type]
                        layout="words",
                        loras=tuple(t.name for t in (*things, *(t for t in picked if t not in things))),
                        boxes=level(rng, len(things)),
                        background="" if paper or brings_background(look) else str(rng.choice(BASE)),
                        seed=SEEDS * (101 + len(found)),
                    )
                )
    return tuple(sorted(found, key=lambda case: (case.half, _spread(case.id))))


def _goes_together(others: Sequence[Taught]) -> bool:
    """Whether the judge can see them all in their true picture.

    A look with a background of its own leaves no room for another; in outlines, and in twelve cells, too little is left of a
    head that wears something.
    """
    look, roles = _look(others), {t.role for t in others}
    paper_twice = brings_background(look) and "background" in roles
    return not paper_twice and not ("accessory" in roles and look not in ("", "pastel"))


def _look(loras: Sequence[Taught]) -> str:
    return next((t.content for t in loras if t.role == "look"), "")


HOSTS = ("frog", "panda", "fox", "penguin", "car", "apple")
"""Named concepts that wear an accessory, or stand in a look or before a background, when its LoRA acts alone."""
SLOTS: dict[Role, tuple[str, ...]] = {
    "subject": ("left", "right", "center"),
    "object": ("left", "right", "center"),
    "accessory": ("center",),
    "look": ("center",),
    "background": ("center",),
}


@lru_cache(maxsize=1)
def single_cases() -> tuple[Case, ...]:
    """Every LoRA alone, in each slot it is asked for: three pictures' worth of prompts a slot."""
    rng = np.random.default_rng([FREEZE, 3])
    where = {"left": (2, 18, 30, 46), "right": (34, 18, 62, 46), "center": (18, 24, 46, 52)}
    found: list[Case] = []
    for taught in LORAS.values():
        for slot in SLOTS[taught.role]:
            for index in range(3):
                own_paper = taught.role == "background" or brings_background(taught.content)
                x0, y0, x1, y1 = where[slot]
                found.append(
                    Case(
                        id=f"{taught.name}-{slot}-{index}",
                        kind="single",
                        half="report",
                        layout="words",
                        loras=(taught.name,),
                        boxes=((x0 / SIDE, y0 / SIDE, x1 / SIDE, y1 / SIDE),),
                        background="" if own_paper else str(rng.choice(BASE)),
                        seed=SEEDS * (201 + len(found)),
                        host="" if taught.role in ("subject", "object") else str(rng.choice(HOSTS)),
                    )
                )
    # LoRAs in turn, so that a run cut short has seen all of them.
    return tuple(sorted(found, key=lambda case: (int(case.id[-1]), list(LORAS).index(case.loras[0]))))


def slot_of(case: Case, name: str) -> tuple[str, str]:
    """The LoRA and the slot whose single rate is the ceiling of ``name`` in this combination."""
    if LORAS[name].role in ("subject", "object"):
        drawn = [t.name for t in case.of("subject", "object")]
        return name, case.places[drawn.index(name)] or "center"
    return name, "center"


def stand_ins(case: Case) -> tuple[str, ...]:
    """Named concepts in place of the things of a combination: what the base can do with subjects it knows."""
    rng = np.random.default_rng([FREEZE, 4, case.seed])
    return tuple(str(name) for name in rng.choice(HOSTS, len(case.boxes), replace=False))
