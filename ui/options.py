"""Options that several commands have: where files are looked for, and where a base runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

BASE_HELP = "Base model: 'embedded', a diffusers folder, a .safetensors checkpoint, a name below STUDIO_MODEL_PATH or a hub id."

Vae = Annotated[str | None, typer.Option(metavar="FILE", help="Another VAE: a file, a diffusers folder or a hub id.")]
ClipSkip = Annotated[int | None, typer.Option(help="1 reads the text encoder's last layer, 2 the last but one, ...")]
Embeddings = Annotated[
    list[str] | None,
    typer.Option("--embedding", metavar="FILE", help="Textual inversion; prompts call it by its name. Repeatable."),
]
LoraDirs = Annotated[
    list[Path] | None, typer.Option("--lora-dir", metavar="DIR", help="Where LoRAs are looked for first. Repeatable.")
]
Device = Annotated[str | None, typer.Option(metavar="auto|cuda|mps|cpu", help="Where to compute.")]
Dtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"] | None, typer.Option(help="Number format of UNet and text encoders.")
]
Memory = Annotated[
    Literal["low", "auto", "high"] | None,
    typer.Option(help="low offloads models and tiles the VAE, high never does, auto does when the card is too small."),
]

Compose = Annotated[
    str | None,
    typer.Option("--compose", metavar="METHOD", help="How several LoRAs act together; listed below. By default merge."),
]
OtherMethod = Annotated[
    str | None,
    typer.Option("--compose", metavar="METHOD", help="Another method ('studio methods' lists them); by default the picture's."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPTION=VALUE", help="An option of the method ('studio methods' lists them). Repeatable."),
]
Regions = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        metavar="NAME[:W][+NAME[:W]]@x0,y0,x1,y1[=PROMPT]",
        help="Where LoRAs act and what is drawn there: shares of width and height from the top left corner, or a mask "
        "(@FILE.png, white inside). Repeatable; for methods that take regions.",
    ),
]
InitImage = Annotated[
    Path | None, typer.Option("--init-image", metavar="FILE", help="A picture to begin at, instead of noise.")
]
Strength = Annotated[
    float | None, typer.Option(help="With --init-image: how much may change, over 0 and up to 1. By default 0.6.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse a prompt that lacks a LoRA's trigger. By default it is added at the end.")
]
AsWritten = Annotated[bool, typer.Option("--as-written", help="Leave the prompt as it is, also without a LoRA's trigger.")]
Explain = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Also draw what the method did: schedules, profiles, words, maps; see DIR/index.html."),
]


def triggers(strict: bool, as_written: bool) -> str | None:
    """What a request shall do about missing triggers; None: the default.

    Raises:
        RequestError: both are asked for.
    """
    from studio.errors import RequestError

    if strict and as_written:
        raise RequestError("--strict refuses a prompt without a trigger and --as-written takes it: give one of them")
    return "require" if strict else "keep" if as_written else None


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those left open are not passed on, and the default of what is called counts."""
    return {name: value for name, value in options.items() if value not in (None, [], ())}
