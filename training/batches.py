"""From pictures and captions to what one training step needs; every batch is a pure function of (seed, batch number)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from training.dataset import BatchPlan, Picture, bucket_of, pixels, swap_sides
from training.losses import Levels, stratified_timesteps
from training.masks import mask_pixels
from training.text import Reader

if TYPE_CHECKING:
    from compose.text import Encoded
    from studio.base import Base

DATA, PRIOR = 2, 3
"""Streams of random numbers, beside 1 for the order of pictures."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of one forward. ``latents, noise [B, C, h, w]``; ``t [B]``; ``captions`` index the run's :class:`Captions`;
    ``masks [B, 1, h, w]``, 0..1, of what is learnt, where there are any."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    captions: Tensor
    masks: Tensor | None = None


def stream(seed: int, kind: int, index: int) -> torch.Generator:
    """Random numbers of batch ``index``, the same on every machine and after every resume."""
    value = np.random.SeedSequence([seed, kind, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(value & np.uint64(2**63 - 1)))


class Captions:
    """Every caption of a run by number, and the frozen encoder's states, computed once when they are kept.

    Args:
        chunks: chunks of the text encoder that every caption is read in.
    """

    def __init__(self, base: Base, keep: bool, clip_skip: int = 1, chunks: int = 1) -> None:
        self.keep, self.clip_skip, self.chunks = keep, clip_skip, chunks
        self._reader = Reader(base, clip_skip=clip_skip, count=chunks)
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}
        self._table: Encoded | None = None

    def called(self, rows: Tensor) -> list[str]:
        """The captions that the numbers ``rows`` stand for."""
        return [self.texts[number] for number in rows.tolist()]

    def number(self, text: str) -> int:
        """The number of ``text``, a new one if it is new."""
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]

    def forget(self, count: int) -> None:
        """Leave the first ``count`` captions; the numbers of the others are given anew, since shuffled ones have no end."""
        for text in self.texts[count:]:
            del self._numbers[text]
        del self.texts[count:]

    def warm(self) -> None:
        """Encode every caption known so far; those that come later, such as shuffled ones, are read when they are needed."""
        if self.keep and self._table is None:
            self._table = self._reader.read_frozen(self.texts)

    def states(self, rows: Tensor) -> Encoded:
        """The frozen encoder's states, on the CPU."""
        self.warm()
        if self._table is None or int(rows.max()) >= len(self._table.states):
            return self._reader.read_frozen(self.called(rows))
        return self._table.rows(rows.tolist())


class Latents:
    """Pictures as latents: the VAE's mean and deviation, kept in memory when asked, sampled anew for every batch."""

    def __init__(self, base: Base, pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]], keep: bool) -> None:
        self.base, self.pictures, self.sizes, self.keep = base, pictures, sizes, keep
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._masks: dict[int, Tensor] = {}

    def sample(self, item: int, flipped: bool, generator: torch.Generator) -> Tensor:
        """One latent ``[C, h, w]``, scaled as the UNet expects it."""
        mean, deviation = self._moments(item, flipped)
        config = self.base.vae.config
        value = mean + deviation * torch.randn(mean.shape, generator=generator)
        return (value - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def mask(self, item: int, flipped: bool) -> Tensor:
        """What is learnt of one latent, ``[1, h, w]``: the mean over each cell's pixels."""
        if item not in self._masks:
            fine = mask_pixels(self.pictures[item], self.sizes[item])
            self._masks[item] = avg_pool2d(fine, self.base.latent_factor)
        return self._masks[item].flip(-1) if flipped else self._masks[item]

    @torch.no_grad()
    def _moments(self, item: int, flipped: bool) -> tuple[Tensor, Tensor]:
        key = (item, flipped)
        if key in self._known:
            return self._known[key]
        vae = self.base.vae
        image = pixels(self.pictures[item], self.sizes[item])[None].to(vae.device, vae.dtype)
        spread: Any = vae.encode(image.flip(-1) if flipped else image).latent_dist
        found = (spread.mean[0].float().cpu(), spread.std[0].float().cpu())
        if self.keep:
            self._known[key] = found
        return found


class Source:
    """Batches of one data set.

    Args:
        levels: the timesteps that are drawn.
        unmasked: how much what a mask leaves out counts all the same.
        kept_clauses: those in front of every caption that stay there while the others change places; None: nothing moves.
    """

    def __init__(
        self,
        base: Base,
        pictures: Sequence[Picture],
        texts: Sequence[str],
        captions: Captions,
        *,
        sizes: Sequence[tuple[int, int]],
        batch: int,
        seed: int,
        levels: Levels,
        kind: int = DATA,
        flip: bool = False,
        dropout: float = 0.0,
        noise_offset: float = 0.0,
        unmasked: float = 0.0,
        kept_clauses: int | None = None,
        keep: bool = True,
    ) -> None:
        buckets = [bucket_of(p.width, p.height, sizes) for p in pictures]
        self.plan = BatchPlan(grouped(pictures, buckets), batch, seed)
        self.latents = Latents(base, pictures, buckets, keep)
        self.captions = captions
        self.texts = tuple(texts), tuple(swap_sides(text) for text in texts) if flip else ()
        for text in dict.fromkeys([*self.texts[0], *self.texts[1], *([""] if dropout else ())]):
            captions.number(text)
        self.masked, self.unmasked = any(picture.mask for picture in pictures), unmasked
        self.kept_clauses = kept_clauses
        self.seed, self.kind, self.flip, self.dropout, self.noise_offset = seed, kind, flip, dropout, noise_offset
        self.levels = levels

    def batch(self, index: int) -> Batch:
        """Batch number ``index``, on the CPU."""
        items = self.plan.items(index)
        draw = stream(self.seed, self.kind, index)
        flips = (torch.rand(len(items), generator=draw) < (0.5 if self.flip else 0.0)).tolist()
        drops = (torch.rand(len(items), generator=draw) < self.dropout).tolist()
        t = stratified_timesteps(len(items), self.levels, draw)
        latents = torch.stack([self.latents.sample(i, f, draw) for i, f in zip(items, flips, strict=True)])
        noise = torch.randn(latents.shape, generator=draw)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=draw)
        said = ["" if drop else self.texts[flip][i] for i, flip, drop in zip(items, flips, drops, strict=True)]
        if self.kept_clauses is not None:
            said = [shuffled(text, self.kept_clauses, draw) for text in said]
        masks = None
        if self.masked:
            masks = torch.stack([self.latents.mask(i, f) for i, f in zip(items, flips, strict=True)])
            masks = self.unmasked + (1 - self.unmasked) * masks
        numbers = torch.tensor([self.captions.number(text) for text in said])
        return Batch(latents=latents, noise=noise, t=t, captions=numbers, masks=masks)


def shuffled(caption: str, keep: int, generator: torch.Generator) -> str:
    """The clauses of ``caption``, cut at its commas, in another order; the first ``keep`` stay."""
    clauses = [clause for part in caption.split(",") if (clause := part.strip())]
    order = torch.randperm(max(len(clauses) - keep, 0), generator=generator).tolist()
    return ", ".join([*clauses[:keep], *(clauses[keep + index] for index in order)])


def grouped(pictures: Sequence[Picture], buckets: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Items by bucket, each as often as its repeats: the groups of a :class:`BatchPlan`."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, picture in enumerate(pictures):
        members.setdefault(buckets[index], []).extend([index] * picture.repeats)
    return tuple(tuple(items) for _, items in sorted(members.items()))
