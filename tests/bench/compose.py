"""How often each composition method loses or confuses a concept, and what it costs.

    python -m tests.bench.compose train --loras outputs/testbed/loras --jobs 2
    python -m tests.bench.compose run --loras outputs/testbed/loras --out outputs/testbed --report docs/results.md
    python -m tests.bench.compose run --methods usual,parts     # also what each part of a method is worth
    python -m tests.bench.compose report --loras outputs/testbed/loras --out outputs/testbed

``train`` makes the 22 LoRAs, ``run`` all pictures and the tables, ``report`` only the tables; ``judge`` looks at the kept
pictures again. All of them go on where they were stopped. ``--limit 4 --methods merge,composite`` makes a small run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from studio.errors import RequestError, StudioError
from studio.requests import GenerateRequest
from tests.bench.combinations import LORAS, Case, Half, all_cases, cases, scene_of, single_cases
from tests.bench.compose_loras import teach_all
from tests.bench.compose_means import Costs, Means, profile, real_means
from tests.bench.compose_report import report
from tests.bench.compose_rows import (
    GROUPS,
    ROWS,
    Options,
    Row,
    best_candidate,
    differs,
    fits,
    key_of,
    request_of,
    rows_named,
    short_steps,
    things_of,
)
from tests.bench.compose_store import Record, Store

EVERY = ("single", "subjects", "others")


@dataclass(frozen=True)
class Wish:
    """One picture to make: the row as it stands in the table, with its options chosen."""

    row: Row
    case: Case
    seed: int
    request: GenerateRequest
    key: str


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which part of everything: rows, kinds of combinations, the first ``limit`` of each, LoRAs at hand, pictures of each.

    ``tries``: pictures of each combination when candidates are chosen among.
    """

    rows: Sequence[Row]
    kinds: Sequence[str] = EVERY
    limit: int = 1000
    only: frozenset[str] = frozenset(LORAS)
    pictures: int = 2
    tries: int = 1

    def cases(self, half: Half, kind: str) -> list[Case]:
        found = single_cases() if kind == "single" else cases(half, kind)  # type: ignore[arg-type]
        return [case for case in found if self.only >= set(case.loras)][
            : self.limit * (len(self.only) if kind == "single" else 1)
        ]


class Bench:
    """A run: what is wanted, what is there, and how to make the rest."""

    def __init__(self, means: Means, scope: Scope, out: Path, say: Callable[[str], None] = print) -> None:
        self.means, self.scope, self.say = means, scope, say
        self.store = Store(out)
        self.costs = Costs(out / "costs.json", means)
        self.best: dict[tuple[str, str], Options | None] = {}

    def wish(self, row: Row, case: Case, seed: int) -> Wish:
        request = request_of(row, case, self.means.base, seed, self.means.steps)
        if row.like:
            other = self.settled(ROWS[row.like], case.kind)
            same = request_of(other, case, self.means.base, seed, self.means.steps)
            mine, theirs = self.costs.of(replace(row, like=""), case, request), self.costs.of(other, case, same)
            request = request.with_(steps=short_steps(self.means.steps, mine, theirs))
        return Wish(row, case, seed, request, key_of(row, request, self.means.base_sha256, self.means.loras))

    def wishes(self, rows: Sequence[Row], half: Half, kind: str) -> Iterator[Wish]:
        """All rows of one combination before the next, so that a run cut short has whole lines."""
        count = self.scope.pictures if half == "report" else self.scope.tries
        for case in self.scope.cases(half, kind):
            for row in rows:
                if fits(row, case):
                    for index in range(1 if row.source == "truth" else count):
                        yield self.wish(row, case, case.seed + index)

    def make(self, wishes: Sequence[Wish]) -> None:
        """Make what is missing."""
        todo = [wish for wish in wishes if wish.key not in self.store.records]
        start, told = time.monotonic(), 0.0
        for done, wish in enumerate(todo, 1):
            self.store.add(*self.made(wish))
            spent = time.monotonic() - start
            if spent - told > 20 or done == len(todo):
                told = spent
                left = spent / done * (len(todo) - done)
                self.say(f"  {done}/{len(todo)} pictures, {spent / done:.1f} s each, {left / 60:.0f} min left")

    def made(self, wish: Wish) -> tuple[Record, Image.Image]:
        row, case = wish.row, wish.case
        forwards = self.costs.of(row, case, wish.request) if case.half == "report" else 0.0  # counting costs pictures' time
        drawn = self.means.truth(scene_of(case)) if row.source == "truth" else self.means.draw(wish.request)
        record = Record(
            key=wish.key,
            row=row.name,
            case=case.id,
            kind=case.kind,
            half=case.half,
            count=len(case.loras),
            seed=wish.seed,
            seconds=drawn.seconds,
            forwards=forwards,
            seen=tuple(self.means.look(drawn.image, case, things_of(row, case))),
            notes=drawn.notes,
        )
        return record, drawn.image

    def choose(self, row: Row, kind: str, make: bool) -> Options | None:
        """As :meth:`chosen`, once for each kind; the row whose time this one gets is settled before it."""
        if row.like:
            self.choose(ROWS[row.like], kind, make)
        if (kind, row.name) not in self.best:
            self.best[kind, row.name] = self.chosen(row, kind, make) if row.candidates else {}
        return self.best[kind, row.name]

    def settled(self, row: Row, kind: str) -> Row:
        """``row`` at what was chosen for it, if anything was."""
        return replace(row, options={**row.options, **(self.best.get((kind, row.name)) or {})})

    def chosen(self, row: Row, kind: str, make: bool) -> Options | None:
        """The best candidate on the development half; None where its pictures are not there."""
        rates: list[tuple[float, float]] = []
        for options in row.candidates:
            wishes = list(self.wishes([row.at(options)], "development", kind))
            if make:
                self.say(f"{row.at(options).name}, development, {kind}: {len(wishes)} pictures")
                self.make(wishes)
            found = [self.store.records[wish.key] for wish in wishes if wish.key in self.store.records]
            if not found:
                return None
            rates.append((sum(r.passes() for r in found) / len(found), sum(r.present() for r in found) / len(found)))
            self.say(f"  {row.at(options).name}: {100 * rates[-1][0]:.1f} % pass, {100 * rates[-1][1]:.1f} % present")
        return best_candidate(row, rates)

    def go(self, make: bool = True) -> tuple[dict[str, dict[str, list[Record]]], dict[str, str]]:
        """Make everything of the scope, or with ``make`` off only collect it.

        Returns:
            Records by kind and row, in the order of the rows; and what was chosen, as text, by kind.
        """
        found: dict[str, dict[str, list[Record]]] = {}
        choices: dict[str, str] = {}
        for kind in self.scope.kinds:
            rows = [row for row in self.scope.rows if kind in row.kinds]
            settled: list[Row] = []
            told: dict[str, str] = {}
            for row in rows:
                whole = ROWS[row.part_of] if row.part_of else row
                options = self.choose(whole, kind, make)
                if options is None:
                    continue
                if whole.candidates:
                    told[whole.name] = whole.at(options).name
                chosen = self.settled(whole, kind)
                own = replace(row, options={**chosen.options, **row.options})
                if not row.part_of or differs(own, chosen):
                    settled.append(own)
            if told:
                choices[kind] = "; ".join(told.values())
            wishes = list(self.wishes(settled, "report", kind))
            if make:
                self.say(f"{kind}: {len(wishes)} pictures")
                self.make(wishes)
            for row in settled:
                there = [self.store.records[w.key] for w in wishes if w.row.name == row.name and w.key in self.store.records]
                if there:
                    found.setdefault(kind, {})[row.name] = there
        return found, choices

    def look_again(self) -> None:
        """Judge all kept pictures anew."""
        every = {case.id: case for case in (*all_cases(), *single_cases())}
        renewed = []
        for done, record in enumerate(self.store.records.values(), 1):
            case, row = every[record.case], ROWS[record.row.split(" (")[0]]
            looked = self.means.look(self.store.open(record.key), case, things_of(row, case))
            renewed.append(replace(record, seen=tuple(looked)))
            if done % 50 == 0:
                self.say(f"  {done}/{len(self.store.records)} pictures judged")
        self.store.rewrite(renewed)


