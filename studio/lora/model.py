"""What a LoRA is once read, whatever trainer wrote it: weight deltas by module name.

Keys are ``unet.<path>``, ``text_encoder.<path>`` or ``text_encoder_2.<path>`` with diffusers' UNet module names and the flat
text-encoder names of transformers 5. A delta never knows how it is applied; that is ``compose.bank``'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """``dW = alpha / r * up @ down`` (Hu et al., 2021, eq. 3); with ``magnitude``, DoRA (Liu et al., 2024, eq. 5).

    Args:
        down: ``[r, in]``, or ``[r, in, kh, kw]`` for a convolution.
        up: ``[out, r]``, or ``[out, r, 1, 1]``.
        alpha: numerator of the scale; equals the rank when a file names none.
        magnitude: DoRA's ``m``, ``[out]``: the norm of each output channel of ``W + dW``.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class LohaDelta:
    """``dW = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)``, a Hadamard product (FedPara, Hyeon-Woo et al., 2022).

    ``w*_a [out, r]``, ``w*_b [r, in * kh * kw]``; with Tucker cores ``t1, t2 [r, r, kh, kw]`` for convolutions, where
    ``w*_b`` is ``[r, in]``.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class LokrDelta:
    """``dW = scale * kron(w1, w2)`` (LyCORIS LoKr); ``w1``/``w2`` are given whole, already multiplied out of their low-rank
    parts.

    ``scale`` is ``alpha / r`` when a part was low-rank, else 1.
    """

    w1: Tensor
    w2: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class DoraDelta:
    """DoRA in the forms :class:`LoraDelta` cannot hold: over a LoHa or LoKr, or with the norm taken per *input* channel, as
    early LyCORIS did.

    ``dW = m * V / |V| - W`` with ``V = W + dW_inner`` and ``|V|`` over all axes but ``axis``. Needs ``W``: see ``dense``.

    Args:
        inner: the delta before the decomposition, without a magnitude of its own.
        magnitude: ``m``, ``[out]`` for axis 0, ``[in]`` for axis 1.
        axis: the axis of ``W`` that ``m`` runs along.
    """

    inner: LoraDelta | LohaDelta | LokrDelta
    magnitude: Tensor
    axis: int


Delta = LoraDelta | LohaDelta | LokrDelta | DoraDelta


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter. ``source`` is the file it came from; ``sha256`` of that file identifies it whatever its name.

    ``tokens`` are learnt vectors in place of a word of the prompt, by that word and by text encoder: ``[n, d]``, or
    ``[layers, n, d]`` with one reading for every cross-attention layer (:mod:`studio.embeddings`).
    """

    layers: Mapping[str, Delta]
    metadata: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None
    sha256: str = ""
    tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def trigger(self) -> str:
        return self.metadata.get("studio.trigger", "")

    @property
    def class_word(self) -> str:
        return self.metadata.get("studio.class_word", "")

    @property
    def is_style(self) -> bool:
        """Whether it was taught a style, which has no place of its own in a picture."""
        return self.metadata.get("studio.kind") == "style"

    @property
    def called(self) -> str:
        """How a prompt calls what it was taught: "trigger class", or what is known of it; "" when nothing is."""
        words = self.trigger.lower().split()
        return self.trigger if self.class_word.lower() in words else f"{self.trigger} {self.class_word}".strip()
