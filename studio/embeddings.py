"""Textual-inversion embeddings: learnt vectors that a prompt calls by a name (Gal et al., 2022). Only safetensors is read.

Layouts of files of their own: A1111's ``emb_params`` (SD 1.x), ``clip_l`` and ``clip_g`` (SDXL), and diffusers' one tensor
called by its token.

A LoRA may carry learnt words too, all in one form: the tensor ``lora_tokens.<i>.<text encoder>`` is ``[n, d]``, n vectors in
place of word i, or ``[layers, n, d]``, other ones for every cross-attention layer in the order of a forward (P+, Voynov et
al., 2023; ED-LoRA, Gu et al., 2023). The metadata ``studio.tokens`` is the JSON list of the words. The names hold ``lora`` and
no component's prefix, so stock diffusers reads the LoRA beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from studio.errors import LoraShapeError, LoraValuesError, RequestError, UnknownFormatError, UnknownNameError
from studio.lora.header import FLOATS, Limits, read_raw_header

if TYPE_CHECKING:
    from torch import Tensor

    from studio.lora.model import Lora

LIMITS = Limits(
    header_bytes=2**20,
    file_bytes=64 * 2**20,
    tensors=16,
    kind="an embedding file",
    convert="for an embedding in a .pt file only its author can give one",
    hint=": is it a LoRA or a checkpoint?",
)
_SLOTS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
WORDS_KEY = "studio.tokens"
TOKEN_KEY = re.compile(r"lora_tokens\.(\d{1,3})\.(text_encoder|text_encoder_2)")
_LOOKS_LIKE_LORA = ("lora_", ".alpha", "hada_", "lokr_")


@dataclass(frozen=True, eq=False)
class Embedding:
    """One learnt word.

    Args:
        name: the file's stem.
        calls: how a prompt calls it: by its name, or by the token that a diffusers file names.
        vectors: ``[n, d]`` by text encoder: ``text_encoder``, ``text_encoder_2``. As many rows in both. Or ``[layers, n, d]``,
            other vectors for every cross-attention layer.
        sha256: of the file.
    """

    name: str
    calls: tuple[str, ...]
    vectors: Mapping[str, Tensor]
    source: Path
    sha256: str

    @property
    def tokens(self) -> int:
        """Places it takes in a prompt."""
        return int(next(iter(self.vectors.values())).shape[-2])

    @property
    def layers(self) -> int:
        """How many cross-attention layers have vectors of their own; 0: all read the same."""
        first = next(iter(self.vectors.values()))
        return int(first.shape[0]) if first.ndim == 3 else 0


def load_embedding(path: str | Path) -> Embedding:
    """Read one embedding.

    Raises:
        UnknownNameError: no such file. UnsafeFileError: a pickle, or too large.
        LoraFileError: damaged, of another kind, with shapes that do not fit or with NaN.
    """
    from safetensors.torch import load_file

    from studio.hashes import sha256_of

    file = Path(path).expanduser()
    if not file.is_file():
        beside = [entry.name for entry in file.parent.glob("*.safetensors")] if file.parent.is_dir() else []
        raise UnknownNameError("embedding", str(path), beside, hint="(give its file)")
    header = read_raw_header(file, LIMITS)
    names = set(header.tensors)
    if any(mark in name for name in names for mark in _LOOKS_LIKE_LORA):
        raise UnknownFormatError(f"{file.name} is a LoRA, not an embedding: use it with --lora")
    if not names <= set(_SLOTS) and len(names) > 1:
        some = ", ".join(f"'{name[:40]}'" for name in sorted(names)[:3])
        raise UnknownFormatError(f"{file.name} is in no embedding format known here: it holds the tensors {some}")
    tensors = load_file(file)
    if not names or any(header.tensors[name].dtype not in FLOATS or 0 in tensor.shape for name, tensor in tensors.items()):
        raise UnknownFormatError(f"{file.name} holds no embedding: it has no numbers")
    token = "" if names <= set(_SLOTS) else next(iter(names))
    calls = (file.stem, token) if token not in ("", "*", "string_to_param.*", file.stem) else (file.stem,)
    vectors = {}
    for name, tensor in tensors.items():
        rows = tensor.float().reshape(-1, tensor.shape[-1]) if tensor.ndim in (1, 2) else None
        if rows is None:
            raise LoraShapeError(f"{file.name} is refused: an embedding is rows of numbers, not of shape {tuple(tensor.shape)}")
        if not bool(rows.isfinite().all()):
            raise LoraValuesError(f"{file.name} is refused: it holds NaN or infinity, so its training diverged")
        vectors[_SLOTS.get(name, "text_encoder")] = rows
    if len({rows.shape[0] for rows in vectors.values()}) > 1:
        raise LoraShapeError(f"{file.name} is refused: its two text encoders get different numbers of vectors")
    return Embedding(file.stem, calls, vectors, file, sha256_of([file])[0])


def load_embeddings(paths: tuple[str, ...]) -> list[Embedding]:
    """Read several, each with names of its own."""
    found = [load_embedding(path) for path in paths]
    taken: dict[str, Embedding] = {}
    for one in found:
        for call in one.calls:
            other = taken.setdefault(call.lower(), one)
            if other is not one:
                raise RequestError(f"two embeddings are called '{call}': {other.source} and {one.source}; rename one file")
    return found


def token_tensors(tokens: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file for learnt words; nothing for none."""
    if not tokens:
        return {}, {}
    tensors = {
        f"lora_tokens.{index}.{encoder}": rows
        for index, vectors in enumerate(tokens.values())
        for encoder, rows in vectors.items()
    }
    return tensors, {WORDS_KEY: json.dumps(list(tokens), ensure_ascii=False)}


