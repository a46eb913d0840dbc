"""The ``studio`` command. Rooms are imported inside the commands, so that help appears at once and needs no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.paths import EMBEDDED
from ui import bench, compare, console, lora_cli, methods, render, train_cli
from ui.arguments import free_path, parse_settings
from ui.console import Json
from ui.options import (
    BASE_HELP,
    AsWritten,
    ClipSkip,
    Compose,
    Device,
    Dtype,
    Embeddings,
    Explain,
    InitImage,
    LoraDirs,
    Memory,
    OtherMethod,
    Regions,
    Settings,
    Strength,
    Strict,
    Vae,
    given,
    triggers,
)
from ui.rooms import DISTRIBUTION, shadowed

if TYPE_CHECKING:
    from pipelines import GenerateResult

OUTPUTS = Path("outputs")
"""Where results go when no file is named, relative to the working directory."""

EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in console.EXIT_CODES.items()) + "."

app = typer.Typer(
    name="studio",
    help="Teach diffusion models subjects and styles as LoRAs, and put several of them into one picture.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(train_cli.app, name="train")
app.add_typer(lora_cli.app, name="lora")

Out = Annotated[Path | None, typer.Option("--out", "-o", help="PNG to write; with several pictures, numbered beside it.")]


def _version(asked: bool) -> None:
    if asked:
        from studio import __version__

        print(f"{DISTRIBUTION} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options in front of the command; ``--version`` ends in its callback."""


@app.command(epilog=f"\b\nMethods for --compose:\n{methods.listing()}\n\n{EPILOG}")
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="What to draw, with the LoRAs' trigger words; (word:1.2), BREAK and <lora:name:0.8> act."
        ),
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", "-l", metavar="NAME_OR_FILE[:WEIGHT]", help="A LoRA; by default its weight is 1. Repeatable."),
    ] = None,
    compose: Compose = None,
    settings: Settings = None,
    region: Regions = None,
    base: Annotated[str, typer.Option(help=BASE_HELP)] = EMBEDDED,
    negative: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default the base's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; by default the base's own.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first picture; the next has seed + 1. By default random.")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; by default the base's own.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Sampler: dpmpp_2m, ddim, ..., or as A1111 or ComfyUI call it; by default the base's own."),
    ] = None,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    init_image: InitImage = None,
    strength: Strength = None,
    strict: Strict = False,
    as_written: AsWritten = False,
    vae: Vae = None,
    clip_skip: ClipSkip = None,
    embedding: Embeddings = None,
    lora_dir: LoraDirs = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    explain: Explain = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Draw PROMPT, with any number of LoRAs."""
    with console.speaking(json) as voice:
        fields = given(
            method=compose,
            options=parse_settings(settings or ()),
            regions=tuple(region or ()),
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            scheduler=scheduler,
            size=size,
            init_image=init_image,
            strength=strength,
            triggers=triggers(strict, as_written),
            vae=vae,
            clip_skip=clip_skip,
            embeddings=tuple(embedding or ()),
            lora_dirs=lora_dir,
            device=device,
            dtype=dtype,
            memory=memory,
            explain=explain,
        )
        from pipelines import generate as draw

        _check_out(out)
        saved = _Saved(out, prompt)
        try:
            result = draw(prompt, loras=tuple(lora or ()), base=base, count=count, on_round=saved, **fields)
        except BaseException:  # also an interrupt
            if saved.files:
                voice.note(f"made before that: {', '.join(saved.files)}")
            raise
        _deliver(voice, result, saved.files, explain)


@app.command()
def rerun(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A PNG this studio wrote; or a picture or .txt with A1111's or Forge's text."),
    ],
    base: Annotated[str | None, typer.Option(help="Instead of the base it names. " + BASE_HELP)] = None,
    compose: OtherMethod = None,
    settings: Settings = None,
    region: Regions = None,
    init_image: InitImage = None,
    vae: Vae = None,
    embedding: Embeddings = None,
    lora_dir: LoraDirs = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Memory = None,
    explain: Explain = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Make the picture in FILE again from what it carries; LoRAs that were renamed are found by their hash."""
    with console.speaking(json) as voice:
        changes = given(
            base=base,
            method=compose,
            options=parse_settings(settings) if settings else ({} if compose else None),
            regions=tuple(region or ()),
            init_image=init_image,
            vae=vae,
            embeddings=tuple(embedding or ()),
            lora_dirs=lora_dir,
            device=device,
            dtype=dtype,
            memory=memory,
            explain=explain,
        )
        from pipelines import rerun as draw_again

        _check_out(out)
        saved = _Saved(out, f"{file.stem.lstrip('0123456789-')} again")
        result = draw_again(file, **changes)
        saved(result)  # its notes are complete only now
        _deliver(voice, result, saved.files, explain)


