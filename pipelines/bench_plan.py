"""What a comparison of methods makes: subjects with their words, combinations drawn by seed, prompts, boxes and requests.

Nothing here loads a weight: what is wrong with a comparison is said before the first picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations as every_combination
from pathlib import Path
from typing import Any, Literal

from compose import METHODS, method_named
from compose.schedulers import sampler_name
from pipelines.bench_request import BenchRequest, Subject, read_subjects
from pipelines.jobs import digest
from pipelines.likeness import check_folder
from studio.base import locate, read_json
from studio.checkpoint import identify
from studio.errors import FileError, RequestError
from studio.family import FAMILIES, Family, detect
from studio.requests import GenerateRequest, LoraRef, Region

Box = tuple[float, float, float, float]
Kind = Literal["reference", "floor", "single", "method"]

PLACES: Mapping[int, tuple[str, ...]] = {
    1: ("in the middle",),
    2: ("on the left", "on the right"),
    3: ("on the left", "in the middle", "on the right"),
}
"""How prompts say where each of so many subjects is, from left to right. The place comes first: see docs/methods.md."""
MARGIN = 0.03
"""Free share of the picture's width on both sides of each column."""
TALL = 1.4
"""Height of a box by its width."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FLOOR, SINGLE, REFERENCE = "floor", "single", "reference"
NO_REGIONS = "regions"
"""The one setting of a row that is no option of its method: ``regions=no`` leaves the boxes out where they may be."""


def boxes_for(count: int, size: tuple[int, int]) -> tuple[Box, ...]:
    """Equal columns with margins, side by side in the middle of the height.

    Args:
        count: of subjects, at least 1. size: of the picture (width, height) in pixels.

    Returns:
        ``(x0, y0, x1, y1)`` for each, as shares, from left to right.
    """
    wide = 1 / count - 2 * MARGIN
    high = min(TALL * wide * size[0] / size[1], 1 - 2 * MARGIN)
    lefts = [index / count + MARGIN for index in range(count)]
    return tuple((round(x, 4), round(0.5 - high / 2, 4), round(x + wide, 4), round(0.5 + high / 2, 4)) for x in lefts)


def draw_combinations(names: Sequence[str], size: int, count: int, seed: int) -> list[tuple[str, ...]]:
    """``count`` sets of ``size`` names, all different, each in a drawn order; every set there is when there are fewer."""
    rng = random.Random(f"{seed} {size}")
    if math.comb(len(names), size) <= count:
        found = [list(one) for one in every_combination(sorted(names), size)]
    else:
        drawn: dict[frozenset[str], list[str]] = {}
        while len(drawn) < count:
            one = rng.sample(sorted(names), size)
            drawn.setdefault(frozenset(one), one)
        return [tuple(one) for one in drawn.values()]
    for one in found:
        rng.shuffle(one)
    return [tuple(one) for one in found]


@dataclass(frozen=True)
class Row:
    """One line of the table: ``label`` as it was asked for. ``asked``: by name, not because all methods are compared."""

    label: str
    kind: Kind
    method: str = "merge"
    options: Mapping[str, Any] | None = None
    regions: bool = False
    asked: bool = False


def rows_of(texts: Sequence[str]) -> list[Row]:
    """The rows of ``--methods``; none given: every method there is.

    Args:
        texts: each ``METHOD[:OPTION=VALUE[,OPTION=VALUE...]]``, several with commas between them.

    Raises:
        UnknownNameError, RequestError: a method or an option that is unknown or does not fit, or one row twice.
    """
    wanted = [one for text in texts for one in parted(text)] or [(name, {}) for name in METHODS]
    rows: list[Row] = []
    for name, settings in wanted:
        options = dict(settings)
        boxes = options.pop(NO_REGIONS, "yes")
        method = method_named(name, **options)
        if boxes not in ("yes", "no") or (boxes == "no" and method.regions != "optional"):
            raise RequestError(
                f"method '{name}': regions={boxes} does not fit: 'no' leaves the boxes out where a method may go without them"
            )
        label = name + (":" + ",".join(f"{key}={value}" for key, value in settings.items()) if settings else "")
        if any(row.label == label for row in rows):
            raise RequestError(f"--methods names '{label}' twice: name it once")
        regions = method.regions != "none" and boxes == "yes"
        rows.append(Row(label, "method", name, options, regions, asked=bool(texts)))
    return rows


def parted(text: str) -> list[tuple[str, dict[str, str]]]:
    """``clora:unit=noise,step=.05,merge`` as methods with their settings; a value may hold commas, ``attend:words=cat,dog``."""
    found: list[tuple[str, dict[str, str]]] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        head, equals, value = part.partition("=")
        name, colon, key = head.partition(":")
        if colon and name.strip() in METHODS and not equals:
            raise RequestError(f"--methods '{part}': '{key}' is not OPTION=VALUE, for example {name}:weight=0.7")
        if equals and colon:
            found.append((name.strip(), {key.strip().replace("-", "_"): value.strip()}))
        elif equals and found:
            found[-1][1][head.strip().replace("-", "_")] = value.strip()
        elif equals:
            raise RequestError(f"--methods '{text}' begins with an option: write its method first, such as clora:{part}")
        elif part not in METHODS and found and found[-1][1]:
            last = next(reversed(found[-1][1]))
            found[-1][1][last] += "," + part
        else:
            found.append((part, {}))
    return found


@dataclass(frozen=True)
class Combination:
    """Some subjects from left to right, and the boxes where each is asked for and looked at."""

    subjects: tuple[Subject, ...]
    boxes: tuple[Box, ...]

    @property
    def name(self) -> str:
        return " + ".join(subject.name for subject in self.subjects)


@dataclass(frozen=True)
class Task:
    """One picture to make: ``spots`` are the subjects that are looked for in it, by name, with their boxes."""

    row: Row
    combination: str
    index: int
    request: GenerateRequest
    spots: tuple[tuple[str, Box], ...]


@dataclass(frozen=True)
class Plan:
    """A comparison with everything decided.

    Args:
        rows: of methods. size: of the pictures. combinations: by number of subjects.
        styles: LoRAs that are in every picture. notes: what was decided for the user.
    """

    request: BenchRequest
    rows: tuple[Row, ...]
    size: tuple[int, int]
    subjects: tuple[Subject, ...]
    styles: tuple[Subject, ...]
    combinations: Mapping[int, tuple[Combination, ...]]
    notes: tuple[str, ...]

    @property
    def used(self) -> tuple[Subject, ...]:
        """The subjects of some combination, and the styles."""
        drawn = {one.name for several in self.combinations.values() for each in several for one in each.subjects}
        return (*(one for one in self.subjects if one.name in drawn), *self.styles)

    @property
    def suffix(self) -> str:
        return self.request.suffix + "".join(f", {style.said}" for style in self.styles)

    def prompt(self, subjects: Sequence[Subject]) -> str:
        """What is asked for, the place first unless the user's own template says otherwise."""
        named = {str(index + 1): subject.said for index, subject in enumerate(subjects)}
        template = self.request.prompt or default_prompt(len(subjects))
        for key, phrase in named.items():
            template = template.replace("{" + key + "}", phrase)
        return self.request.prefix + template + self.suffix

    def alone(self, subject: Subject, count: int, place: int) -> str:
        """A picture of one subject where it would stand as number ``place`` of ``count``."""
        return f"{self.request.prefix}{PLACES[count][place]} a {subject.said}{self.suffix}"

    def _seed(self, *what: object) -> int:
        return int(digest(self.request.seed, *what)[:8], 16) % 2**31

    def _request(self, prompt: str, subjects: Sequence[Subject], seed: int, **fields: Any) -> GenerateRequest:
        asked = self.request
        loras = [LoraRef.of(name=one.name, weight=one.weight) for one in (*subjects, *self.styles)] if subjects else []
        return GenerateRequest.of(
            prompt=prompt, base=asked.base, loras=loras, seed=seed, steps=asked.steps, guidance=asked.guidance,
            scheduler=asked.scheduler, negative=asked.negative, size=self.size, triggers="keep", **fields,
        )  # fmt: skip

    def reference_tasks(self) -> Iterator[Task]:
        """Pictures of each subject alone, over the places where combinations put subjects, with seeds of their own."""
        places = [(count, place) for count in self.combinations for place in range(count)]
        row = Row(REFERENCE, "reference")
        for subject in () if self.request.reference_images else self.used:
            if subject.is_style:
                continue
            for index in range(self.request.references):
                count, place = places[index % len(places)]
                yield self._alone(row, subject, count, place, index, f"{subject.name}")

    def _alone(self, row: Row, subject: Subject, count: int, place: int, index: int, name: str) -> Task:
        seed = self._seed(row.kind, subject.name, count, place, index)
        request = self._request(self.alone(subject, count, place), [subject.at(1.0)], seed)
        return Task(row, name, index, request, ((subject.name, boxes_for(count, self.size)[place]),))

    def floor_task(self, combination: Combination, index: int) -> Task:
        """The base without LoRAs, asked for the same."""
        request = self._request(self.prompt(combination.subjects), (), self._seed(combination.name, index))
        return Task(Row(FLOOR, "floor"), combination.name, index, request, self._spots(combination))

    def single_tasks(self, combination: Combination, index: int) -> list[Task]:
        """Each subject of a combination alone, where it would stand in it."""
        row, count = Row(SINGLE, "single"), len(combination.subjects)
        return [
            self._alone(row, one, count, place, index, f"{one.name} {PLACES[count][place]}")
            for place, one in enumerate(combination.subjects)
        ]

    def method_task(self, row: Row, combination: Combination, index: int) -> Task:
        """A combination by one method. All methods get the same seed, prompt and boxes."""
        prompt, subjects = self.prompt(combination.subjects), combination.subjects
        fields: dict[str, Any] = {"method": row.method, "options": self._options(row, subjects)}
        if row.regions:
            fields["regions"] = tuple(self._region(one, at) for one, at in zip(subjects, combination.boxes, strict=True))
        request = self._request(prompt, subjects, self._seed(combination.name, index), **fields)
        return Task(row, combination.name, index, request, self._spots(combination))

    def _spots(self, combination: Combination) -> tuple[tuple[str, Box], ...]:
        return tuple((one.name, box) for one, box in zip(combination.subjects, combination.boxes, strict=True))

    def _region(self, subject: Subject, box: Box) -> Region:
        """What is said there is the method's own affair where the file says how its subject is called."""
        return Region.of(loras=[LoraRef.of(name=subject.name)], box=box, prompt=self._said(subject) if subject.told else None)

    def _said(self, subject: Subject) -> str:
        return f"{self.request.prefix}a {subject.said}{self.suffix}"

    def _options(self, row: Row, subjects: Sequence[Subject]) -> dict[str, Any]:
        """The row's options; where a file does not say how its subject is called, options say it; styles always act."""
        options, takes = dict(row.options or {}), method_named(row.method, **(row.options or {})).takes.model_fields
        told = [one for one in subjects if one.told]
        if told and "triggers" in takes and "nouns" in takes:
            options.setdefault("triggers", {one.name: one.trigger for one in told})
            options.setdefault("nouns", {one.name: one.noun for one in told if one.noun})
        if told and "words" in takes:
            options.setdefault("words", [one.phrase for one in subjects])
        if self.styles and "always" in takes:
            options.setdefault("always", [one.name for one in self.styles])
        return options

    def tasks(self, rows: Sequence[Row]) -> Iterator[Task]:
        """Everything that is measured: all rows of one combination before the next, so that a run cut short has whole lines."""
        for several in self.combinations.values():
            for combination in several:
                for index in range(self.request.seeds):
                    yield self.floor_task(combination, index)
                    yield from self.single_tasks(combination, index)
                    for row in rows:
                        yield self.method_task(row, combination, index)


