"""A folder of mixed LoRA files at a glance: what each is, and whether it fits a base.

Headers only; a bad file is a row, not an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from studio.errors import FileError, StudioError
from studio.lora.files import check_against, read_header
from studio.lora.library import PICKLES, SUFFIX, lora_files


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
        return Row(name=name, fits=None if shapes is None else False, verdict=str(error), error=type(error).__name__)
    match = check_against(header, shapes or {})
    fits = None if shapes is None else match.complete
    if fits is None:
        verdict = "readable"
    elif fits:
        verdict = "fits"
    elif family and header.family not in (family, "unknown"):
        verdict = f"is for {header.family}, not for {family}"
    else:
        verdict = f"does not fit: {match}"
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
    )
