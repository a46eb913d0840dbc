"""A folder of mixed LoRA files at a glance: what each is, and whether it fits a base.

A bad file is a row, not an error. Headers tell all but one thing: of files that fit, the numbers are read too, since training
that diverged leaves NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from studio.errors import FileError, StudioError
from studio.lora.files import Match, check_against, check_values, read_header
from studio.lora.identity import LoraHeader
from studio.lora.library import PICKLES, SUFFIX, lora_files

_TITLES = {"transformer": "a transformer such as FLUX or SD3"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file of a folder.

    Args:
        name: its path below the folder.
        fits: whether every layer has its place in the base; None without a base.
        verdict: for people: ``fits``, or why not.
        family, trainer, kinds, ranks, alpha, text_encoder, triggers: as the header tells them; empty for a refused file.
        matched, total: layers that fit the base, and layers of the file.
        error: class of the error for a refused file.
    """

    name: str
    fits: bool | None
    verdict: str
    family: str = ""
    trainer: str = ""
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    alpha: float | None = None
    text_encoder: bool = False
    triggers: tuple[str, ...] = ()
    matched: int = 0
    total: int = 0
    error: str = ""


def survey(folder: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None, *, family: str = "") -> list[Row]:
    """One row for each LoRA file below ``folder``, by name; pickles are listed and refused.

    Args:
        folder: searched with its sub-folders.
        shapes: of the base, see :func:`studio.lora.files.module_shapes`; None to leave the base out.
        family: of the base, to say more than "does not fit".

    Raises:
        FileError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileError(f"there is no folder {root}")
    return [_row(path, path.relative_to(root).as_posix(), shapes, family) for path in lora_files(root, (SUFFIX, *PICKLES))]


def _row(path: Path, name: str, shapes: Mapping[str, tuple[int, ...]] | None, family: str) -> Row:
    try:
        header = read_header(path)
    except StudioError as error:
        return Row(name=name, fits=None if shapes is None else False, verdict=_why(error, path), error=type(error).__name__)
    match = check_against(header, shapes or {})
    fits, verdict, fault = _verdict(path, header, match if shapes is not None else None, family)
    return Row(
        name=name,
        fits=fits,
        verdict=verdict,
        family=header.family,
        trainer=header.trainer,
        kinds=header.kinds,
        ranks=header.ranks,
        alpha=header.alpha,
        text_encoder=header.has_text_encoder,
        triggers=header.triggers,
        matched=len(match.matched),
        total=match.total,
        error=fault,
    )


def _verdict(path: Path, header: LoraHeader, match: Match | None, family: str) -> tuple[bool | None, str, str]:
    """``fits``, ``verdict`` and ``error`` of a file with a sound header; ``match`` is None without a base."""
    if match is not None and not match.complete:
        if family and header.family not in (family, "unknown"):
            return False, f"is for {_TITLES.get(header.family, header.family)}, not for {family}", ""
        return False, f"does not fit: {match}", ""
    try:
        check_values(path)
    except StudioError as error:
        return None if match is None else False, _why(error, path), type(error).__name__
    return (None, "readable", "") if match is None else (True, "fits", "")


def _why(error: StudioError, path: Path) -> str:
    """The sentence without the name that stands at the row's beginning."""
    return str(error).removeprefix(f"{path.name} ").removeprefix("is refused: ")
