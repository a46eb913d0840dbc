"""Comparing composition methods on a user's own checkpoint and LoRAs: one call, a folder of pictures, a table.

1. Pictures of each LoRA alone are the references; each is cut to the box where it was asked for.
2. Every combination is made by every method with the same prompt, boxes and seeds, and also by the base without LoRAs (floor)
   and by each of its LoRAs alone (single: as good as it gets).
3. Each subject's box is cut out of each picture and compared with all references by an image encoder.

All of it goes on where it was stopped; see :mod:`pipelines.bench_store`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from compose.bank import Adapter, LoraBank
from pipelines.bench_numbers import Measured, RowNumbers, Seen, row_numbers, threshold_of
from pipelines.bench_plan import FLOOR, SINGLE, Combination, Plan, Row, Task, all_tasks, make_plan, own_references
from pipelines.bench_request import BenchRequest
from pipelines.bench_store import Record, Store, picture_name
from pipelines.jobs import Machine, digest
from pipelines.likeness import BaseEncoder, Encoder, FolderEncoder, Likeness, counted_rows, cut
from pipelines.prepare import check_size
from pipelines.progress import Bar
from studio.base import load_base
from studio.errors import CancelledError, FileError, OutOfMemoryError, RequestError, StudioError
from studio.hashes import sha256_of
from studio.lora.files import load_lora
from studio.media import open_picture
from studio.requests import GenerateRequest

if TYPE_CHECKING:
    from studio.base import Base

Say = Callable[[str], None]
REHEARSAL = 2
"""Steps of the trial that each method makes before the first picture."""
EVERY = 20.0
"""Seconds between lines of progress where no bar is shown."""


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Args:
        records: by row label, combination and number of the picture; the single row's are by subject and place.
        numbers: the rows of the table by number of subjects. threshold: similarity from which a subject can be kept.
        told_apart: share of references nearest to their own subject's; nan where nobody could be left out.
    """

    plan: Plan
    folder: Path
    encoder: str
    base: str
    records: Mapping[tuple[str, str, int], Record]
    numbers: Mapping[int, tuple[RowNumbers, ...]]
    threshold: float
    told_apart: float
    made: int
    notes: tuple[str, ...]
    failed: tuple[str, ...]

    def picture(self, row: str, combination: Combination, index: int = 0) -> tuple[Image.Image, tuple[Seen, ...]] | None:
        """A picture of a row (not of the single one) and what is seen in it; None where it was not made."""
        record = self.records.get((row, combination.name, index))
        if record is None:
            return None
        return open_picture(self.folder / record.file), seen_in(record, combination)


def seen_in(record: Record, combination: Combination) -> tuple[Seen, ...]:
    """Each subject of a combination as one picture shows it."""
    return tuple(_seen(record.likeness[one.name], one.name, combination) for one in combination.subjects)


def _seen(likeness: Mapping[str, float], own: str, combination: Combination) -> Seen:
    return Seen(likeness[own], max(likeness[one.name] for one in combination.subjects if one.name != own))


def compare(
    request: BenchRequest,
    out: Path,
    *,
    machine: Machine | None = None,
    progress: bool | None = None,
    say: Say = lambda text: None,
) -> Comparison:
    """Make what is missing, measure it and count. ``say`` hears what is left out, and how far it is where no bar is shown.

    Raises:
        studio.errors.StudioError: with one sentence; what was made stays.
    """
    where = machine or Machine()
    plan = make_plan(request, where.lora_dirs)
    base = load_base(request.base, where.device, where.dtype, memory=where.memory)
    check_size(base, plan.size)
    with Store(out) as store:
        return _Bench(plan, base, store, where, progress, say).go()


