"""``studio lora ...``: look into LoRA files, check them against a base, convert, shrink and share them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from studio.paths import EMBEDDED
from ui import console
from ui.console import Json
from ui.options import BASE_HELP, Device, LoraDirs

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.profiles import Profiled
    from studio.base import Base
    from studio.lora.identity import LoraHeader
    from studio.lora.survey import Row

app = typer.Typer(
    help="Show, check, profile, convert, resize and share LoRA files.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(metavar="NAME_OR_FILE", help="A LoRA by name or file.")]
LayoutName = Literal["diffusers", "kohya"]
Layout = Annotated[LayoutName, typer.Option(help="How layers are named in the file.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")]


@app.command()
def show(name: Name, lora_dir: LoraDirs = None, json: Json = False) -> None:
    """Say what a LoRA file is, from its header alone."""
    with console.speaking(json) as voice:
        from studio.lora.files import read_header
        from studio.lora.library import find_lora

        header = read_header(find_lora(name, lora_dir or ()))
        facts = _facts(header)
        voice.answer({**facts, "metadata": dict(header.metadata)}, _table(facts, header.metadata))


def _facts(header: LoraHeader) -> dict[str, Any]:
    return {
        "file": str(header.path),
        "bytes": header.file_bytes,
        "family": header.family,
        "trainer": header.trainer,
        "format": header.format,
        "kinds": list(header.kinds),
        "layers": len(header.layers),
        "components": list(header.components),
        "targets": list(header.targets),
        "ranks": list(header.ranks),
        "alpha": header.alpha,
        "triggers": list(header.triggers),
        **({"learnt words": list(header.tokens)} if header.tokens else {}),
    }


def _table(facts: dict[str, Any], metadata: Any) -> Table:
    """Facts, then metadata; a value longer than two lines is cut, since some trainers store their whole data set."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for key, value in facts.items():
        drawn.add_row(key, Text(", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    drawn.add_section()
    for key, value in sorted(metadata.items()):
        drawn.add_row(Text(_plain(key, 80)), Text(_plain(value, 160)))
    return drawn


def _plain(text: str, most: int) -> str:
    """A stranger's text, which must not steer the terminal, cut to ``most`` characters."""
    plain = console.harmless(text).replace("\n", " ")
    return plain if len(plain) <= most else plain[: most - 3] + "..."


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_FILE_OR_DIR", help="A LoRA by name or file, or a folder of them.")],
    base: Annotated[str, typer.Option(help=BASE_HELP)] = EMBEDDED,
    lora_dir: LoraDirs = None,
    json: Json = False,
) -> None:
    """Count the layers of a LoRA that fit a base; exit code 6 when some do not. For a folder, one table of all its files."""
    with console.speaking(json) as voice:
        from studio.base import load_base
        from studio.lora.library import find_lora

        if Path(name).is_dir() and not _holds_one_lora(Path(name)):
            _check_folder(voice, Path(name), load_base(base))
        else:
            _check_file(voice, find_lora(name, lora_dir or ()), load_base(base))


def _check_file(voice: console.Voice, path: Path, model: Base) -> None:
    from studio.lora.files import check_against, check_values, module_shapes, read_header

    header = read_header(path)
    check_values(path)
    match = check_against(header, module_shapes(**model.models()))
    trained_on = header.metadata.get("studio.base_sha256", "")
    payload = {
        "file": str(header.path),
        "base": model.name,
        "matched": len(match.matched),
        "missing": list(match.missing),
        "wrong_shape": list(match.wrong_shape),
        "same_base_version": trained_on == model.sha256 if trained_on else None,
    }
    lines = [f"{match} (base {model.name}, {model.family.title}; LoRA for {header.family}, written by {header.trainer})"]
    lines += [f"not in the base: {module}" for module in match.missing]
    lines += [f"another shape in the base: {module}" for module in match.wrong_shape]
    if trained_on and trained_on != model.sha256:
        lines.append(f"trained on another version of {model.name}: expect it to act differently")
    voice.answer(payload, "\n".join(lines))
    if not match.complete:
        raise typer.Exit(6)


def _holds_one_lora(folder: Path) -> bool:
    """Whether a folder is what PEFT and diffusers save one LoRA as."""
    from studio.lora.library import FOLDER_FILES

    return any((folder / name).is_file() for name in FOLDER_FILES)


def _check_folder(voice: console.Voice, folder: Path, model: Base) -> None:
    """One table for a mixed folder; a bad file is a row, not an error."""
    from dataclasses import asdict

    from studio.lora.files import module_shapes
    from studio.lora.survey import survey

    rows = survey(folder, module_shapes(**model.models()), family=model.family.name)
    fitting = sum(bool(row.fits) for row in rows)
    payload = {"folder": str(folder), "base": model.name, "family": model.family.name, "files": len(rows), "fit": fitting}
    voice.answer({**payload, "rows": [asdict(row) for row in rows]}, _survey_table(rows))
    voice.note(f"{fitting} of {len(rows)} LoRA files in {folder} fit the base {model.name} ({model.family.title})")


def _survey_table(rows: list[Row]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("name", "family", "trainer", "rank", "layers", "text", "triggers", "verdict"):
        drawn.add_column(title, overflow="fold", ratio=3 if title in ("name", "verdict") else None)
    for row in rows:
        known = [rank for rank in row.ranks if rank]  # a LoKr of whole factors has none
        ranks = "-".join(str(rank) for rank in dict.fromkeys((known[0], known[-1]))) if known else ""
        kinds = "" if row.kinds in ((), ("lora",)) else "+".join(row.kinds)
        cells = (
            row.name,
            row.family,
            row.trainer,
            f"{ranks} {kinds}".strip(),
            f"{row.matched} of {row.total}" if row.total else "",
            "yes" if row.text_encoder else "",
            ", ".join(row.triggers),
            row.verdict,
        )
        drawn.add_row(*(Text(_plain(cell, 300)) for cell in cells), style="" if row.fits else "dim")
    return drawn


@app.command()
def convert(
    name: Name,
    out: Target,
    layout: Layout = "diffusers",
    from_pickle: Annotated[
        bool, typer.Option("--from-pickle", help="NAME_OR_FILE is a pickle (.pt, .ckpt, .bin) that you trust.")
    ] = False,
    lora_dir: LoraDirs = None,
    json: Json = False,
) -> None:
    """Write a LoRA of any trainer in the layout of diffusers or kohya."""
    with console.speaking(json) as voice:
        from studio.lora.files import load_lora, read_header
        from studio.lora.library import find_lora
        from studio.lora.write import save_lora

        source = find_lora(name, lora_dir or ())
        if from_pickle:
            from studio.lora.convert import convert_pickle

            written = convert_pickle(source, out, layout=layout)
        else:
            written = save_lora(out, load_lora(source), layout)
        voice.answer(_facts(read_header(written)), str(written))


@app.command()
def resize(
    name: Name,
    out: Target,
    rank: Annotated[int, typer.Option(help="Largest rank of a layer.")],
    keep: Annotated[
        float | None,
        typer.Option(help="Share of each layer's energy that is enough, for example 0.95; by default all the rank."),
    ] = None,
    layout: Layout = "diffusers",
    lora_dir: LoraDirs = None,
    json: Json = False,
) -> None:
    """Write a LoRA with a lower rank, the nearest there is; LoHa and LoKr become LoRA."""
    with console.speaking(json) as voice:
        from studio.lora.files import load_lora, read_header
        from studio.lora.library import find_lora
        from studio.lora.resize import resize as shorten
        from studio.lora.write import save_lora

        shortened = shorten(load_lora(find_lora(name, lora_dir or ())), rank=rank, keep=keep)
        written = save_lora(out, shortened.lora, layout)
        least = min(shortened.kept.values())
        payload = {**_facts(read_header(written)), "least_kept": least}
        voice.answer(payload, f"{written}\nevery layer keeps at least {least:.1%} of its energy")


@app.command()
def profile(
    names: Annotated[list[str], typer.Argument(metavar="NAME_OR_FILE...", help="LoRAs by name or file.")],
    base: Annotated[str, typer.Option(help=BASE_HELP)] = EMBEDDED,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    lora_dir: LoraDirs = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure whether LoRAs change fine detail (high) or broad shapes (low), which decides their turns in CMLoRA.

    A profile belongs to one LoRA and one base. It is kept beside the LoRA's file, where CMLoRA finds it.
    """
    with console.speaking(json) as voice:
        from dataclasses import asdict

        from pipelines.profiles import profile as measured

        rows = []
        for index, row in enumerate(measured(names, base=base, again=again, lora_dirs=lora_dir or (), device=device)):
            rows.append(row)
            if row.measured:
                where = f"kept in {row.path}" if row.path else "which could not be kept: no place can be written to"
                voice.note(f"{index + 1} of {len(names)}: measured the profile of '{row.name}', {where}")
        told = [{**asdict(row.profile), "name": row.name, "high": row.profile.high, "measured": row.measured, "path": row.path}
                for row in rows]  # fmt: skip
        voice.answer({"base": base, "profiles": told}, _profile_table(rows))


BARS = "▁▂▃▄▅▆▇█"


def bars(values: Sequence[float]) -> str:
    """One character per number, on a scale of their own that reaches to 0."""
    low, high = min(0.0, *values), max(0.0, *values)
    width = (high - low) or 1.0
    return "".join(BARS[round((value - low) / width * (len(BARS) - 1))] for value in values)


def _profile_table(rows: Sequence[Profiled]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("name", "score", "frequency", "step by step", "kept in"):
        drawn.add_column(title, overflow="fold", justify="right" if title == "score" else "left")
    for row in rows:
        found = row.profile
        kind = "high" if found.high else "low"
        cells = (row.name, f"{found.score:+.4f}", kind, bars(found.curve), str(row.path or "not kept"))
        drawn.add_row(*(Text(_plain(cell, 300)) for cell in cells))
    return drawn


@app.command()
def share(
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The .zip to write; by default NAME.zip here.")] = None,
    preview: Annotated[Path | None, typer.Option(help="A picture to show; by default one is drawn.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw; by default the trigger.")] = None,
    base: Annotated[str, typer.Option(help=BASE_HELP)] = EMBEDDED,
    seed: Annotated[int, typer.Option(help="Seed of the drawn preview.")] = 0,
    lora_dir: LoraDirs = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Pack a LoRA for others: the file, a preview picture, a card and A1111's notes, without any path of this machine."""
    with console.speaking(json) as voice:
        from pipelines.share import share as pack

        packed = pack(name, out, preview=preview, prompt=prompt, base=base, seed=seed, lora_dirs=lora_dir or (), device=device)
        for note in packed.notes:
            voice.note(f"note: {note}")
        voice.answer({"file": str(packed.path), "holds": list(packed.files)}, f"{packed.path}: {', '.join(packed.files)}")
