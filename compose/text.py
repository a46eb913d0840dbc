"""Prompts to conditioning: weighted words, any length, learnt words, clip skip; one vector of details for SDXL.

Each chunk of a prompt (see :mod:`compose.tokens`) is encoded alone, and the results are put one after the other along the
token axis. A short plain prompt comes out exactly as from the stock pipeline.

Weights act as in A1111: the states of a chunk are multiplied by the weights of their columns, then all by one number that
brings their mean back, ``z' = f w z`` with ``f = mean(z) / mean(w z)``. Where states spread evenly about zero, that quotient
of two small differences says nothing and could be anything; so ``f`` is kept between ``1 / max(w)`` and ``1 / min(w)``, where
it lies whenever all columns have means of one sign, and is 1 where the mean is next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compose.tokens import Chunk, Words, chunks
from studio.errors import RequestError, WrongBaseError

if TYPE_CHECKING:
    from studio.base import Base
    from studio.embeddings import Embedding


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded:
    """Prompts for the UNet.

    Args:
        states: text states ``[n, L, d]``; L is a multiple of the context length. With words that speak to every cross-attention
            layer in its own way ``[n, L, layers * d]``, see :mod:`compose.layerwise`.
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


@dataclass(frozen=True)
class Reading:
    """How a request wants its prompts read.

    Args:
        clip_skip: 1 reads the last layer of the text encoder, 2 the last but one, and so on. SDXL was trained on the last but
            one: there 1 and 2 mean the same.
        embeddings: learnt words a prompt may call.
    """

    clip_skip: int = 1
    embeddings: tuple[Embedding, ...] = ()


PLAIN = Reading()


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The prompts of a run as they were written, for methods that make other prompts of them."""

    prompt: str
    negative: str = ""
    reading: Reading = PLAIN


LARGEST_FACTOR = 4.0
"""The bound on ``f`` where weights near zero give none."""
LEAST_MEAN = 0.01
"""A mean smaller than this share of the deviation is next to nothing. CLIP's is about a tenth of it."""


def words_of(base: Base, reading: Reading = PLAIN) -> dict[str, Words]:
    """What reads text for each text encoder of the base, by its name."""
    found = {"text_encoder": Words(base.tokenizer, base.context_length, "text_encoder", reading.embeddings)}
    if base.tokenizer_2 is not None:
        found["text_encoder_2"] = Words(base.tokenizer_2, base.context_length, "text_encoder_2", reading.embeddings)
    return found


def chunks_of(base: Base, prompts: Sequence[str], reading: Reading = PLAIN) -> int:
    """Chunks the longest of ``prompts`` needs, over all tokenizers of the base."""
    return max(len(chunks(words, prompt)) for words in words_of(base, reading).values() for prompt in prompts)


def layers_of(reading: Reading) -> int:
    """How many cross-attention layers the learnt words of ``reading`` tell apart; 0: none.

    Raises:
        WrongBaseError: two words of different bases.
    """
    found = {embedding.layers: embedding for embedding in reading.embeddings if embedding.layers}
    if len(found) > 1:
        (few, one), (many, other), *_ = sorted(found.items())
        raise WrongBaseError(
            f"'{one.name}' has words for {few} layers and '{other.name}' for {many}: they were made for different families"
        )
    return next(iter(found), 0)


@torch.no_grad()
def encode(base: Base, prompts: Sequence[str], count: int | None = None, reading: Reading = PLAIN) -> Encoded:
    """Encode ``prompts``, all padded to ``count`` chunks (default: what the longest needs).

    LoRAs on the text encoder act when a bank is attached meanwhile.

    Raises:
        RequestError: a weight out of range, or a clip skip the text encoder has no layer for.
        WrongBaseError: an embedding of another family.
    """
    full = count or chunks_of(base, prompts, reading)
    rows = {name: _filled(words, prompts, full) for name, words in words_of(base, reading).items()}
    layers = layers_of(reading)
    if not layers:
        return encode_chunks(base, rows, full, reading.clip_skip)
    return encode_layers(base, rows, full, layers, reading.clip_skip)


def encode_layers(base: Base, rows: Mapping[str, Sequence[Chunk]], count: int, layers: int, clip_skip: int = 1) -> Encoded:
    """As :func:`encode_chunks`, with the states of ``layers`` cross-attention layers side by side, ``[n, L, layers * d]``.

    Only prompts with layer-wise words are read once for every layer. Their pooled vector is the mean over the layers.
    """
    prompts = len(rows["text_encoder"]) // count
    told = [any(chunk.layerwise for chunk in _of(rows["text_encoder"], index, count)) for index in range(prompts)]
    variants = [(index, layer) for index, own in enumerate(told) for layer in range(layers if own else 1)]
    flat = {
        name: [chunk.at(layer) for index, layer in variants for chunk in _of(chunks, index, count)]
        for name, chunks in rows.items()
    }
    every = encode_chunks(base, flat, count, clip_skip)
    ends = [0, *accumulate(layers if own else 1 for own in told)]
    states = torch.stack([every.states[begin:end].expand(layers, -1, -1) for begin, end in pairwise(ends)])
    pooled = None
    if every.pooled is not None:
        pooled = torch.stack([every.pooled[begin:end].mean(0) for begin, end in pairwise(ends)])
    return Encoded(states=states.transpose(1, 2).flatten(2), ids=every.ids[ends[:-1]], pooled=pooled)


def _of(chunks: Sequence[Chunk], index: int, count: int) -> Sequence[Chunk]:
    return chunks[index * count : (index + 1) * count]