def names_of(text: str | None, known: Sequence[str], what: str) -> list[str]:
    """A list written with commas.

    Raises:
        RequestError: a name that is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()] if text else []
    for name in names:
        if name not in known:
            raise RequestError(f"no {what} '{name}': choose of {', '.join(known)}")
    return names


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.bench.compose", description=(__doc__ or "").split("\n")[0])
    made.add_argument("what", choices=("train", "run", "report", "judge"))
    made.add_argument("--base", default="embedded")
    made.add_argument("--loras", type=Path, default=Path("outputs/testbed/loras"))
    made.add_argument("--out", type=Path, default=Path("outputs/testbed"))
    made.add_argument("--cache", type=Path, help="folder for the judge's templates (default: --out)")
    made.add_argument("--only", help="LoRAs at hand, with commas: only combinations of these")
    made.add_argument("--methods", help=f"rows, with commas, of {', '.join((*GROUPS, *ROWS))}")
    made.add_argument("--kinds", help=f"of {', '.join(EVERY)}")
    made.add_argument("--limit", type=int, default=1000, help="combinations of each kind and half")
    made.add_argument("--pictures", type=int, default=2, help="seeds of each combination")
    made.add_argument("--tries", type=int, default=1, help="seeds of each combination when options are chosen")
    made.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    made.add_argument("--steps", type=int, default=0, help="of a training; 0: what each role needs")
    made.add_argument("--report", type=Path, help="page whose section is replaced; its pictures go beside it")
    return made


def run(given: argparse.Namespace) -> None:
    only = names_of(given.only, list(LORAS), "LoRA") or list(LORAS)
    rows = rows_named(names_of(given.methods, [*GROUPS, *ROWS], "row"))
    kinds = names_of(given.kinds, EVERY, "kind") or list(EVERY)
    if min(given.limit, given.pictures, given.tries, given.jobs, given.steps + 1) < 1:
        raise RequestError("--limit, --pictures, --tries and --jobs must be at least 1, and --steps at least 0")
    if given.what == "train":
        from studio.base import load_base

        base = load_base(given.base, device="cpu")
        teach_all(given.loras, given.base, base.sha256, only, given.jobs, given.steps)
        return
    say = partial(print, flush=True)
    means = real_means(given.base, given.loras, only, given.cache or given.out, judging=given.what != "report")
    if given.what == "run" and any(row.method == "cmlora" for row in rows):
        profile(given.base, given.loras, only)
    scope = Scope(rows=rows, kinds=kinds, limit=given.limit, only=frozenset(only), pictures=given.pictures, tries=given.tries)
    bench = Bench(means, scope, given.out, say)
    if given.what == "judge":
        bench.look_again()
    found, choices = bench.go(make=given.what == "run")
    if not any(found.values()):
        raise RequestError(f"{given.out} holds no pictures of this base and these LoRAs: make them with 'run'")
    page = given.report or given.out / "report.md"
    report(page, bench.store, found, choices, means.base_sha256, given.pictures)
    say(f"{page}")


def main() -> int:
    try:
        run(parser().parse_args())
    except StudioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
