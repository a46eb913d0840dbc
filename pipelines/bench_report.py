"""The page of a comparison: tables, what they mean, how they were measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipelines.bench import Comparison
from pipelines.bench_numbers import FEWEST, RowNumbers, paired_difference
from pipelines.bench_plan import FLOOR, SINGLE
from studio.files import whole

REPORT = "report.md"
REFERENCE = "merge"
SURE = 0.8
"""Share of references that an encoder must put with their own subject for its verdicts to be worth much."""

SHORT = (0, 2, 3, 4, 5, 8, 9)
"""The columns that fit a terminal."""
HEAD = (
    "method", "pictures", "kept", "all kept", "confused", "lost", "likeness min / mean / max", "kept, against merge",
    "seconds", "time / merge", "UNet rows",
)  # fmt: skip


def table(rows: tuple[RowNumbers, ...]) -> list[list[str]]:
    """Cells of the table of one size, a list for each row, under :data:`HEAD`."""
    merge = next((row for row in rows if row.label == REFERENCE), None)
    return [_cells(row, merge) for row in rows]


def _cells(row: RowNumbers, merge: RowNumbers | None) -> list[str]:
    compared = merge is not None and row.label not in (FLOOR, SINGLE, REFERENCE)
    difference = paired_difference(row.by_combination, merge.by_combination) if merge is not None and compared else None
    return [
        row.label,
        str(row.pictures),
        str(row.kept),
        str(row.all_kept),
        f"{100 * row.confused.value:.0f} %",
        f"{100 * row.lost.value:.0f} %",
        f"{row.least:.2f} / {row.mean:.2f} / {row.most:.2f}",
        "" if difference is None else str(difference),
        f"{row.seconds:.2f}",
        f"{row.seconds / merge.seconds:.2f}" if merge is not None and merge.seconds > 0 else "",
        f"{row.forwards:.0f}",
    ]


def numbers(comparison: Comparison) -> dict[str, Any]:
    """The same for scripts."""
    return {
        str(count): {
            row.label: {
                "pictures": row.pictures,
                "kept": [row.kept.value, row.kept.low, row.kept.high],
                "all_kept": [row.all_kept.value, row.all_kept.low, row.all_kept.high],
                "confused": row.confused.value,
                "lost": row.lost.value,
                "likeness": [row.least, row.mean, row.most],
                "seconds": row.seconds,
                "unet_rows": row.forwards,
            }
            for row in rows
        }
        for count, rows in comparison.numbers.items()
    }


def warnings(comparison: Comparison) -> list[str]:
    """What a reader must know before believing a number."""
    found = []
    if comparison.told_apart < SURE:
        found.append(
            f"the encoder puts only {100 * comparison.told_apart:.0f} % of the references with their own LoRA's: it can hardly "
            "tell these LoRAs apart; do not trust its verdicts, try another --encoder, --reference-images or more --references"
        )
    for count, rows in comparison.numbers.items():
        by_label = {row.label: row for row in rows}
        floor, single = by_label.get(FLOOR), by_label.get(SINGLE)
        if floor is not None and single is not None and floor.kept.value >= single.kept.value:
            found.append(
                f"with {count} subjects the base without LoRAs is kept as often as single LoRAs: the encoder sees nothing here"
            )
        if len(comparison.plan.combinations[count]) < FEWEST:
            found.append(f"fewer than {FEWEST} combinations of {count}: differences between methods get no interval")
    return [*found, *(f"failed: {one}" for one in comparison.failed)]


def page(comparison: Comparison) -> str:
    """The whole page as Markdown."""
    plan, request = comparison.plan, comparison.plan.request
    lines = ["# Composition methods compared", "", f"Base: {comparison.base}. Pictures: {plan.size[0]}x{plan.size[1]}.", ""]
    for count, rows in comparison.numbers.items():
        several = plan.combinations[count]
        lines += [f"## {count} LoRAs in a picture", "", f"{len(several)} combinations, {request.seeds} seeds each.", ""]
        lines += _markdown(HEAD, table(rows))
        lines += ["", f"![{count} LoRAs]({sheet_name(count)})", ""]
    notes = [*warnings(comparison), *comparison.notes]
    lines += ["## Notes", "", *(f"- {_plain(note)}" for note in notes), ""] if notes else []
    lines += ["## How it was measured", "", *_how(comparison), "", "## LoRAs and combinations", ""]
    lines += [f'- {_plain(one.name)}: "{_plain(one.phrase)}", weight {one.weight:g}' for one in plan.used]
    lines += ["", *(f"- {_plain(plan.prompt(one.subjects))}" for several in plan.combinations.values() for one in several), ""]
    return "\n".join(lines)


def _how(comparison: Comparison) -> list[str]:
    request = comparison.plan.request
    if request.reference_images is None:
        made = f"{request.references} pictures of it alone at weight 1, with seeds of their own"
        references = f"{made}, each cut to the box where it was asked for"
        tenth = "references, each against the others of its LoRA,"
    else:
        references = "the pictures that were given for it"
        tenth = "pictures of the single row"
    apart = f" It puts {100 * comparison.told_apart:.0f} % of the references with the others of their own LoRA."
    return [
        "Each subject's box is cut out of a picture and compared with references of every LoRA by "
        f"{_plain(comparison.encoder)}: the mean cosine of features standardised over all references. "
        f"References of a LoRA: {references}." + ("" if math.isnan(comparison.told_apart) else apart),
        "",
        f"*Kept*: most like its own references, and at least {comparison.threshold:.3f}: half way between what a tenth of the "
        f"floor's subjects exceed and what a tenth of {tenth} fall short of. "
        "*Confused*: more like another LoRA of the picture, and at least that much. *Lost*: neither. "
        "*All kept*: pictures in which every subject is kept.",
        "",
        "*floor*: the base without LoRAs, asked for the same. *single*: each LoRA alone where it would stand; what is not kept "
        "there is no method's fault. All methods have the same prompts, seeds and boxes; boxes are told to those that take "
        "regions.",
        "",
        "Intervals are Wilson's, 95 %, for as many independent outcomes as the spread between combinations leaves; differences "
        "to merge (percentage points) are bootstrapped over combinations. Likeness min / mean / max is over the subjects of a "
        "picture, averaged over pictures. Seconds are medians of single pictures on this machine; UNet rows count every row of "
        "every pass, with and without the prompt, shallow and early passes too.",
    ]


def _markdown(head: tuple[str, ...], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(map(_plain, row))} |" for row in cells)]


def _plain(text: str) -> str:
    """Names and words of files are a stranger's: nothing in them is markup."""
    return "".join("\\" + c if c in "\\`*_{}[]<>|#!" else c if c.isprintable() else " " for c in text)


def sheet_name(count: int) -> str:
    return f"sheet-{count}.png"


def write_page(comparison: Comparison) -> Path:
    """``report.md``, which appears whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    path = comparison.folder / REPORT
    with whole(path) as fresh:
        fresh.write_text(page(comparison), "utf-8")
    return path
