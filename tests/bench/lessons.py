"""How well single LoRAs learn what they are taught, and what they make the base forget.

    python -m tests.bench.lessons train --out outputs/lessons --jobs 2              # 12 held-out subjects and 4 held-out looks
    python -m tests.bench.lessons measure --out outputs/lessons --report docs/results.md
    python -m tests.bench.lessons measure --shipped --report docs/results.md        # the files in assets/loras

Every LoRA is trained with the trainer's own defaults on eight pictures; ``--prior none`` trains the subjects without what
holds them to the base, ``--prior consistency`` the looks with it, for comparison, and ``--alone`` trains on pictures of the
subjects by themselves. Prompts, places, backgrounds, seeds and the things beside a subject are none of the lessons'.

* A subject: 20 prompts of it alone (present, right background), 10 beside a thing the base knows, 10 among two (all present).
* A look: 5 known subjects that were not in its lesson x 8 prompts (look there; subject there, in whatever look).
* Forgetting: 10 prompts of named subjects without the trigger, with the LoRA on, paired with the base alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from studio.art.atlas import STYLES, splits
from studio.art.backgrounds import BASE
from studio.art.captions import caption
from studio.art.lessons import concept_lesson, look_lesson
from studio.art.looks import brings_background
from studio.art.scenes import Scene, sample_scene
from tests.bench.combinations import LORAS, STYLE, Taught
from tests.bench.compose_judge import look_verdict
from tests.bench.compose_loras import PICTURES, check, teach_all, teach_one
from tests.bench.judge import Judge, Wanted, vae_roundtrip
from tests.bench.page import replace_section
from tests.bench.statistics import Rate, rate, rate_table
from tests.bench.templates import build_bank, default_cache, make_keys

ALONE, BESIDE, AMONG, KEPT = 20, 10, 10, 10
"""Prompts a subject: of it alone, beside one and among two known things, and of known ones without it."""
TOGETHER = {"beside": "present beside a known one", "among": "present among two known ones"}
HOSTS, EACH = 5, 8
"""Known subjects a look is asked for, and prompts of each."""
SYLLABLES = ("vo", "ra", "mi", "ku", "ze", "lo", "pi", "du", "sa", "ge", "ti", "no")
LOOKS = ("blueprint", "neon", "pixel", "pastel")
BARS = {"subject present": 85, "background right": 80, "look there": 80, "subject there": 80}
"""Per cent."""


def heldout(count: int = 12) -> tuple[Taught, ...]:
    """Held-out subjects, drawn by seed among those that neither the testbed nor the examples teach, and four looks."""
    used = {taught.content for taught in LORAS.values()}
    free = [name for name in splits().heldout["concept"] if name not in used]
    picked = np.random.default_rng(81).choice(free, count, replace=False)
    subjects = (
        Taught(str(name).replace(" ", "-"), "subject", str(name), f"{SYLLABLES[i]}{SYLLABLES[-1 - i]}x")
        for i, name in enumerate(picked)
    )
    return (*subjects, *(LORAS[look] for look in LOOKS))


def shipped() -> tuple[Taught, ...]:
    """The LoRAs in ``assets/loras``."""
    from training.base.loras import examples

    return tuple(LORAS[example.name] for example in examples())


PRIORS = {"subject": "consistency", "look": "none"}
"""The trainer's own choice on the embedded base."""


@dataclass(frozen=True)
class Question:
    """One picture to make: ``kind`` alone, beside, among, look or kept; ``scene`` is what ``prompt`` asks for."""

    kind: str
    prompt: str
    scene: Scene
    seed: int


