"""The text side of the embedded base, trained before the UNet.

A denoiser learns pixels long before it learns words, so words come first. The encoder is trained by what the UNet will
ask of it: a small *sketcher* whose 8 x 8 queries cross-attend to the token states, like a UNet's, draws the 16 x 16
thumbnail of the scene; linear heads read subject and style on each side and the background from the pooled state; and
the pooled state of bare words is drawn towards a sentence encoder's (:mod:`training.base.words`). The sketcher and the
heads are thrown away.

Why not a contrastive image tower, as CLIP's: the thumbnail carries the same visual likeness, costs less, and trains the
*token* states and the binding of places to nouns, which a pooled contrast never touches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from studio.art.atlas import STYLES, concepts
from studio.art.backgrounds import BASE
from studio.art.scenes import place_of, render
from studio.paths import assets
from training.base import words
from training.base.data import Mixture, sample
from training.base.tokenizer import CONTEXT

WIDTH = 192
THUMBNAIL = 16
GRID = 8
IGNORE = -100


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The committed tokenizer. Rebuilding it would reorder words of equal frequency and silently unlearn them."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(assets() / "base" / "tokenizer", local_files_only=True)


def build(vocabulary: int, bos: int, eos: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=CONTEXT, projection_dim=WIDTH, hidden_act="gelu", bos_token_id=bos, eos_token_id=eos,
            pad_token_id=eos,
        )
    )  # fmt: skip


class Batch(NamedTuple):
    """``ids [B, L]``; ``thumbnails [B, 3, 16, 16]`` in -1..1; labels ``[B]`` with :data:`IGNORE` where unnamed; word
    ``ids`` and vectors."""

    ids: Tensor
    thumbnails: Tensor
    labels: dict[str, Tensor]
    word_ids: Tensor
    word_vectors: Tensor


class Sketcher(nn.Module):
    """Token states ``[B, L, WIDTH]`` to a thumbnail, by two layers of cross-attention from learned places."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(GRID * GRID, width) * 0.1)
        self.context = nn.Linear(WIDTH, width)
        self.attend = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        cell = THUMBNAIL // GRID
        self.out = nn.Linear(width, 3 * cell * cell)

    def forward(self, states: Tensor) -> Tensor:
        x = self.places.expand(states.shape[0], -1, -1)
        keys = self.context(states)
        for attend, feed, norm in zip(self.attend, self.feed, self.norms, strict=True):
            x = x + attend(norm(x), keys, keys, need_weights=False)[0]
            x = x + feed(x)
        cells = self.out(x).transpose(1, 2).unflatten(2, (GRID, GRID))
        return F.pixel_shuffle(cells, THUMBNAIL // GRID)


class Objective(nn.Module):
    def __init__(self, text: CLIPTextModel) -> None:
        super().__init__()
        self.text = text
        self.sketcher = Sketcher()
        self.heads = nn.ModuleDict({k: nn.Linear(WIDTH, n) for k, n in head_sizes().items()})
        self.meaning = nn.Linear(WIDTH, words.WIDTH)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out = self.text(batch.ids)
        sketch = F.mse_loss(self.sketcher(out.last_hidden_state), batch.thumbnails)
        read = [
            F.cross_entropy(head(out.pooler_output), batch.labels[k], ignore_index=IGNORE) for k, head in self.heads.items()
        ]
        heads = torch.stack([x for x in read if torch.isfinite(x)]).mean()
        means = self.meaning(self.text(batch.word_ids).pooler_output)
        meaning = (1 - F.cosine_similarity(means, batch.word_vectors)).mean()
        return {"loss": 4 * sketch + 0.2 * heads + 0.2 * meaning, "sketch": sketch, "heads": heads, "meaning": meaning}


def head_sizes() -> dict[str, int]:
    slots = {f"{place}_subject": len(concepts()) for place in ("left", "center", "right")}
    return {**slots, "style": len(STYLES), "background": len(BASE)}


def batch_at(step: int, rank: int, size: int, mixture: Mixture) -> Batch:
    """Scenes, their captions and thumbnails, and a handful of bare words, all from the step's number."""
    rng = np.random.default_rng([21, step, rank])
    styles, backgrounds = list(STYLES), list(BASE)
    labels = {k: np.full(size, IGNORE) for k in head_sizes()}
    texts, thumbnails = [], np.empty((size, THUMBNAIL, THUMBNAIL, 3), np.float32)
    for i in range(size):
        scene, text = sample(rng, mixture)
        texts.append(text)
        thumbnails[i] = cv2.resize(render(scene).image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        for item in scene.items:
            labels[f"{place_of(item, scene.side)}_subject"][i] = concepts()[item.concept].index
        if scene.look is None:  # a look hides both
            labels["style"][i] = styles.index(scene.items[0].style)
            labels["background"][i] = backgrounds.index(scene.background)
    phrases, vectors = words.load()
    picked = rng.integers(0, len(phrases), size // 2)
    bare = [f"{rng.choice(['', 'a ', 'the '])}{phrases[p]}" for p in picked]
    encode = lambda t: tokenizer()(t, padding=True, truncation=True, return_tensors="pt").input_ids  # noqa: E731
    return Batch(
        encode(texts),
        torch.from_numpy(thumbnails).permute(0, 3, 1, 2) / 127.5 - 1,
        {k: torch.from_numpy(v) for k, v in labels.items()},
        encode(bare),
        torch.from_numpy(vectors[picked]),
    )


@torch.no_grad()
def scores(objective: Objective, mixture: Mixture, count: int = 512, seed: int = 9) -> dict[str, float]:
    """Accuracy of each head on fresh captions of named concepts, otherwise mixed as in ``mixture``."""
    batch = batch_at(seed, 999, count, replace(mixture, named_a=0.5, named_b=0.5, drop=0.0))
    pooled = objective.text(batch.ids).pooler_output
    out = {}
    for name, head in objective.heads.items():
        known = batch.labels[name] != IGNORE
        out[name] = float((head(pooled).argmax(1) == batch.labels[name])[known].float().mean())
    return out
