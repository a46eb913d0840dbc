"""Writing files so that a reader, a full disk or a kill never meets half of one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from studio.errors import FileError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write into. When the block ends it is synced and takes the place of ``path``; when the block
    fails it is removed, and what was at ``path`` stays. Folders are made where they are missing.

    Raises:
        FileError: the file cannot be written, in the block or after it.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        with fresh.open("rb+") as stream:  # some systems sync only what could be written
            os.fsync(stream.fileno())
        fresh.replace(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


class Lines:
    """A file of JSON lines that one process at a time has open; a line that a crash cut short is taken away.

    Args:
        path: its folders are made where they are missing. busy: what to say when another process has it open.

    Attributes:
        data: the whole lines that were there, see :func:`json_lines`.

    Raises:
        FileError: it cannot be written, or another process has it open.
    """

    def __init__(self, path: Path, busy: str) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise FileError(f"cannot write to the folder {path.parent}: {error.strerror or error}") from error
        self._lock(busy)
        there = path.read_bytes()
        self.data = there[: there.rfind(b"\n") + 1]
        if self.data != there:
            self._file.truncate(len(self.data))

    def _lock(self, busy: str) -> None:
        """Keep other processes out until the file is closed, however this one ends; where the system cannot, nobody."""
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            taken = isinstance(error, BlockingIOError)
            raise FileError(busy if taken else f"cannot lock {self.path}: {error.strerror or error}") from error

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line and sync it.

        Raises:
            FileError: it cannot be written.
        """
        try:
            self._file.write(json.dumps(entry, default=str).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Let other processes in."""
        with suppress(OSError):  # what could not be written has been said
            self._file.close()


def json_lines(data: bytes) -> Iterator[Any]:
    """What the lines of a file hold; those that are no JSON are left out."""
    for line in data.split(b"\n"):
        with suppress(ValueError):
            yield json.loads(line)
