"""The sections of a results page that the composition bench writes, with their sheets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.bench.combinations import Case, all_cases, single_cases
from tests.bench.compose_rows import ROWS
from tests.bench.compose_store import Record, Store
from tests.bench.compose_table import (
    TITLES,
    gap_table,
    group_table,
    main_table,
    pair_table,
    parts_table,
    place_table,
    role_table,
    save_webp,
    sheet,
    single_rates,
    single_table,
    worst,
    worst_sheet,
)
from tests.bench.judge import TAU
from tests.bench.page import replace_section
from tests.bench.statistics import Rate

MARK = "composition"
"""Of what is true of all tables; each kind of combinations has a section of its own, called after it."""

INTRO = """## Several LoRAs in one picture

    make bench-compose

22 LoRAs of things the base never saw, each taught from 8 or 12 pictures, in 120 fixed combinations. The tables are of the
report half; constants were chosen on the other half, one seed each.
Rates are per requested LoRA, but for *pictures that fail* (any LoRA not present), with 95 % Wilson intervals; differences are
paired by combination and seed, bootstrapped over combinations, and bold where the interval excludes 0: only then is one method
better. A thing is in its place when it stands on the side that the words name, for rows that know boxes too.

*truth*: the art's own picture through the VAE; what it lacks is the judge's share. *known*: the base without LoRAs, asked for
things it was trained on. *floor*: the base without LoRAs, same prompts. *ceiling*: the product of the single-LoRA rates in
those slots. A forward is one guided pass of the stock UNet for one picture, counted in floating-point operations.
Rows called *-paper* have every option as published. *composite-short*, *composite-paper-short*: composite with as few steps as
cost what cmlora or cmlora-paper costs.
"""

FIRST, WORST = "the first combinations, unselected, first seed", "the worst failures of the methods"

Found = Mapping[str, Mapping[str, list[Record]]]
"""Records by kind of combination and row."""
Slots = Mapping[tuple[str, str], Rate]
"""How often each LoRA alone is there, by LoRA and place."""


def report(page: Path, store: Store, found: Found, choices: Mapping[str, str], base: str, pictures: int) -> None:
    """Write a section for each kind that was found into ``page``, and its pictures into ``pictures/`` beside it.

    The sections of other kinds stay as they are.
    """
    every = {case.id: case for case in (*all_cases(), *single_cases())}
    singles = found.get("single", {})
    rates = single_rates(singles.get("single", []), every)
    replace_section(page, INTRO, MARK)
    for kind in TITLES:
        if not found.get(kind):
            continue
        shown = len({record.case for records in found[kind].values() for record in records})
        chosen = f"; chosen: {choices[kind]}" if choices.get(kind) else ""
        head = f"{shown} combinations, {pictures} seeds each{chosen}. Base `{base[:12]}`, tau {TAU:g}."
        lines = [f"### {TITLES[kind]}", "", head, "", *_tables(kind, found[kind], every, rates)]
        lines += _sheets(page, store, kind, _whole(found[kind]), every)
        replace_section(page, "\n".join(lines), f"{MARK}: {kind}")
    if singles:
        lines = ["### Each LoRA alone", "", *single_table(rates, singles.get("floor", []), singles.get("truth", []))]
        replace_section(page, "\n".join(lines), f"{MARK}: single")


def _whole(rows: Mapping[str, list[Record]]) -> dict[str, list[Record]]:
    """The rows of the main table: without those that show what a part, or a LoRA by itself, is worth."""
    return {name: records for name, records in rows.items() if not (ROWS[name].part_of or ROWS[name].lone)}


def _tables(kind: str, every_row: Mapping[str, list[Record]], every: Mapping[str, Case], rates: Slots) -> list[str]:
    rows = _whole(every_row)
    lines = [*main_table(rows, every, rates), *pair_table(rows), *gap_table(rows, every, rates), *parts_table(every_row)]
    lines += group_table(kind, rows, every, "present") + group_table(kind, rows, every, "fails")
    return lines + (place_table(rows) if kind == "subjects" else role_table(rows, every_row))


def _sheets(page: Path, store: Store, kind: str, rows: Mapping[str, list[Record]], every: Mapping[str, Case]) -> list[str]:
    met = {record.case for records in rows.values() for record in records}
    first = [case for case in every.values() if case.id in met][:8]
    lines: list[str] = []
    for title, name, made in (
        (FIRST, f"compose-{kind}.webp", sheet(store, rows, first, FIRST)),
        (WORST, f"compose-{kind}-worst.webp", worst_sheet(store, worst(rows), WORST)),
    ):
        if save_webp(made, page.parent / "pictures" / name):
            lines += [f"![{title}](pictures/{name})", ""]
    return lines
