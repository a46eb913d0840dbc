"""Writing files so that a reader, a full disk or a kill never meets half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
