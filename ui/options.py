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


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those left open are not passed on, and the default of what is called counts."""
    return {name: value for name, value in options.items() if value not in (None, [], ())}