def default_prompt(count: int) -> str:
    """``on the left a {1} and on the right a {2}``."""
    parts = [f"{place} a {{{index + 1}}}" for index, place in enumerate(PLACES[count])]
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def family_of(name: str) -> Family:
    """The family of a base, without loading it."""
    source = locate(name)
    if source.is_file():
        return FAMILIES[identify(source).family]
    facts = read_json(source / "studio.json") if (source / "studio.json").is_file() else {}
    told = facts.get("family")
    return detect(read_json(source / "unet" / "config.json"), name, None if told is None else str(told))


def make_plan(request: BenchRequest, lora_dirs: Sequence[Path] = ()) -> Plan:
    """Everything that can be decided without loading a weight.

    Raises:
        studio.errors.StudioError: with one sentence, the first thing that is wrong.
    """
    sketch = GenerateRequest.of(
        prompt="", steps=request.steps, guidance=request.guidance, size=request.size, scheduler=request.scheduler
    )
    if request.scheduler is not None:
        sampler_name(request.scheduler)
    if request.prompt is not None:
        _check_template(request)
    rows = rows_of(request.methods)
    if request.encoder != "base":
        check_folder(Path(request.encoder).expanduser())
    family = family_of(request.base)
    found, notes = read_subjects(request, family.name, lora_dirs)
    subjects = [one for one in found if not one.is_style]
    size = sketch.size or family.size
    combinations = {}
    for count in request.sizes:
        drawn = draw_combinations([one.name for one in subjects], count, request.combinations, request.seed)
        by_name = {one.name: one for one in subjects}
        combinations[count] = tuple(
            Combination(tuple(by_name[name] for name in names), boxes_for(count, size)) for names in drawn
        )
        if len(drawn) < request.combinations:
            notes.append(
                f"{len(subjects)} LoRAs make {len(drawn)} combinations of {count}, not {request.combinations}: all are used"
            )
    plan = Plan(
        request=request,
        rows=tuple(rows),
        size=size,
        subjects=tuple(subjects),
        styles=tuple(one for one in found if one.is_style),
        combinations=combinations,
        notes=tuple(notes),
    )
    own_references(plan)
    return plan