class _Bench:
    """One run: what is wanted, what is there, and how to make the rest."""

    def __init__(self, plan: Plan, base: Base, store: Store, machine: Machine, progress: bool | None, say: Say) -> None:
        self.plan, self.base, self.store, self.machine, self.say = plan, base, store, machine, say
        self.progress = progress
        files = [one.file for one in plan.used]
        self.files = {one.name: one.file for one in plan.used}
        self.hashes = dict(zip(self.files, sha256_of(files), strict=True))
        self.notes = list(plan.notes)
        self.failed: list[str] = []
        self.made = 0
        for note in self.notes:
            self.say(f"note: {note}")

    def key(self, task: Task) -> str:
        """Of everything a picture follows from; where files lie and what bases are called does not matter."""
        told = task.request.model_dump(mode="json", exclude={"base"})
        hashes = [self.hashes[ref.name] for ref in task.request.loras]
        return digest(task.row.label, told, self.base.sha256, hashes, self.base.device.type, str(self.base.dtype))[:24]

    def go(self) -> Comparison:
        plan, store = self.plan, self.store
        encoder = self._encoder()
        todo = [task for task in all_tasks(plan) if store.get(self.key(task)) is None]
        self._try_loras(todo)
        rows = self._rehearsed(todo)
        references = list(plan.reference_tasks())
        tasks = [task for task in all_tasks(plan, rows) if task.row.kind != "reference"]
        missing = sum(store.get(self.key(task)) is None for task in (*references, *tasks))
        with Bar("comparing", missing, self.progress) as bar:
            clock = _Clock(bar, self.say)
            for task in references:
                self._make(task, clock)
            if self.failed:
                raise RequestError(f"a reference could not be made, so there is nothing to compare with: {self.failed[0]}")
            likeness = Likeness.of(encoder, self._references(references))
            by = self._mark(encoder, references)
            for task in tasks:
                self._measure(task, clock, likeness, by)
        records = {(t.row.label, t.combination, t.index): r for t in tasks if (r := store.get(self.key(t))) is not None}
        threshold = self._threshold(likeness, tasks)
        return Comparison(
            plan=plan,
            folder=store.folder,
            encoder=encoder.name,
            base=f"{self.base.name} ({self.base.sha256[:12]}, {self.base.device.type}, {str(self.base.dtype)[6:]})",
            records=records,
            numbers={count: self._numbers(rows, several, threshold) for count, several in plan.combinations.items()},
            threshold=threshold,
            told_apart=likeness.told_apart(),
            made=self.made,
            notes=tuple(self.notes),
            failed=tuple(self.failed),
        )

    def _encoder(self) -> Encoder:
        if self.plan.request.encoder == "base":
            return BaseEncoder(self.base)
        return FolderEncoder(Path(self.plan.request.encoder).expanduser(), self.base.device)

    def _mark(self, encoder: Encoder, references: Sequence[Task]) -> str:
        """Of the encoder and of the pictures it compares with."""
        own = {name: sha256_of(files) for name, files in own_references(self.plan).items()}
        return digest(encoder.mark, own, [self.key(task) for task in references])[:24]

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.say(f"note: {text}")

    def _try_loras(self, todo: Sequence[Task]) -> None:
        """Attach each LoRA once: one that is damaged or not for this base is said before the first picture."""
        needed = {ref.name for task in todo for ref in task.request.loras}
        for subject in self.plan.used:
            if subject.name in needed:
                with LoraBank.on(self.base, [Adapter(name=subject.name, lora=load_lora(subject.file))]):
                    pass

    def _rehearsed(self, todo: Sequence[Task]) -> list[Row]:
        """Each method with something to do makes two steps of its first picture of each size: what it cannot do is said now.

        Raises:
            RequestError: a method that was asked for by name cannot do it.
        """
        refused: dict[str, str] = {}
        tried = set()
        for task in todo:
            kind = (task.row.label, len(task.spots))
            if task.row.kind != "method" or kind in tried or task.row.label in refused:
                continue
            tried.add(kind)
            try:
                self._generate(task.request.with_(steps=min(REHEARSAL, self._steps(task.request))))
            except (CancelledError, OutOfMemoryError):
                raise
            except StudioError as error:
                if task.row.asked:
                    raise RequestError(f"method '{task.row.label}' cannot make {task.combination}: {error}") from error
                refused[task.row.label] = str(error)
        for label, why in refused.items():
            self._note(f"method '{label}' is left out: {why}")
        return [row for row in self.plan.rows if row.label not in refused]

    def _steps(self, request: GenerateRequest) -> int:
        return request.sampling(self.base.family, 0).steps

    def _generate(self, request: GenerateRequest, on_step: Callable[[Any], None] | None = None) -> Any:
        from pipelines.image import generate

        machine = self.machine
        return generate(
            request, progress=False, on_step=on_step, lora_files=self.files, lora_dirs=machine.lora_dirs,
            device=machine.device, dtype=machine.dtype, memory=machine.memory,
        )  # fmt: skip

    def _make(self, task: Task, clock: _Clock) -> Record | None:
        """The record of a picture, which is made where it is missing; None where that fails."""
        key = self.key(task)
        known = self.store.get(key)
        if known is not None:
            return known
        file = picture_name(task.row.label, task.combination, task.index, key)
        record = Record(
            key=key, row=task.row.label, combination=task.combination, index=task.index, file=file, seconds=0.0, forwards=0,
            request=task.request.model_dump(mode="json"),
        )  # fmt: skip
        try:
            with counted_rows(self.base.unet) as rows:
                result = self._generate(task.request, clock.stepped)
        except (CancelledError, OutOfMemoryError, FileError):
            raise
        except StudioError as error:
            self.failed.append(f"{task.row.label}, {task.combination}, picture {task.index + 1}: {error}")
            self.store.add(replace(record, file="", error=str(error)))
            clock.done()
            return None
        result.save(self.store.folder / file)
        self.made += 1
        clock.done()
        record = replace(record, seconds=round(result.seconds, 3), forwards=sum(rows), notes=tuple(result.notes))
        if task.row.kind == "reference":
            self.store.add(record)
        return record

    def _measure(self, task: Task, clock: _Clock, likeness: Likeness, by: str) -> None:
        """A picture and its similarities are noted together; one measured against other references is measured anew."""
        record = self._make(task, clock)
        if record is None or record.by == by:
            return
        picture = open_picture(self.store.folder / record.file)
        found = {name: _rounded(likeness(cut(picture, box))) for name, box in task.spots}
        self.store.add(replace(record, likeness=found, by=by))

    def _references(self, tasks: Sequence[Task]) -> dict[str, list[Image.Image]]:
        """The references of each subject: made ones cut to where they were asked for, or the user's own as they are."""
        own = own_references(self.plan)
        found: dict[str, list[Image.Image]] = {name: [open_picture(file) for file in files] for name, files in own.items()}
        for task in tasks:
            record = self.store.get(self.key(task))
            if record is not None:
                ((name, box),) = task.spots
                found.setdefault(name, []).append(cut(open_picture(self.store.folder / record.file), box))
        return found

    def _threshold(self, likeness: Likeness, tasks: Sequence[Task]) -> float:
        """Single LoRAs are seen in the references, each against the others of its LoRA; where those are the user's own
        photographs, in the single row.
        """
        singles = [] if self.plan.request.reference_images is not None else likeness.left_out()
        there, absent = singles or self._owns(tasks, SINGLE), self._owns(tasks, FLOOR)
        return threshold_of(there, absent) if there and absent else math.nan

    def _owns(self, tasks: Sequence[Task], row: str) -> list[float]:
        """Similarities of a row's subjects with their own references."""
        records = [self.store.get(self.key(task)) for task in tasks if task.row.label == row]
        return [told[name] for record in records if record is not None for name, told in record.likeness.items()]

    def _numbers(self, rows: Sequence[Row], several: Sequence[Combination], threshold: float) -> tuple[RowNumbers, ...]:
        found: dict[str, list[Measured]] = {}
        for combination in several:
            for index in range(self.plan.request.seeds):
                for task in (self.plan.floor_task(combination, index), *(
                    self.plan.method_task(row, combination, index) for row in rows
                )):  # fmt: skip
                    record = self.store.get(self.key(task))
                    if record is not None:
                        one = Measured(combination.name, seen_in(record, combination), record.seconds, record.forwards)
                        found.setdefault(task.row.label, []).append(one)
                singles = [self.store.get(self.key(task)) for task in self.plan.single_tasks(combination, index)]
                there = [record for record in singles if record is not None]
                if len(there) == len(singles):
                    pairs = zip(there, combination.subjects, strict=True)
                    seen = tuple(_seen(record.likeness[one.name], one.name, combination) for record, one in pairs)
                    seconds, forwards = (sum(values) / len(there) for values in
                                         ([r.seconds for r in there], [r.forwards for r in there]))  # fmt: skip
                    found.setdefault(SINGLE, []).append(Measured(combination.name, seen, seconds, forwards))
        order = [FLOOR, SINGLE, *(row.label for row in rows)]
        return tuple(row_numbers(label, found[label], threshold) for label in order if label in found)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}


class _Clock:
    """Progress over all pictures, on the bar or as a line now and then."""

    def __init__(self, bar: Bar, say: Say) -> None:
        self.bar, self.say = bar, say
        self.count, self.started = 0, time.monotonic()
        self.told = self.started

    def stepped(self, event: Any) -> None:
        self.bar.reach(self.count + (event.step.index + 1) / event.step.count)

    def done(self) -> None:
        self.count += 1
        self.bar.reach(self.count)
        now = time.monotonic()
        if not self.bar.wanted and now - self.told > EVERY:
            self.told = now
            each = (now - self.started) / self.count
            self.say(f"{self.count} of {self.bar.total} pictures, about {each * (self.bar.total - self.count):.0f} s left")
