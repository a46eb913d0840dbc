"""Captions as the UNet sees them: read as generation reads a prompt, but word for word (no weights) and all of one length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from compose.text import PLAIN, Encoded, Reading, encode_chunks, encode_layers, layers_of, words_of
from compose.tokens import Chunk, length, literal

if TYPE_CHECKING:
    from studio.base import Base
    from studio.embeddings import Embedding

PIECE = 32
"""Captions in one forward of a frozen text encoder."""
REMEMBERED = 4096
"""Captions whose tokens are remembered; shuffled ones have no end."""


class Reader:
    """Reads captions; gradients reach a LoRA on the text encoder, and the vectors of learnt words.

    Args:
        learnt: words with vectors of their own.
        clip_skip: layer of the text encoder, counted from the end: 1 is the last.
        count: chunks of every caption; longer ones are cut, shorter ones followed by empty chunks.
    """

    def __init__(self, base: Base, learnt: Sequence[Embedding] = (), clip_skip: int = 1, count: int = 1) -> None:
        reading = Reading(embeddings=tuple(learnt))
        self.base, self.clip_skip, self.count = base, clip_skip, count
        self._words, self._layers = words_of(base, reading), layers_of(reading)
        self._chunks: dict[str, dict[str, list[Chunk]]] = {}

    def read(self, texts: Sequence[str]) -> Encoded:
        """The states of ``texts``, side by side for every layer when a word is layer-wise; equal texts are read once."""
        single = list(dict.fromkeys(texts))
        rows = {name: [chunk for text in single for chunk in self._read(name, text)] for name in self._words}
        if self._layers:
            found = encode_layers(self.base, rows, self.count, self._layers, self.clip_skip)
        else:
            found = encode_chunks(self.base, rows, self.count, self.clip_skip)
        return unsaid(found, single).rows([single.index(text) for text in texts])

    @torch.no_grad()
    def read_frozen(self, texts: Sequence[str]) -> Encoded:
        """As :meth:`read`, without gradients, a few texts at a time, and brought to the CPU."""
        parts = [moved(self.read(texts[start : start + PIECE]), "cpu") for start in range(0, len(texts), PIECE)]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Encoded(
            states=torch.cat([part.states for part in parts]),
            ids=torch.cat([part.ids for part in parts]),
            pooled=torch.cat(pooled) if pooled else None,
        )

    def _read(self, name: str, text: str) -> list[Chunk]:
        known = self._chunks.setdefault(name, {})
        if text not in known:
            if len(known) >= REMEMBERED:
                known.clear()
            known[text] = literal(self._words[name], text, self.count)
        return known[text]


def unsaid(read: Encoded, texts: Sequence[str]) -> Encoded:
    """``read`` of ``texts`` with zeros where there is nothing to say, on a base with pooled vectors: generation has them there
    (:func:`compose.text.encode_pair`), so that is what a caption left empty has to teach."""
    if read.pooled is None:
        return read
    said = torch.tensor([bool(text.strip()) for text in texts], device=read.states.device)
    return Encoded(states=read.states * said[:, None, None], ids=read.ids, pooled=read.pooled * said[:, None])


def moved(text: Encoded, device: torch.device | str, dtype: torch.dtype | None = None) -> Encoded:
    """``text`` on ``device``, in ``dtype`` if one is given."""
    pooled = None if text.pooled is None else text.pooled.to(device, dtype)
    return Encoded(states=text.states.to(device, dtype), ids=text.ids, pooled=pooled)


def known_words(base: Base, text: str) -> bool:
    """Whether every word of ``text`` is one token of the base's vocabulary, so that it may already mean something there."""
    tokenizer = base.tokenizer
    words = re.findall(r"\S+", text.lower())
    pieces = [tokenizer.tokenize(word) for word in words]
    return all(len(piece) == 1 and piece[0] != tokenizer.unk_token for piece in pieces)


def lengths(base: Base, captions: Iterable[str], reading: Reading = PLAIN) -> list[int]:
    """How many chunks of the text encoder each caption fills."""
    every = words_of(base, reading).values()
    return [max(length(words, caption) for words in every) for caption in captions]