def read_tokens(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> dict[str, dict[str, Tensor]]:
    """Inverse of :func:`token_tensors`, for the tensors of file ``name`` whose names are :data:`TOKEN_KEY`.

    Raises:
        UnknownFormatError: the metadata does not name the words.
        LoraShapeError, LoraValuesError: vectors that do not fit together, or NaN.
    """
    words = token_words(tensors, metadata, name)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, encoder = _place(key)
        if tensor.ndim not in (2, 3) or 0 in tensor.shape:
            raise LoraShapeError(f"{name} is refused: '{key}' has the shape {tuple(tensor.shape)}, not that of learnt tokens")
        if not bool(tensor.isfinite().all()):
            raise LoraValuesError(f"{name} is refused: '{key}' holds NaN or infinity, so its training diverged")
        found.setdefault(words[index], {})[encoder] = tensor
    for word, vectors in found.items():
        if len({rows.shape[:-1] for rows in vectors.values()}) > 1:
            raise LoraShapeError(f"{name} is refused: the text encoders get different numbers of vectors for '{word}'")
    return found


def token_words(keys: Iterable[str], metadata: Mapping[str, str], name: str) -> list[str]:
    """The learnt words of file ``name``, of whose token tensors ``keys`` are the names.

    Raises:
        UnknownFormatError: the metadata does not name each of them once.
    """
    try:
        words = json.loads(metadata.get(WORDS_KEY, "[]"))
    except (ValueError, RecursionError):
        words = None
    wanted = {_place(key)[0] for key in keys}
    good = isinstance(words, list) and all(isinstance(word, str) and word.strip() and word.isprintable() for word in words)
    if not good or len(set(words)) != len(words) or wanted != set(range(len(words))):
        raise UnknownFormatError(
            f"{name} holds learnt tokens, but its metadata '{WORDS_KEY}' does not say which words call them: "
            "use the file as it was trained"
        )
    return list(words)


def _place(key: str) -> tuple[int, str]:
    match = TOKEN_KEY.fullmatch(key)
    if match is None:
        raise UnknownFormatError(f"'{key[:100]}' is no name of learnt tokens")
    return int(match[1]), match[2]


def carried_embeddings(name: str, lora: Lora) -> list[Embedding]:
    """The learnt words that the LoRA called ``name`` carries."""
    return [Embedding(name, (word,), vectors, lora.source or Path(name), lora.sha256) for word, vectors in lora.tokens.items()]
