"""``studio render``: everything a job file asks for, into one folder; what is there already is not made again.

Each result is written to a temporary name, synced and renamed, and then noted in ``manifest.jsonl``. A run that is killed loses
what it was working on and nothing else; the same command goes on with the rest.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.errors import CancelledError, FileError, RequestError, StudioError
from studio.files import Lines, json_lines
from ui import console
from ui.console import Json
from ui.jobs import Item, Problem, read_jobs
from ui.options import Device, Dtype, LoraDirs, Memory

if TYPE_CHECKING:
    from pipelines.progress import Bar

MANIFEST = "manifest.jsonl"
DONE, FAILED = "done", "failed"


class Manifest:
    """What was made in a folder, a line of JSON each; only one process at a time has it open.

    Args:
        folder: made when it is not there.

    Raises:
        FileError: it cannot be written, or another process is at work there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        busy = f"another 'studio render' is at work in {folder}: wait for it, or choose another folder"
        self.lines = Lines(folder / MANIFEST, busy)
        self.entries: dict[str, dict[str, Any]] = {}
        self.writers: dict[str, str] = {}
        for entry in json_lines(self.lines.data):
            with suppress(TypeError, KeyError):
                self._take(str(entry["hash"]), entry)

    def _take(self, digest: str, entry: dict[str, Any]) -> None:
        """Remember the last entry of each job, and which job wrote each file last: a line may be edited under its old name."""
        self.writers |= dict.fromkeys(entry.get("files", {}), digest)
        self.entries[digest] = entry

    def has(self, item: Item) -> bool:
        """Whether an item is done and its files still are what was written."""
        entry = self.entries.get(item.digest, {})
        told = entry.get("files", {})
        return (
            entry.get("state") == DONE
            and set(told) == set(item.outputs)
            and all(
                self.writers[name] == item.digest
                and (self.folder / name).is_file()
                and (self.folder / name).stat().st_size == size
                for name, size in told.items()
            )
        )

    def knows(self, name: str) -> bool:
        """Whether a file of this name was written from here."""
        return name in self.writers

    def add(self, item: Item, state: str, **facts: Any) -> None:
        """Note what became of an item, and make sure that it stays noted."""
        entry = {"hash": item.digest, "state": state, "line": item.line, "name": item.name, "kind": item.resolved()["kind"],
                 **facts, "request": item.resolved(), "inputs": dict(item.inputs)}  # fmt: skip
        self.lines.add(entry)
        self._take(item.digest, entry)

    def sweep(self, items: Sequence[Item]) -> None:
        """Take away the halves of files that a crash left."""
        for item in items:
            for name in item.outputs:
                for half in self.folder.glob(f".{escape(name)}.*.new"):
                    half.unlink(missing_ok=True)

    def close(self) -> None:
        self.lines.close()


@dataclass
class Outcome:
    """What became of all items."""

    made: list[Item] = field(default_factory=list)
    failed: list[tuple[Item, str]] = field(default_factory=list)


def by_model(items: Sequence[Item]) -> Iterator[Item]:
    """Items of one model together, so that each is loaded once and only one is; otherwise in their order."""
    from studio.base import forget_bases

    models = list(dict.fromkeys(item.job.model for item in items))
    for model in models:
        if len(models) > 1:
            forget_bases()
        yield from (item for item in items if item.job.model == model)


def check_models(items: Sequence[Item]) -> Iterator[Problem]:
    """What only shows when the models are loaded: sizes they cannot make, LoRAs of other families."""
    for item in by_model(items):
        try:
            item.job.fits()
        except StudioError as error:
            yield Problem(line=item.line, error=error)


def render_items(todo: Sequence[Item], manifest: Manifest, shown: bool | None = None) -> Outcome:
    """Make every item. One that fails is noted, and the others go on.

    Raises:
        CancelledError: interrupted; says how to go on. FileError: a file in the way, or the folder cannot be written.
    """
    from pipelines.progress import Bar

    refuse_foreign(todo, manifest)
    manifest.sweep(todo)
    outcome = Outcome()
    total = sum(item.job.amount() for item in todo)
    finished, started = 0, time.monotonic()
    try:
        with Bar("rendering", total, shown) as bar:
            for item in by_model(todo):
                _make(item, manifest, outcome, partial(_reach, bar, finished))
                finished += item.job.amount()
                bar.reach(finished)
                _say(item, outcome, finished, total, started)
    except KeyboardInterrupt:
        left = len(todo) - len(outcome.made) - len(outcome.failed)
        raise CancelledError(
            f"stopped with {left} of {len(todo)} jobs left to do: the same command goes on with them"
        ) from None
    return outcome


