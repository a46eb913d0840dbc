"""Every error a user can cause, each with one clear sentence: what, which value, what to do.

All derive from :class:`StudioError`, whose ``exit_code`` the command line returns. Programming errors are ordinary Python
exceptions and are never caught by the doors.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class StudioError(Exception):
    """Base of all errors with a sentence for the user. Exit code 1."""

    exit_code = 1


class RequestError(StudioError):
    """A value in a request is missing, of the wrong kind or out of range. Exit code 2."""

    exit_code = 2


class UnknownNameError(RequestError):
    """A name that is not known; the message offers the nearest known ones. Exit code 3."""

    exit_code = 3

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        choices = sorted(set(known))
        near = get_close_matches(name, choices, n=3, cutoff=0.5)
        if near:
            advice = "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
        elif choices:
            advice = "known: " + ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
        else:
            advice = "none is known here"
        super().__init__(f"unknown {kind} '{name}': {advice}{' ' + hint if hint else ''}")


class FileError(StudioError):
    """A file or folder cannot be read or written. Exit code 4."""

    exit_code = 4


class MissingAssetError(FileError):
    """A file this product ships is not there. Exit code 4."""


class UnsafeFileError(FileError):
    """A file that could run code or exhaust memory when read (pickle, oversized header or tensor). Exit code 5."""

    exit_code = 5


class LoraFileError(FileError):
    """A LoRA, embedding or checkpoint that is damaged, of an unknown format, or not for this base. Exit code 6."""

    exit_code = 6


class WrongBaseError(LoraFileError):
    """A LoRA or an embedding of another model family. Exit code 6."""


class NumericsError(StudioError):
    """A model produced NaN or infinity. Exit code 7."""

    exit_code = 7


class OutOfMemoryError(StudioError):
    """The device has too little memory; the message says what would fit. Exit code 8."""

    exit_code = 8


class CancelledError(StudioError):
    """The user cancelled. Exit code 130, as for an interrupt."""

    exit_code = 130


class MissingDependencyError(StudioError):
    """An optional package is needed and not installed. Exit code 9."""

    exit_code = 9


class PickleRefusedError(UnsafeFileError):
    """A pickle, whatever its file name: reading one can run code. Exit code 5."""


class FileLimitError(UnsafeFileError):
    """A file, header, tensor count or rank over the cap. Exit code 5."""


class UnsafeMetadataError(UnsafeFileError):
    """Metadata that tries to be a path or a link. Exit code 5."""


class DamagedFileError(LoraFileError):
    """A safetensors file that is cut short, or whose header contradicts itself. Exit code 6."""


class UnknownFormatError(LoraFileError):
    """A file with tensors that no reader here can place. Exit code 6."""


class LoraShapeError(LoraFileError):
    """Tensors of one layer that do not fit together, or not the layer of the base. Exit code 6."""


class LoraValuesError(LoraFileError):
    """NaN or infinity in a LoRA file. Exit code 6."""