def encode_chunks(base: Base, rows: Mapping[str, Sequence[Chunk]], count: int, clip_skip: int = 1) -> Encoded:
    """States of prompts of ``count`` chunks each, given by text encoder; gradients reach the learnt vectors in them."""
    first = rows["text_encoder"]
    ids = torch.tensor([chunk.ids for chunk in first]).unflatten(0, (-1, count))
    if base.text_encoder_2 is None:
        states, _ = _encode_rows(base, "text_encoder", first, clip_skip, normed=True)
        return Encoded(states=states.unflatten(0, ids.shape[:2]).flatten(1, 2), ids=ids.flatten(1))
    # SDXL: the last layer but one of both encoders, side by side; the pooled vector of the second, from the first chunk.
    skip = max(clip_skip, 2)
    one, _ = _encode_rows(base, "text_encoder", first, skip, normed=False)
    two, out = _encode_rows(base, "text_encoder_2", rows["text_encoder_2"], skip, normed=False)
    states = torch.cat([one, two], dim=-1)
    pooled = out.text_embeds.unflatten(0, ids.shape[:2])[:, 0]
    return Encoded(states=states.unflatten(0, ids.shape[:2]).flatten(1, 2), ids=ids.flatten(1), pooled=pooled)


def encode_pair(
    base: Base, prompts: Sequence[str], negatives: Sequence[str], reading: Reading = PLAIN
) -> tuple[Encoded, Encoded]:
    """``(negative, positive)``, padded to the same number of chunks.

    SDXL was trained with zeros, not with the states of an empty prompt, where there is nothing to say.
    """
    both = encode(base, [*negatives, *prompts], reading=reading)
    count = len(negatives)
    negative, positive = both.rows(range(count)), both.rows(range(count, count + len(prompts)))
    if negative.pooled is not None:
        said = torch.tensor([bool(text.strip()) for text in negatives], device=negative.states.device)
        negative = Encoded(
            states=negative.states * said[:, None, None], ids=negative.ids, pooled=negative.pooled * said[:, None]
        )
    return negative, positive


def _filled(words: Words, prompts: Sequence[str], count: int) -> list[Chunk]:
    """``count`` chunks for each prompt; shorter prompts are filled with empty ones."""
    (empty,) = chunks(words, "")
    rows = [chunks(words, prompt) for prompt in prompts]
    return [chunk for row in rows for chunk in row + [empty] * (count - len(row))]


def _encode_rows(base: Base, name: str, rows: Sequence[Chunk], clip_skip: int, *, normed: bool) -> tuple[Tensor, Any]:
    """Weighted states ``[rows, context, d]`` of the layer ``clip_skip`` from the end, and the encoder's whole output."""
    encoder: Any = base.models()[name]
    layers = int(encoder.config.num_hidden_layers)
    if clip_skip > layers:
        raise RequestError(f"clip skip {clip_skip} is more than the {layers} layers of the base's text encoder")
    ids = torch.tensor([chunk.ids for chunk in rows], device=base.device)
    with inserted(encoder, rows):
        out = encoder(ids, output_hidden_states=True)
    if normed and clip_skip == 1:
        states = out.last_hidden_state
    else:
        states = out.hidden_states[-clip_skip]
        states = encoder.final_layer_norm(states) if normed else states
    weights = torch.tensor([chunk.weights for chunk in rows], device=states.device)
    return weighted(states, weights), out


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """``states [n, L, d]`` by ``weights [n, L]``, with each row's mean brought back; rows with weights of 1 keep their bits."""
    touched = (weights != 1).any(1)
    if not bool(touched.any()):
        return states
    plain, factors = states[touched].float(), weights[touched].float()
    scaled = plain * factors[..., None]
    mean, new = plain.mean((1, 2)), scaled.mean((1, 2))
    low = 1 / factors.amax(1).clamp(min=1)
    high = 1 / factors.amin(1).clamp(min=1 / LARGEST_FACTOR, max=1)
    quotient = torch.where(new == 0, 1.0, mean / new)
    telling = mean.abs() > LEAST_MEAN * plain.std((1, 2))
    back = torch.where(telling, quotient.clamp(low, high), 1.0)[:, None, None]
    result = states.clone()
    result[touched] = (scaled * back).to(states.dtype)
    return result


@contextmanager
def inserted(encoder: Any, rows: Sequence[Chunk]) -> Iterator[None]:
    """Meanwhile the learnt vectors of ``rows`` stand in their columns, in place of the placeholders' own.

    Raises:
        WrongBaseError: vectors of another width.
    """
    spots = [(row, column, vectors) for row, chunk in enumerate(rows) for column, vectors in chunk.vectors.items()]
    if not spots:
        yield
        return
    table = encoder.get_input_embeddings()
    width = table.weight.shape[1]
    odd = next((vectors for _, _, vectors in spots if vectors.shape[1] != width), None)
    if odd is not None:
        raise WrongBaseError(
            f"an embedding of the request has vectors of {odd.shape[1]} numbers, but the base's text encoder has {width}: "
            "it was made for another model family"
        )

    def insert(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        out = out.clone()
        for row, column, vectors in spots:
            out[row, column : column + len(vectors)] = vectors.to(out)
        return out

    handle = table.register_forward_hook(insert)
    try:
        yield
    finally:
        handle.remove()


def added_conditions(base: Base, encoded: Encoded, size: tuple[int, int]) -> dict[str, Tensor] | None:
    """SDXL's extra conditions of a picture of ``size`` (width, height): pooled text and (original, crop, target) sizes."""
    if encoded.pooled is None:
        return None
    width, height = size
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=encoded.pooled.dtype, device=encoded.pooled.device)
    return {"text_embeds": encoded.pooled, "time_ids": ids.expand(len(encoded.pooled), -1)}
