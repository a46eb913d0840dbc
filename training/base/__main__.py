"""``python -m training.base PART``: train a part of the embedded base. ``accelerate launch`` runs it on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from studio.paths import EMBEDDED
from training.base.loop import Run, train

app = typer.Typer(no_args_is_help=True, add_completion=False)
Work = Annotated[Path, typer.Option(help="Folder of checkpoints, outside version control.")]
NamedA = Annotated[float, typer.Option(help="Share of subjects that belong to the first 24 named concepts.")]
NamedB = Annotated[float, typer.Option(help="Share of the further 24.")]
Pairs = Annotated[float, typer.Option(min=0, max=1, help="Share of scenes with two subjects.")]
Triples = Annotated[float, typer.Option(min=0, max=1, help="Share of scenes with three.")]
MadeUp = Annotated[float, typer.Option(min=0, max=1, help="Share of nouns behind a word that means nothing, as triggers do.")]
Looks = Annotated[float, typer.Option(min=0, max=1, help="Share of pictures in one of the looks the base may see.")]
Minutes = Annotated[float, typer.Option(help="Stop this sitting after so many minutes; run again to go on.")]


@app.callback()
def parts() -> None:
    """Train the parts of the embedded base, in the order vae, tokenizer, text, unet."""


@app.command()
def tokenizer(out: Path = Path("assets/base/tokenizer")) -> None:
    """Before step 2, once for a base: the tokenizer. Ties between words are broken anew each time, so it is committed."""
    from training.base.tokenizer import build

    build().save_pretrained(out)


@app.command()
def vae(
    work: Work = Path("work"),
    minutes: Minutes = 1e9,
    items: int = 500_000,
    channels: int = 8,
    batch: int = 32,
    rate: float = 4e-3,
    looks: Looks = 0.0,
    init: Annotated[Path | None, typer.Option(help="Go on from the VAE of a finished base folder.")] = None,
) -> None:
    """Step 1: the VAE."""
    from training.base import assemble
    from training.base import vae as part

    torch.manual_seed(0)
    run = Run(
        work=work, name=f"vae{channels}", items=items, batch=batch, rate=rate, adam_rate=rate * 3 / 8, minutes=minutes,
        weight_decay=0.0,
    )  # fmt: skip
    model = part.Objective(part.build(channels) if init is None else assemble.saved_vae(init))
    average = train(model, lambda step, rank: part.batch_at(step, rank, batch, part.CROP, looks), run)
    model.load_state_dict(average)
    print(part.scores(model.vae.eval()))


@app.command()
def text(
    work: Work = Path("work"),
    minutes: Minutes = 1e9,
    items: int = 150_000,
    batch: int = 64,
    rate: float = 3e-3,
    named_a: NamedA = 0.4,
    named_b: NamedB = 0.4,
    pairs: Pairs = 0.5,
    triples: Triples = 0.0,
    looks: Looks = 0.0,
    made_up: MadeUp = 0.0,
    after: Annotated[
        Path | None, typer.Option(help="Go on from the text side trained in this other folder, with its sketcher and heads.")
    ] = None,
) -> None:
    """Step 2: the text side."""
    from training.base import checkpoint
    from training.base import text as part
    from training.base.data import Mixture

    torch.manual_seed(1)
    words = part.tokenizer()
    model = part.Objective(part.build(len(words), words.bos_token_id, words.eos_token_id))
    run = Run(
        work=work, name="text", items=items, batch=batch, rate=rate, adam_rate=rate / 3, minutes=minutes, warmup=50,
        weight_decay=0.01,
    )  # fmt: skip
    if after is not None and not checkpoint.exists(run.folder):
        model.load_state_dict(checkpoint.load(after / "text")[0]["ema"])
    mixture = Mixture(named_a=named_a, named_b=named_b, pairs=pairs, triples=triples, looks=looks, made_up=made_up)
    average = train(model, lambda step, rank: part.batch_at(step, rank, batch, mixture), run)
    model.load_state_dict(average)
    print(part.scores(model.eval(), mixture))


@app.command()
def unet(
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: single subjects on 32 x 32; 2: whole scenes.")],
    work: Work = Path("work"),
    minutes: Minutes = 1e9,
    items: int = 300_000,
    batch: int = 64,
    rate: float = 2e-3,
    channels: int = 8,
    named_a: NamedA = 0.6,
    named_b: NamedB = 0.22,
    pairs: Pairs = 0.5,
    triples: Triples = 0.0,
    looks: Looks = 0.0,
    made_up: MadeUp = 0.0,
    init: Annotated[
        Path | None, typer.Option(help="Go on from a finished base folder; the parts in WORK take the place of its own.")
    ] = None,
) -> None:
    """Step 3: the UNet, on latents and caption states of the finished parts."""
    from accelerate import PartialState

    from training.base import assemble, checkpoint
    from training.base import unet as part
    from training.base.data import Mixture

    torch.manual_seed(2)
    vae, text = assemble.finished(work, init, channels)
    network = assemble.saved_unet(init) if init else part.build(channels)
    model = part.Objective(network)
    run = Run(
        work=work, name=f"unet{stage}", items=items, batch=batch, rate=rate, adam_rate=rate / 3, minutes=minutes,
        final_rate=0.5 if stage == 1 else 0.02, ema=0.998 if stage == 1 else 0.9985, weight_decay=0.01,
    )  # fmt: skip
    if stage == 2 and init is None and not checkpoint.exists(run.folder):
        groups, _ = checkpoint.load(work / "unet1")
        model.load_state_dict(groups["ema"])
    mixture = Mixture(
        named_a=named_a, named_b=named_b, pairs=pairs, triples=triples, looks=looks, made_up=made_up,
        side=32 if stage == 1 else 64,
    )  # fmt: skip
    pool = part.Pool(vae, text, mixture, vae.config.scaling_factor)
    train(model, part.batch_source(pool, batch, PartialState(cpu=not torch.cuda.is_available()).num_processes), run)


@app.command()
def save(
    out: Path,
    work: Work = Path("work"),
    part: str = "unet2",
    name: str = "base-0",
    channels: int = 8,
    init: Annotated[Path | None, typer.Option(help="Take from this base folder what WORK lacks.")] = None,
) -> None:
    """Put the parts trained so far into a stock diffusers folder OUT."""
    from training.base import assemble

    vae, text = assemble.finished(work, init, channels)
    pipe = assemble.pipeline(vae, text, assemble.load_unet(work, part, channels))
    print(assemble.save(pipe, out, name))


@app.command()
def loras(
    names: Annotated[list[str] | None, typer.Argument(help="Which examples; all when left out.")] = None,
    out: Path = Path("assets/loras"),
    base: str = EMBEDDED,
) -> None:
    """Last: the example LoRAs, taught on the finished base."""
    from training.base.loras import examples, teach

    for example in examples():
        if not names or example.name in names:
            print(teach(example, out, base), flush=True)


if __name__ == "__main__":
    app()
