"""``studio demo``: the whole idea in a few minutes on the embedded base.

1. A first picture from two shipped LoRAs, each in a box of its own: two subjects the base model never saw, side by side.
2. A third subject is taught live, from eight pictures.
3. A contact sheet over several seeds, beside the true art, with the judge's verdict under every picture.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.lora.library import short_name
from ui.console import Voice
from ui.rooms import HOME

if TYPE_CHECKING:
    from PIL import Image

    from studio.art.scenes import Scene
    from ui.sheet import Label, SheetRow

SHIPPED: Mapping[str, str] = {"dog face": "dog-face", "cat face": "cat-face"}
"""Held-out subject -> the shipped LoRA that knows it, in the order they stand in the picture."""
METHOD = "lora-composer"
"""How two LoRAs share a picture without mixing."""
BOXES = ("0.02,0.2,0.48,0.8", "0.52,0.2,0.98,0.8")
"""Where the two subjects stand, from left to right, as shares of the picture."""
LIVE, TRIGGER = "helicopter", "wug"
"""The held-out subject taught live, and the word that will call it."""
STYLE, BACKGROUND = "3d", "blue"
PICTURES = 8
"""Training pictures of the live subject."""
SEED, SEEDS = 1, 4
"""First seed of the contact sheet and how many."""

Verdicts = Callable[["Image.Image", "Scene"], dict[str, str]]
"""Compares a picture with what was asked: concept -> present, confused, vanished or other."""


@dataclass(frozen=True)
class Picture:
    """What one row of the sheet asks for: subjects from left to right (one alone stands in the centre), ``boxed`` each with its
    LoRA in a box of its own."""

    title: str
    subjects: tuple[str, ...]
    prompt: str
    loras: tuple[str, ...] = ()
    boxed: bool = False


def run_demo(folder: Path, voice: Voice, checkout: Path | None = None) -> Path:
    """Run all three parts, print what happens, and return the contact sheet.

    Args:
        folder: where everything is written.
        voice: where to speak.
        checkout: a checkout whose tests hold the judge; None: the one this code lies in, if it is one.
    """
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    nouns = {concept: _noun(lora) for concept, lora in SHIPPED.items()}
    summed = _picture("two shipped LoRAs, summed", tuple(SHIPPED), nouns, tuple(SHIPPED.values()))
    pair = replace(summed, title="the same, each in a box of its own", boxed=True)

    voice.note(f"1/3  {' and '.join(SHIPPED)}: never seen by the base model, known to two shipped LoRAs")
    first = folder / "first.png"
    _draw(pair, count=1).save(first)
    print(f"     {first}  ({time.monotonic() - start:.0f} s)")

    voice.note(f"2/3  teaching a {LIVE} from {PICTURES} pictures ({folder / LIVE})")
    taught, seconds = _teach(folder)
    print(f"     {taught}  ({seconds:.0f} s)")

    voice.note(f"3/3  {SEEDS} seeds of each, judged against every subject of the art (the judge needs a minute to get ready)")
    nouns[LIVE] = f"{TRIGGER} {_class_word(LIVE)}"
    partner = next(iter(SHIPPED))
    pictures = [
        _picture("the base alone", tuple(SHIPPED), nouns, ()),
        summed,
        pair,
        _picture("taught just now", (LIVE,), nouns, (str(taught),)),
        replace(
            _picture("taught just now, with a shipped LoRA", (LIVE, partner), nouns, (str(taught), SHIPPED[partner])),
            boxed=True,
        ),
    ]
    judge = find_judge(checkout)
    if judge is None:
        voice.note("     no verdicts: the judge is part of a checkout's tests (studio demo --checkout FOLDER)")
    sheet = _sheet(pictures, folder, judge)
    print(f"     {sheet}  (everything: {time.monotonic() - start:.0f} s)")
    print(OWN)
    return sheet


OWN = """
With a checkpoint and LoRAs of your own:
  studio train concept my-pictures/ --base CHECKPOINT --trigger zqx --class-word dog --out dog.safetensors
  studio lora check dog.safetensors --base CHECKPOINT
  studio generate "a photo of a zqx dog" --base CHECKPOINT --lora dog.safetensors:0.9 --lora your-style.safetensors:0.6"""


def find_judge(checkout: Path | None = None) -> Verdicts | None:
    """The judge of a checkout's tests, or None where there is none: it measures the product and is not part of it."""
    root = (checkout or HOME).resolve()
    if not (root / "tests" / "bench" / "judge.py").is_file():
        return None
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # in front, or another installed package called 'tests' would answer
    from studio.base import load_base

    bench = import_module("tests.bench.judge")
    judge = bench.Judge(roundtrip=bench.vae_roundtrip(load_base().vae))

    def verdicts(image: Image.Image, scene: Scene) -> dict[str, str]:
        return {verdict.wanted.concept: verdict.kind for verdict in judge.verdicts(image, scene).verdicts}

    return verdicts


