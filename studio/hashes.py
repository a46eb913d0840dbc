"""Hashes by which weights are known whatever their file is called: ours, and the short ones other programs write.

SHA-256 of large files is remembered by path, size and time of change, so that a checkpoint is read through only once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from studio.errors import FileError
from studio.files import whole

MODEL_DIGITS = 10
"""A1111's ``Model hash``: so many first digits of the file's SHA-256."""
LORA_DIGITS = 12
"""A1111's ``Lora hashes``: so many first digits of :func:`auto_v3`'s SHA-256."""


def cache_folder() -> Path:
    """Where this product remembers things it can always compute again."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "diffusion-customization-studio"


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, in order.

    Raises:
        FileError: a file cannot be read.
    """
    memory_file = cache_folder() / "hashes.json"
    memory = _remembered(memory_file)
    known = len(memory)
    found = []
    for path in paths:
        try:
            stat = path.stat()
            key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
            if key not in memory:
                with path.open("rb") as stream:
                    memory[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}") from error
        found.append(memory[key])
    if len(memory) > known:
        _write_quietly(memory_file, json.dumps(memory))
    return found


def auto_v3(path: Path) -> str:
    """How other programs know a LoRA: the first 12 digits of SHA-256 over a safetensors file without its header."""
    try:
        with path.open("rb") as stream:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
            return hashlib.file_digest(stream, "sha256").hexdigest()[:LORA_DIGITS]
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def _remembered(path: Path) -> dict[str, str]:
    try:
        memory = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _write_quietly(path: Path, text: str) -> None:
    """Write a cache file; a read-only home only costs time."""
    with suppress(FileError), whole(path) as fresh:
        fresh.write_text(text, "utf-8")
