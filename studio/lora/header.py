"""Read the header of a safetensors file, and nothing else, without trusting it.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensor data. The JSON maps names to ``{"dtype",
"shape", "data_offsets": [begin, end)}``, with an optional ``__metadata__`` of strings. Every offset is checked before a byte
of data is read.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from studio.errors import (
    DamagedFileError,
    FileError,
    FileLimitError,
    PickleRefusedError,
    UnknownFormatError,
    UnsafeMetadataError,
)

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
MAX_DIMENSIONS = 6
MAX_NAME = 400

# Values of these keys end up as file names in some programs; here they never do, and a file that tries is not loaded.
_NAME_KEYS = ("ss_output_name", "modelspec.title", "studio.name")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may be at most. A rank-256 LoRA of every SDXL layer has about 3 400 tensors and 2.2 GB.

    ``kind`` names the file in messages; ``convert`` says what to do with a pickle, ``hint`` with a file that is too large.
    """

    header_bytes: int = 16 * 2**20
    file_bytes: int = 4 * 2**30
    tensors: int = 20_000
    rank: int = 1024
    kind: str = "a LoRA file"
    convert: str = "or convert one you trust with 'studio lora convert --from-pickle'"
    hint: str = ": is it a whole checkpoint?"


LIMITS = Limits()


@dataclass(frozen=True)
class TensorInfo:
    """Kind, shape and place of one tensor; ``begin`` and ``end`` are absolute byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class RawHeader:
    """The checked header of one safetensors file."""

    path: Path
    file_bytes: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_raw_header(path: Path, limits: Limits = LIMITS) -> RawHeader:
    """Parse and check the header of ``path``; no tensor is loaded.

    Raises:
        FileError: missing, a folder, or not readable.
        PickleRefusedError: the bytes are a pickle or a zip, whatever the name says.
        FileLimitError: header, file or tensor count over ``limits``.
        DamagedFileError: cut short, or offsets that overlap, leave gaps or disagree with shape and dtype.
        UnsafeMetadataError: metadata that tries to be a path.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # opening one would wait for a writer for ever
            raise FileError(f"cannot read {path}: it is a pipe, not a file")
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            text = _header_text(file, file_bytes, path, limits)
    except OSError as error:
        raise FileError(f"cannot read {limits.kind.split(maxsplit=1)[1]} {path}: {error.strerror or error}") from error
    entries = _parse_json(text, path)
    metadata = checked_metadata(entries.pop("__metadata__", {}), path.name)
    if len(entries) > limits.tensors:
        raise FileLimitError(f"{path.name} holds {len(entries)} tensors, more than the {limits.tensors} {limits.kind} may have")
    data_start = 8 + len(text)
    tensors = {name: _tensor_info(name, entry, data_start, path) for name, entry in entries.items()}
    _check_offsets(tensors.values(), data_start, file_bytes, path)
    return RawHeader(path, file_bytes, tensors, metadata)


def is_pickle(start: bytes) -> bool:
    """Whether a file that starts so is a zip (torch's format), a binary pickle, or a tar: formats that may run code."""
    zipped = start[:4] in (b"PK\x03\x04", b"PK\x05\x06")
    pickled = len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5
    text_pickle = start[:1] in (b"(", b"c", b"]", b"}") and start[8:9] != b"{"
    return zipped or pickled or text_pickle or start[257:262] == b"ustar"


def scalar_values(header: RawHeader, names: Iterable[str]) -> dict[str, float]:
    """The values of one-element tensors (``alpha``), a few bytes each, read in place."""
    formats = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
    values: dict[str, float] = {}
    with header.path.open("rb") as file:
        for name in names:
            info = header.tensors[name]
            if math.prod(info.shape) != 1 or (info.dtype not in formats and info.dtype != "BF16"):
                continue
            file.seek(info.begin)
            data = file.read(info.end - info.begin)
            if info.dtype == "BF16":  # the upper half of a float32
                values[name] = float(struct.unpack("<f", b"\0\0" + data)[0])
            else:
                values[name] = float(struct.unpack(formats[info.dtype], data)[0])
    return values