def _noun(lora: str) -> str:
    """What a shipped LoRA's subject is called in a prompt: its trigger and class word."""
    from studio.lora.files import read_header
    from studio.lora.library import find_lora

    metadata = read_header(find_lora(lora)).metadata
    return f"{metadata['studio.trigger']} {metadata.get('studio.class_word', '')}".strip()


def _class_word(concept: str) -> str:
    from studio.art.atlas import concepts

    return concepts()[concept].class_word


def _picture(title: str, subjects: tuple[str, ...], nouns: Mapping[str, str], loras: tuple[str, ...]) -> Picture:
    from studio.art.atlas import STYLES
    from studio.art.backgrounds import PHRASES
    from studio.art.captions import compose_caption
    from studio.prompts import article

    places = ("center",) if len(subjects) == 1 else ("left", "right")
    placed = [(article(nouns[subject]), place) for subject, place in zip(subjects, places, strict=True)]
    prompt = compose_caption(placed, STYLES[STYLE][0], PHRASES[BACKGROUND], place_first=True)
    return Picture(title, subjects, prompt, loras)


def _draw(picture: Picture, count: int) -> Any:
    from pipelines import generate

    fields: dict[str, Any] = {}
    if picture.boxed:
        named = zip(picture.loras, BOXES, strict=True)
        fields = {"method": METHOD, "regions": [f"{short_name(str(lora))}@{box}" for lora, box in named]}
    return generate(picture.prompt, loras=picture.loras, seed=SEED, count=count, **fields)


def _teach(folder: Path) -> tuple[Path, float]:
    """Render the pictures of the live subject, train on them; the LoRA file and the seconds it took."""
    from studio.art.lessons import concept_lesson, write_lesson
    from training.concept import train_concept
    from training.config import make_config

    class_word = _class_word(LIVE)
    config = make_config(
        data=write_lesson(concept_lesson(LIVE, STYLE, f"{TRIGGER} {class_word}", PICTURES), folder / LIVE),
        output=folder / f"{LIVE}.safetensors",
        trigger=TRIGGER,
        class_word=class_word,
        checkpoint_every=0,
        restart=True,
    )
    result = train_concept(config)
    return result.path, result.seconds


def _sheet(pictures: list[Picture], folder: Path, judge: Verdicts | None) -> Path:
    from ui.sheet import contact_sheet

    path = folder / "contact-sheet.png"
    rows = []
    for index, picture in enumerate(pictures, 1):
        words = "-".join(re.findall(r"\w+", picture.title))
        rows.append(_row(picture, folder / "pictures" / f"row{index}-{words}.png", judge))
    contact_sheet("diffusion customization studio: subjects the base model never saw", rows).save(path)
    return path


def _row(picture: Picture, path: Path, judge: Verdicts | None) -> SheetRow:
    """One row: the true art, then one tile a seed; the pictures themselves are kept at ``path``, to be run again."""
    from PIL import Image

    from studio.art.scenes import render
    from ui.sheet import Label, SheetRow, Tile

    result = _draw(picture, SEEDS)
    result.save(path)
    scene = asked_scene(picture.subjects)
    tiles = [Tile(Image.fromarray(render(scene).image), (Label("the true art"),))]
    for image, seed in zip(result.images, result.seeds, strict=True):
        tiles.append(Tile(image, (Label(f"seed {seed}"), *_verdict_labels(judge(image, scene) if judge else {}))))
    return SheetRow(picture.title, picture.prompt, tuple(tiles))


def _verdict_labels(verdicts: Mapping[str, str]) -> tuple[Label, ...]:
    from ui.sheet import Label

    return tuple(Label(f"{name}: {word}", "good" if word == "present" else "bad") for name, word in verdicts.items())


def asked_scene(subjects: tuple[str, ...]) -> Scene:
    """What a prompt asks for, as the art itself would draw it: one subject in the centre, or two side by side."""
    from studio.art.scenes import SIDE, Placement, Scene

    centres = (0.5,) if len(subjects) == 1 else (0.25, 0.75)
    return Scene(tuple(Placement(s, STYLE, x * SIDE, SIDE / 2) for s, x in zip(subjects, centres, strict=True)), BACKGROUND)