def questions(taught: Taught) -> Iterator[Question]:
    """All questions put to one LoRA."""
    rng = np.random.default_rng([82, *taught.name.encode()])
    known = splits().named_a
    if taught.role == "look":
        learnt = {item.concept for scene, _ in look_lesson(taught.content, taught.phrase, PICTURES) for item in scene.items}
        for host in rng.choice([name for name in known if name not in learnt], HOSTS, replace=False):
            for _ in range(EACH):
                scene = sample_scene(rng, [str(host)], BASE, look=taught.content)
                text = caption(scene, style_phrase=taught.phrase)
                if brings_background(taught.content):
                    text = text.rsplit(",", 1)[0]
                yield Question("look", text, scene, int(rng.integers(2**31)))
    else:
        for others, (kind, count) in enumerate((("alone", ALONE), ("beside", BESIDE), ("among", AMONG))):
            for index in range(count):
                names = [str(name) for name in rng.choice(known, others, replace=False)]
                names.insert(index % (others + 1), taught.content)
                scene = sample_scene(rng, names, BASE, [STYLE])
                yield Question(kind, caption(scene, rng, {taught.content: taught.phrase}), scene, int(rng.integers(2**31)))
    for _ in range(KEPT):
        scene = sample_scene(rng, [str(rng.choice(known))], BASE, [STYLE])
        yield Question("kept", caption(scene, rng), scene, int(rng.integers(2**31)))


Draw = Callable[[str, int, str | None], Image.Image]
"""Prompt, seed and LoRA file (None: the base alone) to a picture."""


def answers(judge: Judge, draw: Draw, taught: Taught, file: str) -> dict[str, list[bool]]:
    """What the pictures of all questions show: per measure one outcome a picture (or a subject)."""
    out: dict[str, list[bool]] = {}

    def note(measure: str, outcome: bool) -> None:
        out.setdefault(measure, []).append(outcome)

    for question in questions(taught):
        picture = draw(question.prompt, question.seed, file)
        if question.kind == "look":
            wanted = [Wanted(item.concept, None, taught.content) for item in question.scene.items]
            judged = judge.verdicts(picture, wanted)
            plain = judge.again(judged, [Wanted(want.concept) for want in wanted])
            things = [a if a.kind == "present" else b for a, b in zip(judged.verdicts, plain.verdicts, strict=True)]
            note("look there", look_verdict(judged, things, taught.content, judge.tau)[0] == "present")
            note("subject there", all(thing.kind == "present" for thing in things))
            continue
        judged = judge.verdicts(picture, question.scene)
        if question.kind == "kept":
            alone = judge.verdicts(draw(question.prompt, question.seed, None), question.scene)
            note("known subject kept", not judged.fails)
            note("known subject, base alone", not alone.fails)
        elif question.kind in TOGETHER:
            note(TOGETHER[question.kind], not judged.fails)
        else:
            note("subject present", not judged.fails)
            note("background right", judged.paper.name == question.scene.background)
    return out


def table(found: dict[str, dict[str, list[bool]]]) -> list[str]:
    """Markdown: all LoRAs together with intervals, then each by itself."""
    measures = list(dict.fromkeys(measure for one in found.values() for measure in one))
    together = {m: rate([outcome for one in found.values() for outcome in one.get(m, ())]) for m in measures}
    lines = rate_table(together, BARS)
    lines += ["", f"| LoRA | {' | '.join(measures)} |", f"|---|{'---|' * len(measures)}"]
    for name, one in found.items():
        cells = [_cell(rate(one[measure])) if measure in one else "" for measure in measures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: Rate) -> str:
    return f"{value.hits}/{value.n}"


