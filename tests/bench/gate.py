"""Gate measurement of a base model: what share of its pictures show what was asked.

    python -m tests.bench.gate --base assets/base --tier a --n 300 --seed 1 --out outputs/gate

Half of the cases are single subjects, half pairs; concept, style, background and place are drawn from the tier at random.
Writes ``gate.json``, ``sheet.png`` (the first cases, unselected) and ``failures.png`` (the worst); with ``--report PAGE``
also the table and both sheets into the page's own section of that gate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from studio.art.atlas import STYLES, splits
from studio.art.backgrounds import BASE
from studio.art.captions import caption
from studio.art.scenes import Scene, sample_scene
from studio.base import base_sha256
from studio.errors import FileError
from tests.bench.judge import TAU, Judge, Judgement, Wanted, vae_roundtrip, wanted_of
from tests.bench.page import replace_section
from tests.bench.sheets import contact_sheet, save_sheet
from tests.bench.statistics import Rate, rate, rate_table

BARS = {
    "a": {"singles: all present, right style and place": 80, "pairs: all present, right style and place": 40},
    "b": {
        "singles: all present, right style and place": 90,
        "singles: right style, given the concept": 90,
        "singles: right background": 95,
        "pairs: all present, right style and place": 70,
    },
}
"""Per cent of each gate."""
Generator = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
"""Prompts and seeds to pictures."""


@dataclass(frozen=True)
class Case:
    """One prompt of the gate; ``scene`` is what it asks for."""

    scene: Scene
    prompt: str
    seed: int

    @property
    def single(self) -> bool:
        return len(self.scene.items) == 1


@dataclass(frozen=True)
class Outcome:
    """What one picture showed: all subjects present in style and place; subjects present in any style; right background."""

    present: bool
    concept: bool
    style: bool
    background: bool
    kinds: tuple[str, ...]
    why: tuple[str, ...]
    score: float


def make_cases(tier: str, n: int, seed: int) -> list[Case]:
    """``n`` cases, singles and pairs in turn, in plain captions. Tier ``a``: the first 24 concepts; ``b``: all 48."""
    names = splits().named_a if tier == "a" else splits().named
    rng = np.random.default_rng([seed, len(names)])
    cases = []
    for i in range(n):
        picked = [str(x) for x in rng.choice(names, 1 + i % 2, replace=False)]
        scene = sample_scene(rng, picked, BASE, tuple(STYLES))
        cases.append(Case(scene, caption(scene), int(rng.integers(2**31))))
    return cases


def outcome(judge: Judge, case: Case, picture: Image.Image) -> Outcome:
    """Judge one picture."""
    judgement = judge.verdicts(picture, case.scene)
    unstyled = [Wanted(want.concept, None, None, want.place) for want in wanted_of(case.scene)]
    loose = judge.again(judgement, unstyled)
    concept = not loose.fails
    return Outcome(
        present=not judgement.fails,
        concept=concept,
        style=concept and not judgement.fails,
        background=judgement.paper.name == case.scene.background,
        kinds=judgement.kinds,
        why=tuple(verdict.why for verdict in judgement.verdicts),
        score=min((_score(judgement, i) for i in range(len(judgement.kinds))), default=0.0),
    )


def _score(judgement: Judgement, i: int) -> float:
    """Score of a present subject; a missing one counts minus the score of what stands in its place."""
    verdict = judgement.verdicts[i]
    score = verdict.finding.score if verdict.finding else 0.0
    return score if verdict.kind == "present" else -score


def summary(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> dict[str, Rate]:
    """The rates of the gate. Styles are counted among pictures whose subjects are there in some style."""
    singles = [o for c, o in zip(cases, outcomes, strict=True) if c.single]
    pairs = [o for c, o in zip(cases, outcomes, strict=True) if not c.single]
    out = {}
    for name, group in (("singles", singles), ("pairs", pairs)):
        out[f"{name}: all present, right style and place"] = rate([o.present for o in group])
        out[f"{name}: concept and place, any style"] = rate([o.concept for o in group])
        out[f"{name}: right style, given the concept"] = rate([o.style for o in group if o.concept])
        out[f"{name}: right background"] = rate([o.background for o in group])
    kinds = [kind for o in pairs for kind in o.kinds]
    for kind in ("present", "confused", "vanished", "other"):
        out[f"pairs, per subject: {kind}"] = rate([k == kind for k in kinds])
    return out


def generate_all(generator: Generator, cases: Sequence[Case], batch: int, say: Callable[[str], None]) -> list[Image.Image]:
    """Pictures of all cases in batches."""
    pictures: list[Image.Image] = []
    start = time.perf_counter()
    for at in range(0, len(cases), batch):
        part = cases[at : at + batch]
        pictures += generator([case.prompt for case in part], [case.seed for case in part])
        say(f"{len(pictures)}/{len(cases)} pictures, {time.perf_counter() - start:.0f} s")
    return pictures


def stock_generator(folder: Path, steps: int, guidance: float) -> tuple[Generator, Callable[[torch.Tensor], torch.Tensor]]:
    """The stock diffusers pipeline on ``folder`` (on the GPU when there is one), and its VAE there and back on the CPU.

    Raises:
        FileError: ``folder`` holds no diffusers pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise FileError(f"{folder} holds no model_index.json: give the folder of a diffusers pipeline with --base")
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    roundtrip = vae_roundtrip(pipe.vae)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = pipe.unet.config.sample_size

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        pipe.to(device)
        shape = (1, pipe.unet.config.in_channels, side, side)
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
        images = pipe(list(prompts), num_inference_steps=steps, guidance_scale=guidance, latents=noise).images
        pipe.vae.to("cpu")
        return list(images)

    return generate, roundtrip


