"""What a comparison has made, on disk: ``results.jsonl`` has a line for each picture, written and synced after the picture.

A run that is killed loses one picture at most. Of several lines of one key the last counts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from studio.errors import FileError

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
        self.folder, self.path = folder, folder / RESULTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise FileError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
        self._lock()
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self.file.truncate(len(whole))
        self.records = parse(whole)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # where the system cannot, nothing is locked
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise FileError(
                f"another 'studio bench' is at work in {self.folder}: wait for it, or give another --out"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # what could not be written has been said
            self.file.close()

    def get(self, key: str) -> Record | None:
        """The record of a picture that is there; a failed one is tried again."""
        found = self.records.get(key)
        return found if found is not None and found.file and (self.folder / found.file).is_file() else None

    def add(self, record: Record) -> None:
        """Note a picture, and make sure that it stays noted."""
        append(self.file, self.path, json.dumps(asdict(record)))
        self.records[record.key] = record


def append(file: TextIO, path: Path, line: str) -> None:
    """Write a line and sync it.

    Raises:
        FileError: it cannot be written.
    """
    try:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def parse(data: bytes) -> dict[str, Record]:
    """The last record of each key; lines that are none are left out."""
    found = {}
    for line in data.split(b"\n"):
        try:
            told = json.loads(line)
            record = Record(**{**told, "notes": tuple(told.get("notes", ()))})
        except (ValueError, TypeError, AttributeError):
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
