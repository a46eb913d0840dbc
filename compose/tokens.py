"""From a prompt to the text encoder's columns: chunks of token ids with a weight for each, and learnt words in their places.

A prompt is cut in chunks of (context - 2) tokens, each wrapped in its own begin and end tokens, so no word is lost however
long it is. As in A1111, a chunk that is full gives what follows its last comma to the next one if the comma is near, so that
phrases stay together; BREAK begins a new chunk. Everything here is plain lists; no model is touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from studio.errors import RequestError, WrongBaseError
from studio.prompts import Prompt, parse

if TYPE_CHECKING:
    from torch import Tensor

    from studio.embeddings import Embedding

BACKTRACK = 20 / 75
"""How far back, as a share of a chunk, a comma may lie to cut there."""
PLACEHOLDER = 0
"""The token id under a learnt vector; its own state never shows."""


@dataclass(frozen=True)
class Unit:
    """What may not be cut: a token, or all the vectors of a learnt word."""

    ids: tuple[int, ...]
    weight: float = 1.0
    vectors: Tensor | None = None


@dataclass
class Chunk:
    """One reading of the text encoder: exactly ``context`` columns.

    Args:
        ids: token ids, with begin, end and padding.
        weights: of each column; those of begin, end and padding are 1.
        vectors: learnt vectors by the column where they begin: ``[n, d]``, or ``[layers, n, d]``, other ones for every
            cross-attention layer.
        used: how many columns stand between begin and end; a prompt may say the end token itself, so its id marks nothing.
    """

    ids: list[int]
    weights: list[float]
    vectors: dict[int, Tensor] = field(default_factory=dict)
    used: int = 0

    @property
    def layerwise(self) -> bool:
        return any(vectors.ndim == 3 for vectors in self.vectors.values())

    def at(self, layer: int) -> Chunk:
        """The chunk as cross-attention layer number ``layer`` reads it."""
        found = {column: vectors[layer] if vectors.ndim == 3 else vectors for column, vectors in self.vectors.items()}
        return replace(self, vectors=found)


@dataclass(frozen=True)
class Words:
    """What turns text into units for one text encoder: its tokenizer, and the embeddings of a request."""

    tokenizer: Any
    context: int
    component: str = "text_encoder"
    embeddings: tuple[Embedding, ...] = ()

    @property
    def room(self) -> int:
        """Tokens of a chunk without begin and end."""
        return self.context - 2

    @property
    def comma(self) -> int:
        """The token id of a comma that ends a word."""
        return int(self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(","))[-1])


def chunks(words: Words, text: str) -> list[Chunk]:
    """``text`` as the text encoder reads it: at least one chunk."""
    prompt = parse(text)
    return [_framed(words, run) for section in _sections(words, prompt) for run in section]


def literal(words: Words, text: str, count: int = 1) -> list[Chunk]:
    """``text`` as it is written, without weights or breaks, in ``count`` chunks: how a trainer reads captions.

    Chunks end at commas, as those of a prompt do, where that leaves nothing out; else they are filled to the last column, and
    what does not fit even so is left out. What is shorter is followed by empty chunks.
    """
    units = _units(words, text, 1.0)
    runs = _cut(words, units)
    if len(runs) > count:
        runs = _cut(words, units, commas=False)[:count]
    return [_framed(words, run) for run in [*runs, *[[]] * (count - len(runs))]]


def length(words: Words, text: str) -> int:
    """The least number of chunks that hold ``text`` as it is written."""
    return len(_cut(words, _units(words, text, 1.0), commas=False))


def learnt(embeddings: Sequence[Embedding], text: str) -> set[str]:
    """Names of the embeddings that ``text`` calls."""
    prompt = parse(text)
    return {match.name for section in prompt.sections for p in section for match, _ in _split(embeddings, p.text) if match}


def one_chunk(words: Words, text: str, reader: str) -> None:
    """For what reads the columns of words: a prompt must fit one chunk.

    Raises:
        RequestError: it does not; the message names the words that are too many.
    """
    every = chunks(words, text)
    if len(every) > 1:
        special = {words.tokenizer.bos_token_id, words.tokenizer.eos_token_id, words.tokenizer.pad_token_id}
        over = [token for chunk in every[1:] for token in chunk.ids if token not in special]
        told = words.tokenizer.decode(over).strip()
        raise RequestError(
            f"{reader} reads the places of words, for which the prompt must fit {words.room} tokens: leave out '{told[:120]}'"
        )


def _sections(words: Words, prompt: Prompt) -> list[list[list[Unit]]]:
    """For each section its chunks as runs of units. Every section but the last has at least one, as BREAK fills it up."""
    cut = [_cut(words, [unit for piece in section for unit in _units(words, piece.text, piece.weight)])
           for section in prompt.sections]  # fmt: skip
    if len(cut) > 1 and cut[-1] == [[]]:
        cut.pop()
    return cut


def _units(words: Words, text: str, weight: float) -> list[Unit]:
    units = []
    for embedding, plain in _split(words.embeddings, text):
        if embedding is None:
            ids = words.tokenizer.convert_tokens_to_ids(words.tokenizer.tokenize(plain))
            units += [Unit((int(token),), weight) for token in ids]
            continue
        vectors = embedding.vectors.get(words.component)
        if vectors is None:
            raise WrongBaseError(
                f"embedding '{embedding.name}' has no part for the base's {words.component.replace('_', ' ')}: "
                "it was made for another model family"
            )
        if embedding.tokens > words.room:
            raise RequestError(f"embedding '{embedding.name}' takes {embedding.tokens} tokens, but a chunk has {words.room}")
        units.append(Unit((PLACEHOLDER,) * embedding.tokens, weight, vectors))
    return units


def _split(embeddings: Sequence[Embedding], text: str) -> list[tuple[Embedding | None, str]]:
    """``text`` cut where it calls an embedding as a whole word, with or without ComfyUI's ``embedding:``."""
    calls = {call.lower(): embedding for embedding in embeddings for call in embedding.calls}
    if not calls:
        return [(None, text)]
    names = "|".join(re.escape(call) for call in sorted(calls, key=len, reverse=True))
    parts: list[tuple[Embedding | None, str]] = []
    end = 0
    for match in re.finditer(rf"(?<!\w)(?:embedding:)?({names})(?!\w)", text, re.IGNORECASE):
        parts += [(None, text[end : match.start()]), (calls[match.group(1).lower()], match.group())]
        end = match.end()
    return [*parts, (None, text[end:])]