def _reach(bar: Bar, before: int, done: float) -> None:
    bar.reach(before + done)


def _make(item: Item, manifest: Manifest, outcome: Outcome, reach: Callable[[float], None]) -> None:
    trace = ""
    try:
        made = item.job.run(manifest.folder, item.name, item.digest, reach)
    except CancelledError:
        raise
    except StudioError as error:
        why = str(error)
    except Exception as error:  # one bad job must not cost the others; its traceback is kept
        why, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    else:
        manifest.add(item, DONE, files={file.name: file.stat().st_size for file in made.files}, **made.facts)
        outcome.made.append(item)
        return
    manifest.add(item, FAILED, error=why, **({"traceback": trace} if trace else {}))
    outcome.failed.append((item, why))


def _say(item: Item, outcome: Outcome, finished: int, total: int, started: float) -> None:
    """A line where no progress bar is: what is done, and about how long the rest takes."""
    if sys.stderr.isatty():
        return
    left = (time.monotonic() - started) / finished * (total - finished)
    word = "failed" if outcome.failed and outcome.failed[-1][0] is item else "made"
    rest = f", about {left:.0f} s left" if total > finished else ""
    print(f"{finished} of {total}: {word} {', '.join(item.outputs)}{rest}", file=sys.stderr, flush=True)


def refuse_foreign(items: Sequence[Item], manifest: Manifest) -> None:
    """Nothing is written over that this command did not write: the manifest knows its name, or it carries a job's mark."""
    for item in items:
        for name in item.outputs:
            file = manifest.folder / name
            if file.exists() and not manifest.knows(name) and not item.job.marked(file):
                raise FileError(
                    f"line {item.line} would write over {file}, which no job file made: move it, or give the line another name"
                )


def render(
    jobs: Annotated[
        Path, typer.Argument(metavar="JOBS", help="A .jsonl file with a job on each line, or a .yaml list of them.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results and their manifest.jsonl.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the lines in full, and stop.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also make again what is done.")] = False,
    lora_dir: LoraDirs = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    json: Json = False,
) -> None:
    """Make everything a job file asks for. Done work is skipped, so the same command goes on after a stop.

    A line holds the fields of a request, as 'studio generate ... --json' prints them, and a name for its result if you like:
    {"kind": "generate", "version": 1, "name": "frog", "prompt": "a frog", "loras": ["pastel:0.8"], "method": "switch"}.
    All lines are checked before the first is made.
    """
    with console.speaking(json) as voice:
        from pipelines.jobs import Machine

        machine = Machine(lora_dirs=tuple(lora_dir or ()), device=device, dtype=dtype, memory=memory or "auto")
        items, problems = read_jobs(jobs, machine)
        _refuse(voice, jobs, problems)
        if dry_run:
            _refuse(voice, jobs, check_models(items))
            lines = [item.resolved() for item in items]
            voice.answer({"jobs": lines}, "\n".join(_dumps(line) for line in lines))
            return
        manifest = Manifest(out)
        try:
            todo = [item for item in items if again or not manifest.has(item)]
            _refuse(voice, jobs, check_models(todo))
            outcome = render_items(todo, manifest)
        finally:
            manifest.close()
        _finish(voice, manifest, outcome, len(items) - len(todo))


def _refuse(voice: console.Voice, jobs: Path, found: Iterable[Problem]) -> None:
    """Say every line that is wrong, and make nothing."""
    problems = sorted(found, key=lambda problem: problem.line)
    if not problems:
        return
    for problem in problems[1:]:
        voice.note(str(problem))
    more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
    raise RequestError(f"nothing was made: {jobs.name}, {problems[0]}{more}") from problems[0].error


def _finish(voice: console.Voice, manifest: Manifest, outcome: Outcome, skipped: int) -> None:
    payload = {
        "manifest": str(manifest.lines.path),
        "made": [str(manifest.folder / name) for item in outcome.made for name in item.outputs],
        "skipped": skipped,
        "failed": [{"line": item.line, "name": item.name, "error": why} for item, why in outcome.failed],
    }
    words = f"{len(outcome.made)} made, {skipped} were there already, {len(outcome.failed)} failed: {manifest.lines.path}"
    voice.answer(payload, words)
    for item, why in outcome.failed:
        voice.note(f"failed: line {item.line} ({item.name}): {' '.join(why.split())}")
    if outcome.failed:
        raise typer.Exit(1)


def _dumps(line: Any) -> str:
    return json.dumps(line, ensure_ascii=False)