app.command(epilog=EPILOG)(render.render)
app.command(epilog=EPILOG)(bench.bench)
app.command(epilog=EPILOG)(compare.compare)


@dataclass
class _Saved:
    """Writes pictures as they are made: to ``out``, or to a free name after ``words``; ``files`` is what was written."""

    out: Path | None
    words: str
    files: list[str] = field(default_factory=list)

    def __call__(self, made: GenerateResult) -> None:
        self.out = self.out or free_path(OUTPUTS, self.words, ".png")
        self.files += map(str, made.save(self.out))


def _check_out(out: Path | None) -> None:
    """Before any work: drawing may take minutes, and only PNG carries the request."""
    from pipelines.explain import writable
    from studio.errors import RequestError

    if out is not None and out.suffix.lower() != ".png":
        raise RequestError(f"--out '{out}' is not a .png: pictures are written as PNG, which carries the request")
    if out is not None and out.is_dir():
        raise RequestError(f"--out '{out}' is a folder: give the name of a file in it, such as '{out / 'picture.png'}'")
    writable(OUTPUTS if out is None else out.parent)


def _deliver(voice: console.Voice, result: GenerateResult, files: list[str], explain: Path | None) -> None:
    """Say what was written and what is to be said; ``explain`` is where a page on it is, if one was asked for."""
    for note in result.notes:
        voice.note(f"note: {note}")
    payload = {
        "files": files,
        "seeds": list(result.seeds),
        "seconds": round(result.seconds, 3),
        "notes": list(result.notes),
        "request": result.request.model_dump(mode="json"),
    }
    voice.answer(payload, "\n".join(files))
    if explain is not None:
        voice.note(f"what was done: {explain / 'index.html'}")


@app.command("methods")
def show_methods(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Which methods; by default all.")] = None,
    json: Json = False,
) -> None:
    """List how several LoRAs can act together, with every option, its default and what it does."""
    with console.speaking(json) as voice:
        from dataclasses import asdict

        from compose import METHODS

        told = [methods.describe(name) for name in names or METHODS]
        voice.answer({"methods": [asdict(method) for method in told]}, *methods.page(told))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine can do, which kernels really run, and what is missing."""
    with console.speaking(json) as voice:
        from ui.doctor import examine, table

        findings = examine(OUTPUTS)
        missing = [f for f in findings if f.state == "missing"]
        payload = {"ready": not missing, "findings": [f.as_dict() for f in findings]}
        voice.answer(payload, table(findings))
        if missing:
            voice.note("missing: " + "; ".join(f"{f.name} ({f.detail})" for f in missing))
            raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and the taught LoRA.")] = OUTPUTS / "demo",
    checkout: Annotated[
        Path | None, typer.Option(help="A checkout of this project, whose tests hold the judge; by default this one.")
    ] = None,
) -> None:
    """Two taught subjects side by side, one more taught live, and a contact sheet of both with the judge's verdicts."""
    with console.speaking() as voice:
        from ui.demo import run_demo

        run_demo(out, voice, checkout)


def main() -> None:
    """The console script."""
    foreign = shadowed()
    if foreign:
        print(
            f"error: {'; '.join(foreign)}: another installed package takes the name; install {DISTRIBUTION} "
            "in an environment of its own",
            file=sys.stderr,
        )
        sys.exit(9)
    sys.exit(console.run(app))


if __name__ == "__main__":
    main()
