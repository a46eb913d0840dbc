"""How far the likeness of ``studio bench`` agrees with the judge, on the embedded base, where the judge knows the truth.

    studio bench -l cat-face -l dog-face -l pizza -l unicorn --methods merge,masked,regional --prefix "a 3d render, "
    python -m tests.bench.likeness --bench outputs/bench

For every subject of every picture of several subjects: *present* (the judge's word, anywhere in its half) or not, against
``own`` and ``own - others``. The area under the curve is the chance that a present subject has more than one that is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.bench_plan import FLOOR, PLACES, REFERENCE, SINGLE
from pipelines.bench_store import RESULTS, parse
from studio.base import load_base
from studio.errors import RequestError
from studio.media import open_picture
from tests.bench.combinations import LORAS
from tests.bench.judge import Judge, Wanted, vae_roundtrip
from tests.bench.templates import default_cache


@dataclass(frozen=True)
class Pair:
    """One subject in one picture: what the likeness says and what the judge does."""

    row: str
    own: float
    others: float
    present: bool


def auc(values: Sequence[float], truth: Sequence[bool]) -> float:
    """The chance that a true case has the larger value, equal ones counted half; nan where one kind is missing."""
    told, right = np.asarray(values, float), np.asarray(truth, bool)
    if right.all() or not right.any():
        return float("nan")
    gaps = told[right][:, None] - told[~right][None]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def pairs(folder: Path, judge: Judge) -> list[Pair]:
    """All subjects of all pictures of several subjects in the folder of a comparison.

    Raises:
        RequestError: a LoRA whose subject the judge does not know.
    """
    found = []
    for record in parse((folder / RESULTS).read_bytes()).values():
        if not record.file or record.row in (REFERENCE, SINGLE):
            continue
        names = list(record.likeness)
        unknown = [name for name in names if name not in LORAS]
        if unknown:
            raise RequestError(f"the judge does not know LoRA '{unknown[0]}': compare those of assets/loras or of the testbed")
        places = [place.split()[-1] for place in PLACES[len(names)]]
        wanted = [
            Wanted(LORAS[name].content, None, place=None if place == "middle" else place)
            for name, place in zip(names, places, strict=True)
        ]
        verdicts = judge.verdicts(open_picture(folder / record.file), wanted).verdicts
        for name, verdict in zip(names, verdicts, strict=True):
            similar = record.likeness[name]
            others = max(similar[other] for other in names if other != name)
            found.append(Pair(record.row, similar[name], others, verdict.kind == "present"))
    return found


def lines(found: Sequence[Pair]) -> list[str]:
    """The numbers, with the floor and without it, where no subject can be there."""
    told = []
    for title, some in (("all rows", found), ("methods only", [pair for pair in found if pair.row != FLOOR])):
        truth = [pair.present for pair in some]
        margin = auc([pair.own - pair.others for pair in some], truth)
        own = auc([pair.own for pair in some], truth)
        told.append(f"{title}: AUC of own - others {margin:.2f}, of own {own:.2f} (n {len(some)}, {sum(truth)} present)")
    for row in dict.fromkeys(pair.row for pair in found):
        some = [pair for pair in found if pair.row == row]
        told.append(f"  {row}: {sum(pair.present for pair in some)} of {len(some)} present")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bench", type=Path, default=Path("outputs/bench"), help="folder of a comparison")
    given = parser.parse_args()
    judge = Judge(roundtrip=vae_roundtrip(load_base().vae), cache=default_cache())
    print("\n".join(lines(pairs(given.bench, judge))))


if __name__ == "__main__":
    main()
