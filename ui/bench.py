"""``studio bench``: which way of composing keeps a user's own LoRAs apart on their own checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.paths import EMBEDDED
from ui import console
from ui.console import Json
from ui.options import BASE_HELP, Device, Dtype, LoraDirs, Memory, given

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.bench import Comparison
    from pipelines.bench_plan import Plan

TONES = {"kept": "good", "confused": "bad", "lost": "plain"}


def bench(
    base: Annotated[str, typer.Option(help=BASE_HELP)] = EMBEDDED,
    loras: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of LoRA files; those of other families and styles are left out.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", "-l", metavar="NAME_OR_FILE[:WEIGHT]", help="One LoRA. Repeatable.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD[:OPTION=VALUE,...],...",
            help="What to compare, such as merge,clora:unit=noise,step=.05; 'regions=no' keeps the boxes from a method that "
            "can do without. By default all. Repeatable.",
        ),
    ] = None,
    sizes: Annotated[str, typer.Option(metavar="N,...", help="LoRAs in a picture: 2, 3 or both.")] = "2",
    combinations: Annotated[int, typer.Option(help="Combinations of each size, drawn by seed.")] = 6,
    seeds: Annotated[int, typer.Option(help="Pictures of each combination and method.")] = 2,
    seed: Annotated[int, typer.Option(help="Decides combinations and the seeds of pictures.")] = 0,
    words: Annotated[
        list[str] | None,
        typer.Option(
            metavar='NAME="zqx cat"', help="How prompts call what a LoRA draws, where its file says nothing. Repeatable."
        ),
    ] = None,
    style: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A style LoRA for every picture. Repeatable.")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Instead of 'on the left a {1} and on the right a {2}'.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="What every prompt begins with, such as 'a photo, '.")] = "",
    suffix: Annotated[
        str | None,
        typer.Option(help="What every prompt ends with; by default ', white background', on which subjects compare best."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    references: Annotated[int, typer.Option(help="Pictures of each LoRA alone that others are compared with.")] = 4,
    reference_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your own instead: DIR/NAME/*.png, .jpg or .webp for every LoRA.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(metavar="base|FOLDER", help="What compares: the base itself, or a CLIP or DINOv2 vision model.")
    ] = "base",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default the base's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; by default the base's own.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; by default the base's own.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Sampler; by default the base's own.")] = None,
    lora_dir: LoraDirs = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures, results.jsonl, report.md and sheets.")] = Path(
        "outputs/bench"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print combinations, prompts and the number of pictures.")] = False,
    json: Json = False,
) -> None:
    """Compare composition methods on your own base and LoRAs. What is made stays, so the same command goes on after a stop."""
    with console.speaking(json) as voice:
        from pipelines.bench import compare
        from pipelines.bench_plan import make_plan
        from pipelines.bench_request import BenchRequest
        from pipelines.jobs import Machine

        request = BenchRequest.of(
            **given(
                base=base, loras=tuple(_refs(lora or ())), folder=loras, methods=tuple(methods or ()), sizes=_numbers(sizes),
                combinations=combinations, seeds=seeds, seed=seed, references=references, reference_images=reference_images,
                prompt=prompt, prefix=prefix, suffix=suffix, negative=negative, words=_words(words or ()),
                styles=tuple(style or ()), encoder=encoder, steps=steps, guidance=guidance, size=size, scheduler=scheduler,
            )
        )  # fmt: skip
        machine = Machine(lora_dirs=tuple(lora_dir or ()), device=device, dtype=dtype, memory=memory or "auto")
        if dry_run:
            _preview(voice, make_plan(request, machine.lora_dirs), out)
            return
        comparison = compare(request, out, machine=machine, say=voice.note)
        _deliver(voice, comparison)


def _refs(texts: list[str] | tuple[()]) -> list[Any]:
    from studio.requests import LoraRef

    return [LoraRef.parse(text) for text in texts]


def _numbers(text: str) -> tuple[int, ...]:
    """``2,3``. Raises RequestError where it is no list of whole numbers."""
    from studio.errors import RequestError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RequestError(f"--sizes '{text}' is no list of whole numbers, for example 2,3")
    return tuple(map(int, parts))


def _words(texts: list[str] | tuple[()]) -> dict[str, str]:
    """``NAME=WORDS`` pairs. Raises RequestError where one is none."""
    from studio.errors import RequestError

    found: dict[str, str] = {}
    for text in texts:
        name, equals, words = text.partition("=")
        if not equals or not name.strip() or not words.strip():
            raise RequestError(f"--words '{text}' is not NAME=WORDS, for example my-cat=\"zqx cat\"")
        found[name.strip()] = words.strip()
    return found


def _preview(voice: console.Voice, plan: Plan, out: Path) -> None:
    """What would be made; how long it takes only where pictures of the same rows were made in ``out`` before."""
    from collections import Counter
    from statistics import median

    from pipelines.bench_plan import all_tasks
    from pipelines.bench_store import timings

    tasks = all_tasks(plan)
    counts, known = Counter(task.row.label for task in tasks), timings(out)
    seconds = sum(count * median(known[row]) for row, count in counts.items()) if counts.keys() <= known.keys() else None
    told: list[dict[str, Any]] = [
        {"size": size, "loras": [s.name for s in one.subjects], "prompt": plan.prompt(one.subjects), "boxes": one.boxes}
        for size, several in plan.combinations.items() for one in several
    ]  # fmt: skip
    for note in plan.notes:
        voice.note(f"note: {note}")
    lines = [f"{' + '.join(one['loras'])}: {one['prompt']}" for one in told]
    lines.append(f"{len(tasks)} pictures: " + ", ".join(f"{count} {row}" for row, count in counts.items()))
    if seconds is not None:
        lines.append(f"about {seconds:.0f} s in all, by what was made in {out} before")
    payload = {
        "combinations": told,
        "pictures": len(tasks),
        "rows": dict(counts),
        "seconds": seconds,
        "notes": list(plan.notes),
    }
    voice.answer(payload, "\n".join(lines))


def _deliver(voice: console.Voice, comparison: Comparison) -> None:
    from pipelines.bench_report import numbers, sheet_name, warnings, write_page
    from studio.files import whole

    sheets = []
    for count in comparison.numbers:
        path = comparison.folder / sheet_name(count)
        with whole(path) as fresh:
            sheet(comparison, count).save(fresh, "PNG")
        sheets.append(str(path))
    report = write_page(comparison)
    for line in warnings(comparison):
        voice.note(f"note: {line}")
    payload = {
        "report": str(report), "sheets": sheets, "made": comparison.made, "threshold": _number(comparison.threshold),
        "told_apart": _number(comparison.told_apart), "encoder": comparison.encoder, "numbers": numbers(comparison),
        "notes": list(comparison.notes), "warnings": warnings(comparison), "failed": list(comparison.failed),
    }  # fmt: skip
    voice.answer(payload, *_tables(comparison), f"{report}\n" + "\n".join(sheets))
    if comparison.failed:
        raise typer.Exit(1)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _tables(comparison: Comparison) -> list[Any]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pipelines.bench_report import HEAD, SHORT, table

    found = []
    for count, rows in comparison.numbers.items():
        drawn = Table(title=f"{count} LoRAs in a picture", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in SHORT:
            drawn.add_column(HEAD[column], overflow="fold")
        for cells in table(rows):
            drawn.add_row(*(Text(cells[column]) for column in SHORT))
        found.append(drawn)
    return found


def sheet(comparison: Comparison, count: int) -> Image.Image:
    """The first picture of every combination (rows) and method (columns), with what became of each subject."""
    from ui.sheet import Label, SheetRow, Tile, contact_sheet

    rows = []
    for combination in comparison.plan.combinations[count]:
        tiles = []
        for label in (row.label for row in comparison.numbers[count]):
            found = comparison.picture(label, combination)
            if found is not None:
                picture, seen = found
                kinds = [one.verdict(comparison.threshold) for one in seen]
                said = zip(combination.subjects, kinds, strict=True)
                marks = [Label(f"{subject.name}: {kind}", TONES[kind]) for subject, kind in said]
                tiles.append(Tile(picture, (Label(label), *marks)))
        rows.append(SheetRow(combination.name, comparison.plan.prompt(combination.subjects), tuple(tiles)))
    return contact_sheet(f"{count} LoRAs in a picture, {comparison.base}", rows)
