"""Prompts as the UNet sees them, for Stable Diffusion 1.x shaped bases (the embedded one too) and SDXL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from studio.base import Base


@dataclass(frozen=True, eq=False)
class TextStates:
    """``states [B, L, D]`` for cross-attention; ``pooled [B, P]`` for SDXL."""

    states: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Tensor) -> TextStates:
        return TextStates(self.states[index], None if self.pooled is None else self.pooled[index])

    def to(self, device: torch.device) -> TextStates:
        return TextStates(self.states.to(device), None if self.pooled is None else self.pooled.to(device))

    @staticmethod
    def cat(parts: Sequence[TextStates]) -> TextStates:
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextStates(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


def token_ids(base: Base, prompts: Sequence[str]) -> list[Tensor]:
    """Per tokenizer ``[B, L]`` int64, padded and cut to its context."""
    tokenizers = [base.tokenizer] + ([base.tokenizer_2] if base.tokenizer_2 is not None else [])
    return [
        tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        for tokenizer in tokenizers
    ]


def encode_ids(base: Base, ids: Sequence[Tensor]) -> TextStates:
    """Text states of token ids as the stock pipelines make them: SD 1.x takes the last layer, SDXL the last but one of both
    encoders side by side and the second's projected end-of-text state."""
    first = ids[0].to(base.text_encoder.device)
    if base.text_encoder_2 is None:
        return TextStates(base.text_encoder(first)[0])
    one: Any = base.text_encoder(first, output_hidden_states=True)
    two: Any = base.text_encoder_2(ids[1].to(base.text_encoder_2.device), output_hidden_states=True)
    return TextStates(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two[0])


def encode(base: Base, prompts: Sequence[str], chunk: int = 32) -> TextStates:
    """Text states of ``prompts`` on the CPU, without gradients."""
    pieces = [prompts[start : start + chunk] for start in range(0, len(prompts), chunk)]
    with torch.no_grad():
        return TextStates.cat([encode_ids(base, token_ids(base, piece)).to(torch.device("cpu")) for piece in pieces])


def known_words(base: Base, text: str) -> bool:
    """Whether every word of ``text`` is one token of the base's vocabulary, so that it may already mean something there."""
    tokenizer = base.tokenizer
    words = re.findall(r"\S+", text.lower())
    pieces = [tokenizer.tokenize(word) for word in words]
    return all(len(piece) == 1 and piece[0] != tokenizer.unk_token for piece in pieces)


def cut_captions(base: Base, captions: Iterable[str]) -> list[str]:
    """The captions that are longer than the text encoder reads."""
    tokenizer = base.tokenizer
    return [caption for caption in captions if len(tokenizer(caption).input_ids) > tokenizer.model_max_length]