def _check_template(request: BenchRequest) -> None:
    for count in request.sizes:
        missing = [f"{{{index + 1}}}" for index in range(count) if f"{{{index + 1}}}" not in (request.prompt or "")]
        extra = [f"{{{index + 1}}}" for index in range(count, 3) if f"{{{index + 1}}}" in (request.prompt or "")]
        if missing or extra:
            said = f"lacks {missing[0]}" if missing else f"has {extra[0]}"
            raise RequestError(f"--prompt '{request.prompt}' {said}, but {count} LoRAs are combined: say each one once")


def own_references(plan: Plan) -> dict[str, list[Path]]:
    """The user's own reference pictures by subject; none where references are to be made.

    Raises:
        FileError: a subject has no picture there.
    """
    root = plan.request.reference_images
    if root is None:
        return {}
    found = {}
    for subject in plan.used:
        if not subject.is_style:
            folder = root / subject.name
            found[subject.name] = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES)
            if not found[subject.name]:
                raise FileError(f"{folder} holds no picture of LoRA '{subject.name}': put .png, .jpg or .webp files there")
    return found


def all_tasks(plan: Plan, rows: Sequence[Row] | None = None) -> list[Task]:
    """Every picture of a comparison once, references first; floor and singles are shared between combinations."""
    told: dict[str, Task] = {}
    for task in (*plan.reference_tasks(), *plan.tasks(plan.rows if rows is None else rows)):
        told.setdefault(digest(task.row.label, task.request.model_dump(mode="json")), task)
    return list(told.values())
