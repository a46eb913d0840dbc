"""``studio train ...``: teach a subject or a style."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ui import console
from ui.arguments import parse_settings
from ui.console import Json, Voice

if TYPE_CHECKING:
    from training.config import ConceptConfig
    from training.many import Outcome

app = typer.Typer(help="Teach a subject or a style as a LoRA.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Keeps ``concept`` a command of its own while it is the only one."""


@app.command()
def concept(
    data: Annotated[Path | None, typer.Argument(metavar="DIR", help="Folder of pictures, captioned by .txt files.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of options; options given here win over it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The .safetensors file to write; with --many the folder of them.")
    ] = None,
    many: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Train one LoRA for every subfolder; train.yaml there has its own options."),
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="The new word that calls the concept.")] = None,
    class_word: Annotated[str | None, typer.Option(help="What the thing is, for example 'cat'.")] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="concept|style", help="What is taught; a style has another caption of its own.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, as for generate.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="attn, attn+ff, image, all, or a regular expression of module names.")
    ] = None,
    train_text: Annotated[
        str | None, typer.Option(help="none, embedding (learnt words), lora (on the text encoder), or embedding+lora.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, of --batch pictures each.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of the LoRA on the UNet.")] = None,
    text_learning_rate: Annotated[float | None, typer.Option(help="Learning rate of the text encoder's LoRA.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures in one step.")] = None,
    precision: Annotated[str | None, typer.Option(metavar="fp32|bf16|fp16", help="Of the computation.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(metavar="auto|diffusers|kohya", help="Names in the file; auto: those most programs read for the base."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is random.")] = None,
    preview_every: Annotated[int | None, typer.Option(help="Steps between previews; 0: none.")] = None,
    preview_prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT", help="What a preview shows; {trigger} and {class_word} are filled in. Repeatable."),
    ] = None,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard", help="Log losses and previews for TensorBoard.")] = None,
    restart: Annotated[
        bool | None, typer.Option("--restart", help="Start over instead of resuming; replace a finished LoRA.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="Any other option of the YAML file. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would be done, and stop.")] = False,
    json: Json = False,
) -> None:
    """Teach what the pictures in DIR show; a few minutes for 6 to 8 pictures. Run again after a stop, it goes on.

    --dry-run prints every option, with the value it has here.
    """
    given: dict[str, Any] = {
        "trigger": trigger,
        "class_word": class_word,
        "kind": kind,
        "base": base,
        "rank": rank,
        "targets": targets,
        "train_text": train_text,
        "steps": steps,
        "learning_rate": learning_rate,
        "text_learning_rate": text_learning_rate,
        "batch": batch,
        "precision": precision,
        "layout": layout,
        "seed": seed,
        "preview_every": preview_every,
        "preview_prompts": tuple(preview_prompt) if preview_prompt else None,
        "tensorboard": tensorboard,
        "restart": restart,
    }
    values = {key: value for key, value in given.items() if value is not None} | parse_settings(settings or [])
    with console.speaking(json) as voice:
        if many is not None:
            _several(voice, many, data, config, out, values, dry_run)
            return
        paths = {key: path for key, path in (("data", data), ("output", out)) if path is not None}
        _one(voice, config, paths | values, dry_run)


def _one(voice: Voice, config: Path | None, values: dict[str, Any], dry_run: bool) -> None:
    from training.config import make_config
    from training.config_file import load_config

    made = load_config(config, **values) if config else make_config(**values)
    if dry_run:
        from training.plan import describe

        description = describe(made)
        voice.answer(asdict(description), str(description))
        return
    from training.concept import train_concept

    with _aloud(voice) as said:
        result = train_concept(made, None, _preview(made))
    if _second():
        return
    for note in result.notes:
        if (made.output.stem, note) not in said:
            voice.note(f"note: {note}")
    loss = result.losses[-1] if result.losses else None
    payload = {"file": str(result.path), "steps": result.steps, "seconds": round(result.seconds, 1), "loss": loss}
    voice.answer({**payload, "notes": list(result.notes)}, str(result.path))
    if result.losses:
        voice.note(f"{result.steps} steps in {result.seconds:.0f} s")


def _several(
    voice: Voice, many: Path, data: Path | None, config: Path | None, out: Path | None, values: dict[str, Any], dry_run: bool
) -> None:
    from studio.errors import RequestError, StudioError
    from training.config_file import read_options
    from training.many import configs_of, summary, train_many

    if data is not None:
        raise RequestError(f"both '{data}' and --many '{many}' are given: leave one of them out")
    shared = (read_options(config) if config else {}) | values
    configs = configs_of(many, out, **shared)
    if dry_run:
        from training.plan import describe

        runs: list[dict[str, Any]] = []
        words = []
        for name, made in configs.items():
            try:
                if isinstance(made, StudioError):
                    raise made
                described = describe(made)
                runs.append({"name": name, **asdict(described)})
                words.append(f"{name}\n{described}\n")
            except StudioError as error:
                runs.append({"name": name, "error": str(error)})
                words.append(f"{name}\nfailed      {error}\n")
        voice.answer({"runs": runs}, *words)
        if any("error" in run for run in runs):
            raise typer.Exit(1)
        return

    def told(outcome: Outcome) -> None:
        if not _second():
            for note in (*outcome.notes, *([outcome.error] if outcome.error else [])):
                if (outcome.name, note) not in said:
                    voice.note(f"{outcome.name}: {note}")

    with _aloud(voice, many=True) as said:
        outcomes = train_many(configs, None, _preview, told)
    if not _second():
        payload = {"runs": [asdict(outcome) for outcome in outcomes]}
        voice.answer(payload, _table(outcomes))
        voice.note(summary(outcomes))
    if any(outcome.state == "cancelled" for outcome in outcomes):
        raise typer.Exit(130)
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)


@contextmanager
def _aloud(voice: Voice, many: bool = False) -> Iterator[set[tuple[str, str]]]:
    """What a training notes is said at once, before it begins or on the way; those said, with the run's name."""
    said: set[tuple[str, str]] = set()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            run, note = str(getattr(record, "run", "")), record.getMessage()
            said.add((run, note))
            voice.note(f"{run if many else 'note'}: {note}")

    logger, ear = logging.getLogger("training.concept"), Ear()
    before = logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(ear)
        logger.setLevel(before)


def _preview(config: ConceptConfig) -> Any:
    """What draws previews, when they are asked for."""
    if not config.preview_every:
        return None
    from pipelines.preview import previewer

    return previewer(config)


def _second() -> bool:
    """Whether this is not the first of several processes: only that one speaks."""
    return os.environ.get("RANK", "0") != "0"


def _table(outcomes: list[Outcome]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("LoRA", "", "steps", "time", "loss", "file or reason", box=None, pad_edge=False)
    for outcome in outcomes:
        minutes, seconds = divmod(round(outcome.seconds), 60)
        table.add_row(
            escape(outcome.name),
            outcome.state,
            str(outcome.steps) if outcome.steps else "",
            f"{minutes}:{seconds:02d}" if outcome.seconds else "",
            f"{outcome.loss:.4f}" if outcome.loss is not None else "",
            escape(outcome.error or str(outcome.path or "")),
        )
    return table
