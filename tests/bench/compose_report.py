"""The section of a results page that the composition bench writes, with its sheets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.bench.combinations import all_cases, single_cases
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

MARK = "composition: written by tests/bench/compose.py"

INTRO = """## Several LoRAs in one picture

    make bench-compose

22 LoRAs of things the base never saw, each taught from 8 or 12 pictures, in 120 fixed combinations. The tables are of the
report half ({shown} combinations, {pictures} seeds each); constants were chosen on the other half, one seed each{chosen}.
Base `{base}`, tau {tau:g}.
Rates are per requested LoRA, but for *pictures that fail* (any LoRA not present), with 95 % Wilson intervals; differences are
paired by combination and seed, bootstrapped over combinations, and bold where the interval excludes 0: only then is one method
better. A thing is in its place when it stands on the side that the words name, for rows that know boxes too.

*truth*: the art's own picture through the VAE; what it lacks is the judge's share. *known*: the base without LoRAs, asked for
things it was trained on. *floor*: the base without LoRAs, same prompts. *ceiling*: the product of the single-LoRA rates in
those slots. A forward is one guided pass of the stock UNet for one picture, counted in floating-point operations.
*composite-short*: composite with as few steps as cost what cmlora costs.
"""


def report(
    page: Path,
    store: Store,
    found: Mapping[str, Mapping[str, list[Record]]],
    choices: Mapping[str, str],
    base: str,
    pictures: int,
) -> None:
    """Write the section into ``page``, and its pictures into ``pictures/`` beside it."""
    every = {case.id: case for case in (*all_cases(), *single_cases())}
    singles = found.get("single", {})
    rates = single_rates(singles.get("single", []), every)
    kinds = [kind for kind in TITLES if found.get(kind)]
    shown = len({record.case for kind in kinds for records in found[kind].values() for record in records})
    chosen = "".join(f"; {kind}: {text}" for kind, text in choices.items())
    lines = [INTRO.format(shown=shown, pictures=pictures, chosen=chosen, base=base[:12], tau=TAU)]
    for kind in kinds:
        every_row = found[kind]
        rows = {name: records for name, records in every_row.items() if not (ROWS[name].part_of or ROWS[name].lone)}
        lines += [f"### {TITLES[kind]}", "", *main_table(rows, every, rates), *pair_table(rows), *gap_table(rows, every, rates)]
        lines += parts_table(every_row)
        lines += group_table(kind, rows, every, "present") + group_table(kind, rows, every, "fails")
        lines += place_table(rows) if kind == "subjects" else role_table(rows, every_row)
        met = {record.case for records in rows.values() for record in records}
        first = [case for case in every.values() if case.id in met][:8]
        title = "the first combinations, unselected, first seed"
        lines += _shown(
            page,
            f"compose-{kind}.webp",
            save_webp(sheet(store, rows, first, title), _beside(page, f"compose-{kind}.webp")),
            title,
        )
        title = "the worst failures of the methods"
        failing = worst_sheet(store, worst(rows), title)
        lines += _shown(
            page, f"compose-{kind}-worst.webp", save_webp(failing, _beside(page, f"compose-{kind}-worst.webp")), title
        )
    if singles:
        lines += ["### Each LoRA alone", "", *single_table(rates, singles.get("floor", []), singles.get("truth", []))]
    replace_section(page, "\n".join(lines), MARK)


def _beside(page: Path, name: str) -> Path:
    return page.parent / "pictures" / name


def _shown(page: Path, name: str, saved: Path | None, title: str) -> list[str]:
    return [f"![{title}](pictures/{name})", ""] if saved else []
