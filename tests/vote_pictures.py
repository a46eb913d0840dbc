"""Pictures of this studio as small as can be, for tests of blind votes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.pairs import Pair
from pipelines.votes import Side, Vote
from studio.media import save_png
from studio.requests import GenerateRequest

SHA = {"cat": "c" * 64, "dog": "d" * 64}


def paint(path: Path, method: str = "merge", seed: int = 1, loras: tuple[str, ...] = ("cat", "dog:0.5"), **fields: Any) -> Path:
    """A PNG with a request. Its LoRAs are known by what their names begin with."""
    request = GenerateRequest.of(
        **{"prompt": "a cat and a dog", "method": method, "seed": seed, "loras": loras, "size": (8, 6), "steps": 5, **fields}
    )
    known = [{"name": ref.name, "sha256": SHA[ref.name[:3]]} for ref in request.loras]
    record = {"request": request.model_dump(mode="json"), "base": {"sha256": "b" * 64}, "loras": known}
    shade = sum(map(ord, f"{path.name}{seed}{method}")) % 256
    save_png(path, Image.new("RGB", (8, 6), (shade, 10, 10)), record, f"a picture by {method}")
    return path


def duels(folder: Path, methods: tuple[str, ...] = ("merge", "switch"), seeds: int = 2) -> Path:
    """A folder with a picture of every method for every seed."""
    for seed in range(seeds):
        for method in methods:
            paint(folder / f"seed{seed}" / f"{method}.png", method, seed)
    return folder


def vote_on(pair: Pair, side: Side, voter: str = "ada") -> Vote:
    left, right = pair.pictures
    winner = {"left": pair.labels[0], "right": pair.labels[1], "equal": None}[side]
    return Vote.of(
        time="2026-01-01T00:00:00+00:00", voter=voter, question="which?", shuffle=1, left=left.sha256, right=right.sha256,
        left_label=pair.labels[0], right_label=pair.labels[1], side=side, winner=winner,
    )  # fmt: skip
