"""Learnt words: vectors that stand for the trigger in the text encoder's input.

Textual inversion (Gal et al., 2022) learns one vector; P+ (Voynov et al., 2023) one for every cross-attention layer of the
UNet; ED-LoRA (Gu et al., 2023, section 3.1) two for every layer, the first random and the second from the class word, beside
a LoRA, and stops them when they have grown to a length that words of the base do not have.

What is different here: the published spread of the random start (.013) and greatest length (.55) are numbers of SD 1.5; here
both follow from the base's own word vectors, and come out as those on SD 1.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compose.layerwise import cross_layers
from compose.text import PLAIN, Reading, words_of
from compose.tokens import literal
from studio.embeddings import Embedding
from studio.errors import NumericsError, RequestError
from training.batches import stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from studio.base import Base
    from training.config import ConceptConfig

ENCODERS = ("text_encoder", "text_encoder_2")
RATE_PER_SPREAD = 1 / 13
"""ED-LoRA's 1e-3 over the .013 of SD 1.5."""
WORDS = 4
"""A stream of random numbers beside those of :mod:`training.batches`."""


@dataclass(frozen=True, eq=False)
class LearntWord:
    """The trigger in training.

    Args:
        vectors: ``[n, d]`` or ``[layers, n, d]``, single precision, by text encoder.
        limits: the mean length of vectors at which they stop, by text encoder; empty: they never do.
        rates: the default learning rate, by text encoder.
    """

    word: str
    vectors: Mapping[str, nn.Parameter]
    limits: Mapping[str, float]
    rates: Mapping[str, float]

    @classmethod
    def of(cls, base: Base, config: ConceptConfig) -> LearntWord:
        """At its start, from the seed alone."""
        models = base.models()
        vectors, limits, rates = {}, {}, {}
        for index, encoder in enumerate(name for name in ENCODERS if name in models):
            table = models[encoder].get_input_embeddings().weight.detach().float()  # type: ignore[operator]
            tokenizer = base.tokenizer if encoder == ENCODERS[0] else base.tokenizer_2
            ids = own_ids(tokenizer, config.token_init or config.class_word)
            rows = start(table.cpu(), ids, config.tokens, stream(config.seed, WORDS, index))
            if config.layerwise:
                rows = rows.expand(len(cross_layers(base.unet)), -1, -1).clone()
            vectors[encoder] = nn.Parameter(rows.to(base.device))
            rates[encoder] = float(table.std()) * RATE_PER_SPREAD
            if config.token_norm:
                limits[encoder] = limit_of(table, config.token_norm)
        return cls(config.trigger, vectors, limits, rates)

    @property
    def embedding(self) -> Embedding:
        """As prompts call it; the vectors are those in training."""
        return Embedding(self.word, (self.word,), dict(self.vectors), Path(), "")

    def learnt(self) -> dict[str, dict[str, Tensor]]:
        """A copy for a file.

        Raises:
            NumericsError: a vector is not finite.
        """
        found = {encoder: rows.detach().float().cpu().clone() for encoder, rows in self.vectors.items()}
        if not all(bool(rows.isfinite().all()) for rows in found.values()):
            raise NumericsError(f"the vectors of '{self.word}' became NaN or infinite: lower token_learning_rate")
        return {self.word: found}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around an optimiser step: vectors that have reached their full length stay as they are."""
        full = [rows for encoder, rows in self.vectors.items() if full_length(rows, self.limits.get(encoder))]
        kept = [rows.detach().clone() for rows in full]
        yield
        with torch.no_grad():
            for rows, before in zip(full, kept, strict=True):
                rows.copy_(before)


def own_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` without begin and end."""
    return list(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))) if text else []


def start(table: Tensor, ids: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """``[count, d]``: random rows as spread as ``table``, the last the mean of the rows ``ids`` when there are any."""
    rows = torch.randn(count, table.shape[1], generator=generator) * table.std()
    if ids:
        rows[-1] = table[list(ids)].mean(0)
    return rows


def full_length(rows: Tensor, limit: float | None) -> bool:
    """Whether the mean length of the vectors ``[..., d]`` has reached ``limit``."""
    return limit is not None and float(rows.detach().norm(dim=-1).mean()) >= limit


def limit_of(table: Tensor, norm: float) -> float:
    """The mean length at which vectors stop: ``norm`` times that of the base's own words, ``table [n, d]``."""
    return norm * float(table.norm(dim=-1).mean())


def full_at_start(base: Base, config: ConceptConfig, weights: Mapping[str, Tensor]) -> bool:
    """Whether the vectors among ``weights``, by the names of a :class:`~training.start.Start`, have reached their full length
    in a text encoder, where they would stay as they are."""
    if not config.token_norm:
        return False
    for encoder, model in base.models().items():
        rows = weights.get(f"word.{encoder}")
        if rows is not None:
            table = model.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
            if full_length(rows, limit_of(table, config.token_norm)):
                return True
    return False


def check_words(base: Base, config: ConceptConfig, captions: Sequence[str]) -> None:
    """Refuse learnt words that could never be learnt.

    Raises:
        RequestError: more vectors than the text encoder reads, or no caption calls the trigger.
    """
    room = base.context_length - 2
    if config.tokens > room:
        raise RequestError(f"tokens {config.tokens} is more than the {room} that '{base.name}' reads at a time: give fewer")
    words = words_of(base, reading_of(config))["text_encoder"]
    if not any(chunk.vectors for caption in captions for chunk in literal(words, caption, config.caption_chunks)):
        raise RequestError(f"no caption holds the trigger '{config.trigger}', so its vectors would not be learnt: write it in")


def reading_of(config: ConceptConfig) -> Reading:
    """How captions are read as far as lengths go: with the places of a learnt trigger, whose vectors are not there yet."""
    if not config.words:
        return PLAIN
    word, empty = config.trigger, torch.zeros(config.tokens, 1)
    return Reading(embeddings=(Embedding(word, (word,), dict.fromkeys(ENCODERS, empty), Path(), ""),))