def _cut(words: Words, units: Sequence[Unit], *, commas: bool = True) -> list[list[Unit]]:
    """Units in runs of at most ``room`` tokens; at least one run. ``commas``: a run may end at one that is near its end."""
    runs: list[list[Unit]] = [[]]
    used = 0
    for unit in units:
        if used + len(unit.ids) > words.room:
            rest = [] if unit.ids == (words.comma,) or not commas else _after_comma(words, runs[-1], used)
            runs.append(rest)
            used = sum(len(one.ids) for one in rest)
            if used + len(unit.ids) > words.room:  # a long learnt word after a phrase that moved
                runs.append([])
                used = 0
        runs[-1].append(unit)
        used += len(unit.ids)
    return runs


def _after_comma(words: Words, run: list[Unit], used: int) -> list[Unit]:
    """Take off a full run what follows its last comma, if that is near enough."""
    if used < words.room:
        return []
    behind = 0
    for index in range(len(run) - 1, -1, -1):
        if run[index].ids == (words.comma,) and run[index].vectors is None:
            rest = run[index + 1 :]
            del run[index + 1 :]
            return rest
        behind += len(run[index].ids)
        if behind >= int(BACKTRACK * words.room):
            break
    return []


def _framed(words: Words, run: Sequence[Unit]) -> Chunk:
    begin, end, pad = (getattr(words.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    chunk = Chunk([begin], [1.0])
    for unit in run:
        if unit.vectors is not None:
            chunk.vectors[len(chunk.ids)] = unit.vectors
        chunk.ids += unit.ids
        chunk.weights += [unit.weight] * len(unit.ids)
    chunk.used = len(chunk.ids) - 1
    chunk.ids += [end] + [pad] * (words.context - 1 - len(chunk.ids))
    chunk.weights += [1.0] * (words.context - len(chunk.weights))
    return chunk
