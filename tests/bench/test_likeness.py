"""The agreement of likeness and judge, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipelines.bench_store import Record
from studio.errors import RequestError
from tests.bench.likeness import auc, lines, pairs


def test_auc_counts_pairs() -> None:
    assert auc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auc([4, 3, 2, 1], [False, False, True, True]) == 0
    assert auc([1, 1, 2], [True, False, True]) == pytest.approx(0.75)
    assert math.isnan(auc([1, 2], [True, True]))


class Eye:
    """Finds whatever is asked for on the left."""

    def verdicts(self, picture: Any, wanted: Any) -> Any:
        kinds = ["present" if want.place == "left" else "vanished" for want in wanted]
        return SimpleNamespace(verdicts=[SimpleNamespace(kind=kind) for kind in kinds])


def put(folder: Path, row: str, likeness: dict[str, dict[str, float]]) -> None:
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    record = Record(
        key=row, row=row, combination="", index=0, file="x.png", seconds=0, forwards=0, request={}, likeness=likeness
    )
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(record)) + "\n")


def test_pairs_are_read_from_a_comparison(tmp_path: Path) -> None:
    both = {"cat-face": {"cat-face": 0.6, "dog-face": 0.1}, "dog-face": {"cat-face": 0.4, "dog-face": 0.2}}
    for row in ("merge", "floor"):
        put(tmp_path, row, both)
    put(tmp_path, "single", {"cat-face": both["cat-face"]})
    found = pairs(tmp_path, Eye())  # type: ignore[arg-type]
    assert [(pair.row, pair.own, pair.others, pair.present) for pair in found] == [
        ("merge", 0.6, 0.1, True), ("merge", 0.2, 0.4, False), ("floor", 0.6, 0.1, True), ("floor", 0.2, 0.4, False)
    ]  # fmt: skip
    assert lines(found)[1] == "methods only: AUC of own - others 1.00, of own 1.00 (n 2, 1 present)"
    put(tmp_path, "merge", {"mine": {"mine": 1, "cat-face": 0}, "cat-face": {"mine": 0, "cat-face": 1}})
    with pytest.raises(RequestError, match="does not know LoRA 'mine'"):
        pairs(tmp_path, Eye())  # type: ignore[arg-type]
