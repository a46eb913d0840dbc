"""``studio train ...``: teach a subject or a style."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ui import console
from ui.arguments import parse_settings
from ui.console import Json

app = typer.Typer(help="Teach a subject or a style as a LoRA.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Keeps ``concept`` a command of its own while it is the only one."""


@app.command()
def concept(
    data: Annotated[Path | None, typer.Argument(metavar="DIR", help="Folder of pictures, captioned by .txt files.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options; options given here win over it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The .safetensors file to write.")] = None,
    trigger: Annotated[str | None, typer.Option(help="The new word that calls the concept.")] = None,
    class_word: Annotated[str | None, typer.Option(help="What the thing is, for example 'cat'.")] = None,
    kind: Annotated[str | None, typer.Option(help="concept or style.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, as for generate.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.")] = None,
    targets: Annotated[str | None, typer.Option(help="attn, attn+ff, all, or a regular expression of module names.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other option of the YAML file. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would be done, and stop.")] = False,
    json: Json = False,
) -> None:
    """Teach what the pictures in DIR show; a few minutes for 6 to 8 pictures."""
    given: dict[str, Any] = {
        "data": data,
        "output": out,
        "trigger": trigger,
        "class_word": class_word,
        "kind": kind,
        "base": base,
        "rank": rank,
        "targets": targets,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    values = {key: value for key, value in given.items() if value is not None} | parse_settings(settings or [])
    with console.speaking(json) as voice:
        from training.config import load_config, make_config

        made = load_config(config, **values) if config else make_config(**values)
        if dry_run:
            from training.plan import describe

            description = describe(made)
            voice.answer(asdict(description), str(description))
            return
        from training.concept import train_concept

        result = train_concept(made)
        for note in result.notes:
            voice.note(f"note: {note}")
        loss = result.losses[-1] if result.losses else None
        payload = {"file": str(result.path), "steps": result.steps, "seconds": round(result.seconds, 1), "loss": loss}
        voice.answer({**payload, "notes": list(result.notes)}, str(result.path))
        voice.note(f"{result.steps} steps in {result.seconds:.0f} s")
