"""``studio lora ...``: look into LoRA files, check them against a base, convert and shrink them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ui import console
from ui.console import Json

if TYPE_CHECKING:
    from rich.table import Table

    from studio.lora.identity import LoraHeader

app = typer.Typer(help="Show, check, convert and resize LoRA files.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME_OR_FILE", help="A LoRA by name or file.")]
LayoutName = Literal["diffusers", "kohya"]
Layout = Annotated[LayoutName, typer.Option(help="How layers are named in the file.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")]


@app.command()
def show(name: Name, json: Json = False) -> None:
    """Say what a LoRA file is, from its header alone."""
    with console.speaking(json) as voice:
        from studio.lora.files import read_header
        from studio.lora.library import find_lora

        header = read_header(find_lora(name))
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
        "ranks": list(header.ranks),
        "alpha": header.alpha,
        "triggers": list(header.triggers),
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
        plain = "".join(c if c.isprintable() else " " for c in value)  # a stranger's text must not steer the terminal
        drawn.add_row(Text(key), Text(plain if len(plain) <= 160 else plain[:157] + "..."))
    return drawn


@app.command()
def check(
    name: Name,
    base: Annotated[
        str, typer.Option(help="Base model: 'embedded', a diffusers folder, a .safetensors checkpoint or a hub id.")
    ] = "embedded",
    json: Json = False,
) -> None:
    """Count the layers of a LoRA that fit a base; exit code 6 when some do not."""
    with console.speaking(json) as voice:
        from studio.base import load_base
        from studio.lora.files import check_against, module_shapes, read_header
        from studio.lora.library import find_lora

        header = read_header(find_lora(name))
        model = load_base(base)
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


@app.command()
def convert(
    name: Name,
    out: Target,
    layout: Layout = "diffusers",
    from_pickle: Annotated[
        bool, typer.Option("--from-pickle", help="NAME_OR_FILE is a pickle (.pt, .ckpt, .bin) that you trust.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a LoRA of any trainer in the layout of diffusers or kohya."""
    with console.speaking(json) as voice:
        from studio.lora.files import load_lora, read_header
        from studio.lora.library import find_lora
        from studio.lora.write import save_lora

        source = find_lora(name)
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
    json: Json = False,
) -> None:
    """Write a LoRA with a lower rank, the nearest there is; LoHa and LoKr become LoRA."""
    with console.speaking(json) as voice:
        from studio.lora.files import load_lora, read_header
        from studio.lora.library import find_lora
        from studio.lora.resize import resize as shorten
        from studio.lora.write import save_lora

        shortened = shorten(load_lora(find_lora(name)), rank=rank, keep=keep)
        written = save_lora(out, shortened.lora, layout)
        least = min(shortened.kept.values())
        payload = {**_facts(read_header(written)), "least_kept": least}
        voice.answer(payload, f"{written}\nevery layer keeps at least {least:.1%} of its energy")
