"""What a comparison has made, on disk: ``results.jsonl`` has a line for each picture, written and synced after the picture.

A run that is killed loses one picture at most. Of several lines of one key the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from studio.files import Lines, json_lines

RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture.

    Args:
        key: of everything it follows from: request, weights, place of computing.
        row, combination, index: what it is of. file: below the folder; "" where making it failed, with ``error``.
        seconds: of making it. forwards: rows through the UNet. likeness: by subject looked for, then by whose references.
        by: mark of the encoder and references that ``likeness`` is of.
    """

    key: str
    row: str
    combination: str
    index: int
    file: str
    seconds: float
    forwards: int
    request: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    likeness: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    by: str = ""
    error: str = ""


class Store:
    """The records of a folder by key; only one process at a time has it open.

    Raises:
        FileError: it cannot be written, or another process is at work there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        busy = f"another 'studio bench' is at work in {folder}: wait for it, or give another --out"
        self.lines = Lines(folder / RESULTS, busy)
        self.records = parse(self.lines.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lines.close()

    def get(self, key: str) -> Record | None:
        """The record of a picture that is there; a failed one is tried again."""
        found = self.records.get(key)
        return found if found is not None and found.file and (self.folder / found.file).is_file() else None

    def add(self, record: Record) -> None:
        """Note a picture, and make sure that it stays noted."""
        self.lines.add(asdict(record))
        self.records[record.key] = record


def parse(data: bytes) -> dict[str, Record]:
    """The last record of each key; lines that are none are left out."""
    found = {}
    for told in json_lines(data):
        try:
            record = Record(**{**told, "notes": tuple(told.get("notes", ()))})
        except (TypeError, AttributeError):
            continue
        if isinstance(record.key, str):
            found[record.key] = record
    return found


def timings(folder: Path) -> dict[str, list[float]]:
    """Seconds of the pictures that were made there before, by row; reads only."""
    file = folder / RESULTS
    found: dict[str, list[float]] = {}
    for record in parse(file.read_bytes() if file.is_file() else b"").values():
        if record.file:
            found.setdefault(record.row, []).append(record.seconds)
    return found


def picture_name(row: str, combination: str, index: int, key: str) -> str:
    """Where a picture lies below the folder: ``pictures/merge/cat-face+dog-face-1-3fa2b1c9.png``."""
    folder, name = (re.sub(r"[^\w.+=-]+", "-", text.replace(" + ", "+")).strip("-.")[:80] for text in (row, combination))
    return f"pictures/{folder}/{name}-{index + 1}-{key[:8]}.png"