def measure(
    generator: Generator, judge: Judge, cases: Sequence[Case], out: Path, batch: int = 16, say: Callable[[str], None] = print
) -> dict[str, Rate]:
    """Generate, judge, write sheets and JSON to ``out``, and return the rates."""
    pictures = generate_all(generator, cases, batch, say)
    start = time.perf_counter()
    outcomes = [outcome(judge, case, picture) for case, picture in zip(cases, pictures, strict=True)]
    say(f"judged in {time.perf_counter() - start:.0f} s")
    rates = summary(cases, outcomes)
    _sheet(cases, outcomes, pictures, range(min(32, len(cases))), out / "sheet.png", "the first cases, unselected")
    worst = sorted((i for i in range(len(cases)) if not outcomes[i].present), key=lambda i: outcomes[i].score)[:8]
    if worst:
        _sheet(cases, outcomes, pictures, worst, out / "failures.png", "the worst failures")
    report = {
        "tau": judge.tau,
        "rates": {name: {"hits": r.hits, "n": r.n, "low": r.low, "high": r.high} for name, r in rates.items()},
        "cases": [
            {"prompt": c.prompt, "seed": c.seed, "kinds": o.kinds, "why": o.why, "background": o.background, "score": o.score}
            for c, o in zip(cases, outcomes, strict=True)
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "gate.json").write_text(json.dumps(report, indent=1), "utf-8")
    return rates


def write_report(page: Path, given: argparse.Namespace, rates: dict[str, Rate]) -> None:
    """Put the rates beside their bars, and both sheets, into the section of this gate on ``page``."""
    tier = given.tier
    command = f"--base {given.base} --tier {tier} --n {given.n} --seed {given.seed} --out DIR --report {page}"
    lines = [
        f"## The base model: gate {tier.upper()}",
        "",
        f"    python -m tests.bench.gate {command}",
        "",
        f"Base `{base_sha256(given.base)[:12]}`, {24 if tier == 'a' else 48} named subjects x 3 art styles x {len(BASE)} "
        f"backgrounds, drawn at random; {given.steps} steps, guidance {given.guidance:g}; half singles, half pairs.",
        "",
        *rate_table(rates, BARS[tier]),
    ]
    pictures = page.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines.append("")
    for name, title in (("sheet", "the first cases, unselected"), ("failures", "the worst failures")):
        if (given.out / f"{name}.png").is_file():
            file = pictures / f"gate-{tier}{'-failures' if name == 'failures' else ''}.webp"
            with Image.open(given.out / f"{name}.png") as sheet:
                sheet.save(file, quality=85, method=6)
            lines.append(f"![{title}](pictures/{file.name})")
    replace_section(page, "\n".join(lines), f"gate {tier}")


def _sheet(
    cases: Sequence[Case],
    outcomes: Sequence[Outcome],
    pictures: Sequence[Image.Image],
    picked: Sequence[int],
    path: Path,
    title: str,
) -> None:
    labels = []
    for i in picked:
        shown = [f"{kind}: {why}" for kind, why in zip(outcomes[i].kinds, outcomes[i].why, strict=True)]
        labels.append([*_wrapped(cases[i].prompt), *shown, "" if outcomes[i].background else "wrong background"])
    bad = [not outcomes[i].present for i in picked]
    save_sheet(contact_sheet([pictures[i] for i in picked], labels, title=title, bad=bad), path)


def _wrapped(prompt: str, width: int = 38) -> list[str]:
    """A prompt in up to three lines."""
    lines = [""]
    for word in prompt.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="diffusers pipeline folder")
    parser.add_argument("--tier", choices=("a", "b"), default="a")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tau", type=float, default=TAU)
    parser.add_argument("--cache", type=Path, help="folder for templates that went through the VAE (default: the user's cache)")
    parser.add_argument("--report", type=Path, help="a page, such as docs/results.md: its section of this gate is written anew")
    parser.add_argument("--no-vae-templates", action="store_true", help="templates as drawn, not through the VAE")
    given = parser.parse_args()
    generator, roundtrip = stock_generator(given.base, given.steps, given.guidance)
    judge = Judge(roundtrip=None if given.no_vae_templates else roundtrip, cache=given.cache, tau=given.tau)
    rates = measure(generator, judge, make_cases(given.tier, given.n, given.seed), given.out, given.batch)
    for name, value in rates.items():
        print(f"{name:48s} {value}")
    if given.report:
        write_report(given.report, given, rates)


if __name__ == "__main__":
    main()
