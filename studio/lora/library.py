"""Where LoRA files lie and how a name becomes a path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from studio.errors import FileError, RequestError, UnknownNameError
from studio.paths import assets

SUFFIX = ".safetensors"
PATH_VARIABLE = "STUDIO_LORA_PATH"
# Listed too, so that a pickle found by name is refused with its reason instead of "unknown".
PICKLES = (".pt", ".ckpt", ".pth", ".bin")
_MAX_FILES = 20_000
# What PEFT and diffusers call the file when they save an adapter as a folder.
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def short_name(name: str) -> str:
    """What a LoRA of a request is called for short: without folder and ``.safetensors``, other dots and all."""
    return Path(name).name.removesuffix(SUFFIX)


def search_folders(extra_dirs: Iterable[str | Path] = ()) -> tuple[Path, ...]:
    """Folders that are searched, first hit wins: ``extra_dirs``, then ``STUDIO_LORA_PATH``, then the shipped LoRAs."""
    named = [Path(folder).expanduser() for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if folder]
    return (*(Path(folder).expanduser() for folder in extra_dirs), *named, assets() / "loras")


def list_loras(extra_dirs: Iterable[str | Path] = ()) -> dict[str, Path]:
    """Every LoRA by name: its path below the folder without the ending, ``style/ink`` for ``style/ink.safetensors``."""
    known: dict[str, Path] = {}
    for folder in search_folders(extra_dirs):
        for file in lora_files(folder):
            known.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return known


def lora_files(folder: Path, suffixes: tuple[str, ...] = (SUFFIX,)) -> Iterator[Path]:
    """The LoRA files below ``folder``, sorted; hidden ones, pipes, and links out of it are left out."""
    if not folder.is_dir():
        return
    root = os.path.realpath(folder)  # pathlib's resolve() raises where links run in a circle
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent) / name for name in files if not name.startswith(".") and name.lower().endswith(suffixes)]
        if len(found) > _MAX_FILES:
            raise FileError(f"{folder} holds more than {_MAX_FILES} LoRA files: name a smaller folder")
    for path in sorted(found):
        ordinary = os.path.isfile(path) or not os.path.exists(path)  # no pipe, which would be read for ever
        if ordinary and Path(os.path.realpath(path)).is_relative_to(root):
            yield path


def find_lora(name_or_path: str | Path, extra_dirs: Iterable[str | Path] = (), *, names_only: bool = False) -> Path:
    """The file of a LoRA given by path, or by name in the known folders.

    A name is the file's name with or without ``.safetensors``, with or without its sub-folder, in any case when nothing else
    fits.

    Args:
        name_or_path: what the user wrote.
        extra_dirs: folders to search first.
        names_only: take no paths. For requests from the network, which must not choose files.

    Raises:
        RequestError: an empty name, or a path where only names are taken.
        UnknownNameError: nothing fits; the message offers near names.
    """
    text = str(name_or_path).strip()
    if not text or "\0" in text:
        raise RequestError("a LoRA needs a name or a path, and none was given")
    extra = tuple(extra_dirs)
    if not names_only:
        path = Path(text).expanduser()
        for usual in FOLDER_FILES:
            if (path / usual).is_file():
                return path / usual
        for candidate in (path, path.with_name(path.name + SUFFIX)):
            if candidate.is_file():
                return candidate
    elif Path(text).is_absolute() or ".." in Path(text).parts:
        raise RequestError(f"'{text}' is a path; here a LoRA is chosen by its name")
    known = list_loras(extra)
    found = _look_up(text.removesuffix(SUFFIX), known) or _look_up(text, _by_file_name(extra))
    if found is not None:
        return found
    raise UnknownNameError("LoRA", text, known, f"(searched {', '.join(str(folder) for folder in search_folders(extra))})")


def _look_up(name: str, known: dict[str, Path]) -> Path | None:
    if name in known:
        return known[name]
    by_stem = {key.rsplit("/", 1)[-1]: path for key, path in reversed(known.items())}
    if name in by_stem:
        return by_stem[name]
    lowered = {key.lower(): path for key, path in by_stem.items()}
    return lowered.get(name.lower())


def _by_file_name(extra: tuple[str | Path, ...]) -> dict[str, Path]:
    return {file.name: file for folder in reversed(search_folders(extra)) for file in lora_files(folder, PICKLES)}
