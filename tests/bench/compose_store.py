"""Results on disk: one JSONL line a picture, written after the picture itself, so that a killed run loses one at most."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from studio.files import whole
from tests.bench.compose_judge import Seen


@dataclass(frozen=True)
class Record:
    """One judged picture. ``seconds`` of its making, ``forwards`` see :func:`tests.bench.compose_rows.equivalents`."""

    key: str
    row: str
    case: str
    kind: str
    half: str
    count: int
    seed: int
    seconds: float
    forwards: float
    seen: tuple[Seen, ...]
    notes: tuple[str, ...] = ()

    def kinds(self, reading: str = "words") -> tuple[str, ...]:
        return tuple(getattr(one, reading) for one in self.seen)

    def present(self, reading: str = "words") -> float:
        """Share of the LoRAs that are present."""
        kinds = self.kinds(reading)
        return sum(kind == "present" for kind in kinds) / len(kinds)

    def passes(self, reading: str = "words") -> bool:
        """Whether every LoRA is present."""
        return self.present(reading) == 1


class Store:
    """Records of a folder, by key.

    Args:
        folder: holds ``results.jsonl`` and ``pictures/``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "results.jsonl"
        self.records: dict[str, Record] = {record.key: record for record in read(self.file)}

    def picture(self, key: str) -> Path:
        return self.folder / "pictures" / f"{key}.png"

    def open(self, key: str) -> Image.Image:
        with Image.open(self.picture(key)) as image:
            return image.convert("RGB")

    def add(self, record: Record, image: Image.Image) -> None:
        """Keep a picture, then its line."""
        path = self.picture(record.key)
        with whole(path) as fresh:
            image.save(fresh, format="PNG")
        torn = self.file.is_file() and self.file.stat().st_size > 0 and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a", encoding="utf-8") as out:
            out.write(("\n" if torn else "") + json.dumps(asdict(record)) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.records[record.key] = record

    def rewrite(self, records: Iterable[Record]) -> None:
        """Replace all lines at once."""
        self.records = {record.key: record for record in records}
        with whole(self.file) as fresh:
            fresh.write_text("".join(json.dumps(asdict(record)) + "\n" for record in self.records.values()), "utf-8")


def read(file: Path) -> list[Record]:
    """The records of a file; lines cut short by a kill are left out."""
    found = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            told: Mapping[str, Any] = json.loads(line)
        except ValueError:
            continue
        seen = tuple(Seen(**one) for one in told["seen"])
        found.append(Record(**{**told, "seen": seen, "notes": tuple(told.get("notes", ()))}))
    return found