def checked_metadata(metadata: Any, name: str) -> dict[str, str]:
    """The metadata of file ``name``, read or to be written, if it is a table of strings none of which tries to be a path."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"the metadata of {name} is not a table of strings: nested values belong in as JSON")
    if not all(key.isprintable() and _is_text(value) for key, value in metadata.items()):
        raise DamagedFileError(f"the metadata of {name} holds characters that are no text")
    for key in _NAME_KEYS:
        if _is_path_trick(metadata.get(key, "")):
            raise UnsafeMetadataError(f"{name} is refused: its metadata '{key}' is a path ({metadata[key][:60]!r}), not a name")
    thumbnail = metadata.get("modelspec.thumbnail", "")
    if thumbnail and not thumbnail.startswith("data:image/"):
        raise UnsafeMetadataError(f"{name} is refused: its preview picture points outside the file ({thumbnail[:60]!r})")
    return dict(metadata)


def _header_text(file: BinaryIO, file_bytes: int, path: Path, limits: Limits) -> bytes:
    start = file.read(512)
    length = int.from_bytes(start[:8], "little") if len(start) >= 8 else 0
    # A length such as 640 begins with the two bytes of a pickle, so the brace behind it decides.
    if not (start[8:9] == b"{" and 2 <= length <= file_bytes - 8):
        _refuse_foreign(start, length, path, limits)
    if file_bytes > limits.file_bytes:
        raise FileLimitError(
            f"{path.name} has {file_bytes / 2**30:.1f} GiB, more than the {limits.file_bytes / 2**30:.1f} GiB "
            f"{limits.kind} may have{limits.hint}"
        )
    if length > limits.header_bytes:
        raise FileLimitError(f"{path.name} has a header of {length} bytes, more than the {limits.header_bytes} allowed")
    file.seek(8)
    return file.read(length)


def _refuse_foreign(start: bytes, length: int, path: Path, limits: Limits) -> None:
    if is_pickle(start):
        raise PickleRefusedError(
            f"{path.name} is a pickle, which can run code when read: use a safetensors file, {limits.convert}"
        )
    if start[8:9] == b"{" and length > limits.header_bytes:
        raise FileLimitError(f"{path.name} claims a header of {length} bytes, more than the {limits.header_bytes} allowed")
    if start[8:9] == b"{":
        raise DamagedFileError(f"{path.name} is cut short: its header should have {length} bytes. Download or copy it again")
    raise DamagedFileError(f"{path.name} is not a safetensors file: it has no safetensors header")


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except RecursionError as error:
        raise DamagedFileError(f"the header of {path.name} is damaged: it is nested too deeply") from error
    except ValueError as error:
        raise DamagedFileError(f"the header of {path.name} is damaged: it is no sound JSON ({error})") from error
    if not isinstance(entries, dict):
        raise DamagedFileError(f"the header of {path.name} is damaged: it is not a table of tensors")
    return entries


def _is_path_trick(value: str) -> bool:
    """Parent folders, absolute paths, drives, control characters. A slash alone is fine: titles have some."""
    parts = value.replace("\\", "/").split("/")
    drive = len(value) > 2 and value[0].isalpha() and value[1] == ":" and value[2] in "\\/"
    control = any(ord(character) < 32 and character not in "\n\r\t" for character in value)
    return ".." in parts or value.startswith(("/", "\\", "~/")) or drive or control


def _is_text(value: str) -> bool:
    """Whether ``value`` can be written at all: JSON may hold halves of characters that no file and no terminal takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tensor_info(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    def whole(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)

    known = (
        isinstance(entry, dict)
        and whole(entry.get("shape"))
        and whole(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )
    if len(name) > MAX_NAME or not name.isprintable():  # names stand in messages, so nothing in them may steer a terminal
        raise DamagedFileError(f"the header of {path.name} is damaged: {name[:80]!a} is no name of a tensor")
    if not known or len(entry["shape"]) > MAX_DIMENSIONS:
        raise DamagedFileError(f"the header of {path.name} is damaged: it does not describe tensor '{name[:80]}'")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnknownFormatError(
            f"{path.name} is refused: tensor '{name[:80]}' has the number format {str(dtype)[:20]!r}, which no LoRA uses"
        )
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(entry["shape"]) * ITEM_BYTES[dtype]:
        raise DamagedFileError(
            f"the header of {path.name} is damaged: tensor '{name[:80]}' of shape {entry['shape']} cannot have "
            f"{end - begin} bytes"
        )
    return TensorInfo(dtype, tuple(entry["shape"]), data_start + begin, data_start + end)


def _check_offsets(tensors: Iterable[TensorInfo], data_start: int, file_bytes: int, path: Path) -> None:
    reached = data_start
    for info in sorted(tensors, key=lambda info: (info.begin, info.end)):
        if info.begin != reached:
            fault = "overlap" if info.begin < reached else "leave a gap"
            raise DamagedFileError(f"{path.name} is refused: its tensors {fault} at byte {info.begin}")
        reached = info.end
    if reached != file_bytes:
        fault = "is cut short" if reached > file_bytes else "has bytes that belong to no tensor"
        raise DamagedFileError(f"{path.name} {fault}: the tensors end at byte {reached}, the file at {file_bytes}")
