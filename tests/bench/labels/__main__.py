"""Does the judge see what a person sees? 240 generated pictures, labelled by eye and blind to the prompts.

    python -m tests.bench.labels --out outputs/labels           # agreement of the judge
    python -m tests.bench.labels --make assets/base             # draws the pictures anew (the labels are then void)

``sheet-1.webp`` to ``sheet-6.webp`` hold the pictures, 8 x 5 of 64 x 64 pixels each, in the order of ``seen.csv``: singles and
pairs of both tiers of the gate, shuffled, and labelled before anybody looked at the prompts. A label names the subjects from
left to right, each one of the 48 named concepts whatever its style, or ``unclear`` for something no name fits.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from studio.art.atlas import splits
from studio.errors import FileError
from tests.bench import gate, miniclip
from tests.bench.judge import Judge, Judgement, Wanted, decide, vae_roundtrip
from tests.bench.sheets import contact_sheet, save_sheet
from tests.bench.statistics import Rate, rate

HERE = Path(__file__).resolve().parent
COLUMNS, ROWS, SIDE = 8, 5, 64
SEED, EACH = 7, 120
QUALITY = 88
UNCLEAR = "unclear"
TAUS = (0.5, 0.6, 0.7, 0.8)
"""Other taus to show beside the one in use."""


@dataclass(frozen=True)
class Labelled:
    """A picture ``[64, 64, 3]`` uint8, what it was to show and what a person saw in it."""

    number: int
    pixels: np.ndarray
    asked: tuple[str, ...]
    seen: frozenset[str]
    unclear: int


def cases() -> list[gate.Case]:
    """The prompts of the labelled pictures, in their order: both tiers of the gate, shuffled."""
    both = gate.make_cases("a", EACH, SEED) + gate.make_cases("b", EACH, SEED)
    return [both[i] for i in np.random.default_rng(SEED).permutation(len(both))]


def read_labels(folder: Path = HERE) -> list[Labelled]:
    """The committed pictures with their labels.

    Raises:
        FileError: the table, the sheets and the prompts do not fit together, or a label is no named concept.
    """
    with (folder / "seen.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sheets = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("sheet-*.webp"))]
    pixels = np.concatenate([_cut(sheet) for sheet in sheets])
    asked = [tuple(item.concept for item in case.scene.items) for case in cases()]
    if not len(rows) == len(pixels) == len(asked):
        raise FileError(f"{folder} holds {len(rows)} labels and {len(pixels)} pictures for {len(asked)} prompts")
    out = []
    for row, picture, names in zip(rows, pixels, asked, strict=True):
        given = [name for name in (row["left"], row["right"]) if name]
        strange = set(given) - {*splits().named, UNCLEAR}
        if strange:
            raise FileError(f"{folder / 'seen.csv'}, picture {row['picture']}: '{strange.pop()}' is no named concept")
        seen = frozenset(name for name in given if name != UNCLEAR)
        out.append(Labelled(int(row["picture"]), picture, names, seen, given.count(UNCLEAR)))
    return out


def _cut(sheet: np.ndarray) -> np.ndarray:
    """A sheet into its pictures ``[n, 64, 64, 3]``, row by row."""
    rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    return sheet.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)


def write_sheets(pictures: Sequence[np.ndarray], folder: Path = HERE) -> None:
    """Keep pictures as webp sheets of :data:`COLUMNS` x :data:`ROWS`."""
    per = COLUMNS * ROWS
    for start in range(0, len(pictures), per):
        part = np.stack(pictures[start : start + per]).reshape(ROWS, COLUMNS, SIDE, SIDE, 3)
        sheet = Image.fromarray(part.transpose(0, 2, 1, 3, 4).reshape(ROWS * SIDE, COLUMNS * SIDE, 3))
        sheet.save(folder / f"sheet-{start // per + 1}.webp", quality=QUALITY, method=6, use_sharp_yuv=True)


def judged(judge: Judge, picture: Labelled) -> tuple[Judgement, frozenset[str]]:
    """What the judge finds, and which of the named concepts are present in any style and place."""
    wanted = [Wanted(name) for name in dict.fromkeys((*picture.asked, *sorted(picture.seen)))]
    judgement = judge.verdicts(picture.pixels, wanted)
    return judgement, present(judge, judgement, judge.tau)


def present(judge: Judge, judgement: Judgement, tau: float) -> frozenset[str]:
    """The named concepts of which some finding scores at least ``tau``."""
    findings = judgement.findings
    return frozenset(name for name in splits().named if decide(judge.bank, findings, [Wanted(name)], tau)[0].kind == "present")


def agreement(labels: Iterable[Labelled], found: Iterable[frozenset[str]]) -> tuple[Rate, Rate]:
    """Precision (of the subjects called present, how many a person saw) and recall (the other way round)."""
    precision, recall = [], []
    for label, names in zip(labels, found, strict=True):
        precision += [name in label.seen for name in names]
        recall += [name in names for name in label.seen]
    return rate(precision), rate(recall)


class SecondLook:
    """MiniCLIP naming the subjects of a picture: the captions nearest to it, of all that name one or two of the 48 concepts."""

    @torch.no_grad()
    def __init__(self, model: miniclip.MiniClip) -> None:
        names = splits().named
        self.model = model
        self.choices: dict[int, list[tuple[str, ...]]] = {
            1: [(name,) for name in names],
            2: [(a, b) for a in names for b in names if a != b],
        }
        ones = model.text([f"a {name}" for name in names])
        twos = model.text([f"a {a} on the left and a {b} on the right" for a, b in self.choices[2]])
        self.features = {1: ones, 2: twos}

    @torch.no_grad()
    def names(self, picture: np.ndarray, count: int) -> tuple[str, ...]:
        """The ``count`` (1 or 2) subjects of ``picture [64, 64, 3]`` uint8, left before right."""
        image = self.model.image(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255)[0]
        return self.choices[count][int((self.features[count] @ image).argmax())]


def report(judge: Judge, labels: Sequence[Labelled], second: SecondLook | None, out: Path) -> list[str]:
    """The lines to print; ``out`` gets the disagreements as sheets. Without ``second`` MiniCLIP is not asked."""
    looked = [judged(judge, label) for label in labels]
    found = [names for _, names in looked]
    lines = []
    for tau in sorted({judge.tau, *TAUS}):
        at = found if tau == judge.tau else [present(judge, judgement, tau) for judgement, _ in looked]
        precision, recall = agreement(labels, at)
        mark = "  <- in use" if tau == judge.tau else ""
        lines.append(f"tau {tau:.2f}: present is right {precision} | seen is found {recall}{mark}")
    exact = rate([label.seen == names for label, names in zip(labels, found, strict=True)])
    lines.append(f"whole pictures, the same subjects: {exact}")
    _sheet(out / "judge.png", labels, [label.seen for label in labels], found, "by eye | judge")
    if second is None:
        return lines
    for title, others in (("judge", found), ("eye", [label.seen for label in labels])):
        picked = [
            frozenset(second.names(label.pixels, len(names)) if 0 < len(names) <= 2 else ())
            for label, names in zip(labels, others, strict=True)
        ]
        named = rate([name in also for names, also in zip(others, picked, strict=True) if also for name in names])
        lines.append(f"MiniCLIP names the subjects the {title} names: {named}")
        _sheet(out / f"miniclip-{title}.png", labels, others, picked, f"{title} | MiniCLIP")
    return lines


def _sheet(
    path: Path, labels: Sequence[Labelled], one: Sequence[frozenset[str]], other: Sequence[frozenset[str]], title: str
) -> None:
    """The pictures on which two differ."""
    apart = [i for i in range(len(labels)) if one[i] != other[i]]
    if apart:
        lines = [[f"{labels[i].number}: {', '.join(sorted(one[i])) or '-'}", ", ".join(sorted(other[i])) or "-"] for i in apart]
        save_sheet(contact_sheet([labels[i].pixels for i in apart], lines, title=title, enlarge=2), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--make", type=Path, help="draw the pictures with this base, write the sheets and stop")
    parser.add_argument("--vae", type=Path, default=Path("assets/base/vae"), help="VAE of the judge's templates")
    parser.add_argument("--miniclip", type=Path, help="MiniCLIP weights for a second look (python -m tests.bench.miniclip)")
    parser.add_argument("--out", type=Path, default=Path("outputs/labels"), help="folder for the sheets of disagreements")
    given = parser.parse_args()
    if given.make:
        generator, _ = gate.stock_generator(given.make, steps=20, guidance=6.0)
        pictures = gate.generate_all(generator, cases(), 16, print)
        write_sheets([np.asarray(picture) for picture in pictures])
        return
    from diffusers import AutoencoderKL

    judge = Judge(roundtrip=vae_roundtrip(AutoencoderKL.from_pretrained(given.vae, local_files_only=True).eval()))
    second = SecondLook(miniclip.load(given.miniclip)) if given.miniclip else None
    print("\n".join(report(judge, read_labels(), second, given.out)))


if __name__ == "__main__":
    main()