def teach(name: str, folder: str, base: str, steps: int, prior: str | None = None, alone: bool = False) -> float:
    """Train one held-out LoRA with the trainer's defaults; seconds."""
    taught = next(taught for taught in heldout() if taught.name == name)
    chosen = {key: value for key, value in {"steps": steps or None, "prior": prior}.items() if value is not None}
    lesson = None
    if taught.role == "subject":
        lesson = concept_lesson(taught.content, STYLE, taught.phrase, PICTURES, beside=not alone)
    return teach_one(taught, Path(folder), base, lesson, **chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("do", choices=("train", "measure"))
    parser.add_argument("--out", type=Path, default=Path("outputs/lessons"), help="folder of the LoRAs")
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--shipped", action="store_true", help="measure the files in assets/loras")
    parser.add_argument("--prior", choices=("none", "consistency"), help="only those that do otherwise by default, this way")
    parser.add_argument("--alone", action="store_true", help="train subjects on pictures of themselves alone")
    parser.add_argument("--only", nargs="*", help="some of the LoRAs, by name")
    parser.add_argument("--steps", type=int, default=0, help="0: the trainer's default")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", type=Path, help="a page whose section is written anew")
    given = parser.parse_args()
    from studio.base import load_base
    from studio.paths import assets

    base = load_base(given.base)
    folder = assets() / "loras" if given.shipped else given.out
    every = shipped() if given.shipped else heldout()
    pupils = [t for t in every if (not given.only or t.name in given.only) and PRIORS.get(t.role, "") != given.prior]
    if not pupils:
        parser.error("--only and --prior leave no LoRA")
    names = [taught.name for taught in pupils]
    if given.do == "train":
        lesson = partial(teach, prior=given.prior, alone=given.alone)
        teach_all(given.out, given.base, base.sha256, names, given.jobs, given.steps, teach=lesson)
        return
    train = "training.base loras --out" if given.shipped else "tests.bench.lessons train --out"
    check(folder, base.sha256, names, train)
    # A look is taught in all art styles at once and may come back in any.
    looks = tuple(taught.content for taught in pupils if taught.role == "look")
    keys = make_keys(None) + make_keys(splits().named, tuple(STYLES), looks)
    judge = Judge(bank=build_bank(keys, vae_roundtrip(base.vae), cache=default_cache()))
    found = {}
    for taught in pupils:
        found[taught.name] = answers(judge, drawer(given.base), taught, str(folder / f"{taught.name}.safetensors"))
        print(f"{taught.name}: " + ", ".join(f"{m} {_cell(rate(o))}" for m, o in found[taught.name].items()), flush=True)
    lines = table(found)
    print("\n".join(lines))
    if given.report:
        title, mark, options, how = section_of(given)
        head = [f"## {title}", "", f"    python -m tests.bench.lessons measure {options} --report {given.report}", ""]
        head += [f"Base `{base.sha256[:12]}`; eight pictures each, {how}; 20 steps, weight 1.", ""]
        replace_section(given.report, "\n".join(head + lines), mark)


def section_of(given: argparse.Namespace) -> tuple[str, str, str, str]:
    """Of a section of a page: its title, its mark, the options that make it, and how its LoRAs were trained."""
    if given.shipped:
        return "Shipped LoRAs, one at a time", "shipped lessons", "--shipped", "as they were trained to be shipped"
    out, how = f"--out {given.out}", "the trainer's defaults"
    if given.prior:
        title, how = f"Held-out LoRAs with the other prior: {given.prior}", f"{how}, but for the prior"
        return title, f"lessons, prior {given.prior}", f"{out} --prior {given.prior}", how
    how += " (prior: consistency for subjects, none for looks)"
    return "LoRAs of held-out subjects and looks, one at a time", "lessons", out, how


def drawer(base: str) -> Draw:
    """Pictures by the product's own ``generate``; those of the base alone are made once."""
    from pipelines import generate

    kept: dict[tuple[str, int], Image.Image] = {}

    def draw(prompt: str, seed: int, lora: str | None) -> Image.Image:
        if lora is None and (prompt, seed) in kept:
            return kept[prompt, seed]
        # As written: a trigger added to a prompt that is not about the LoRA would draw its subject into it.
        told: dict[str, Any] = {"base": base, "seed": seed, "loras": [] if lora is None else [lora], "triggers": "keep"}
        picture: Image.Image = generate(prompt, **told).images[0]
        if lora is None:
            kept[prompt, seed] = picture
        return picture

    return draw


if __name__ == "__main__":
    main()
