"""Prompts to conditioning: any length, encoded in chunks of the family's context; one vector of details for SDXL.

A prompt longer than the context is cut in chunks of (context - 2) tokens; each chunk is wrapped in its own begin and end
tokens, encoded alone, and the results are put one after the other along the token axis. A short prompt comes out exactly as
from the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from studio.base import Base


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded:
    """Prompts for the UNet.

    Args:
        states: text states ``[n, L, d]``; L is a multiple of the context length.
        ids: the token ids behind each column, ``[n, L]``: for finding the columns of a word.
        pooled: SDXL's pooled text vector ``[n, p]``.
    """

    states: Tensor
    ids: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Sequence[int]) -> Encoded:
        """The prompts ``index``, in that order; a prompt may be repeated."""
        at = torch.as_tensor(index, device=self.states.device)
        pooled = None if self.pooled is None else self.pooled[at]
        return Encoded(states=self.states[at], ids=self.ids[at.to(self.ids.device)], pooled=pooled)


def chunk_ids(tokenizer: Any, text: str, context: int) -> list[list[int]]:
    """Token ids of ``text`` in chunks of exactly ``context``: begin, up to (context - 2) tokens, end, padding."""
    body = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    room = context - 2
    pieces = [body[start : start + room] for start in range(0, len(body), room)] or [[]]
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [[begin, *piece, end] + [pad] * (room - len(piece)) for piece in pieces]


def _ids(tokenizer: Any, prompts: Sequence[str], context: int, chunks: int) -> Tensor:
    """``[n, chunks, context]``; shorter prompts are filled with empty chunks."""
    empty = chunk_ids(tokenizer, "", context)
    rows = [chunk_ids(tokenizer, prompt, context) for prompt in prompts]
    return torch.tensor([row + empty * (chunks - len(row)) for row in rows])


def chunks_of(base: Base, prompts: Sequence[str]) -> int:
    """Chunks the longest of ``prompts`` needs, over all tokenizers of the base."""
    tokenizers = [base.tokenizer] + ([base.tokenizer_2] if base.tokenizer_2 is not None else [])
    return max(len(chunk_ids(tokenizer, prompt, base.context_length)) for tokenizer in tokenizers for prompt in prompts)


@torch.no_grad()
def encode(base: Base, prompts: Sequence[str], chunks: int | None = None) -> Encoded:
    """Encode ``prompts``, all padded to ``chunks`` chunks (default: what the longest needs).

    LoRAs on the text encoder act when a bank is attached meanwhile.
    """
    count = chunks or chunks_of(base, prompts)
    context = base.context_length
    ids = _ids(base.tokenizer, prompts, context, count)
    flat = ids.flatten(0, 1).to(base.device)
    if base.text_encoder_2 is None:
        states = base.text_encoder(flat).last_hidden_state
        return Encoded(states=states.unflatten(0, ids.shape[:2]).flatten(1, 2), ids=ids.flatten(1))
    # SDXL: the last layer but one of both encoders, side by side; the pooled vector of the second, from the first chunk.
    other = _ids(base.tokenizer_2, prompts, context, count).flatten(0, 1).to(base.device)
    first = base.text_encoder(flat, output_hidden_states=True).hidden_states[-2]
    second = base.text_encoder_2(other, output_hidden_states=True)
    states = torch.cat([first, second.hidden_states[-2]], dim=-1)
    pooled = second.text_embeds.unflatten(0, ids.shape[:2])[:, 0]
    return Encoded(states=states.unflatten(0, ids.shape[:2]).flatten(1, 2), ids=ids.flatten(1), pooled=pooled)


def encode_pair(base: Base, prompts: Sequence[str], negatives: Sequence[str]) -> tuple[Encoded, Encoded]:
    """``(negative, positive)``, padded to the same number of chunks.

    SDXL was trained with zeros, not with the states of an empty prompt, where there is nothing to say.
    """
    both = encode(base, [*negatives, *prompts])
    count = len(negatives)
    negative, positive = both.rows(range(count)), both.rows(range(count, count + len(prompts)))
    if negative.pooled is not None:
        said = torch.tensor([bool(text.strip()) for text in negatives], device=negative.states.device)
        negative = Encoded(
            states=negative.states * said[:, None, None], ids=negative.ids, pooled=negative.pooled * said[:, None]
        )
    return negative, positive


def added_conditions(base: Base, encoded: Encoded, size: tuple[int, int]) -> dict[str, Tensor] | None:
    """SDXL's extra conditions of a picture of ``size`` (width, height): pooled text and (original, crop, target) sizes."""
    if encoded.pooled is None:
        return None
    width, height = size
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=encoded.pooled.dtype, device=encoded.pooled.device)
    return {"text_embeds": encoded.pooled, "time_ids": ids.expand(len(encoded.pooled), -1)}
