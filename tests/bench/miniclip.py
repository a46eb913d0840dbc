"""MiniCLIP: a small picture tower and a small caption tower trained together on renders of a split of its own.

It gives picture and text features that share nothing with the base model's text encoder or with the judge's templates: for
scores like CLIP-T and CLIP-I on this small world. Words are whole words of the captions; the picture tower is a small CNN.

    python -m tests.bench.miniclip --minutes 6 --out outputs/miniclip.safetensors
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from studio.art.atlas import STYLES, concepts
from studio.art.backgrounds import BASE, HELDOUT, PHRASES
from studio.art.captions import caption
from studio.art.scenes import Scene, mirrored, render, sample_scene
from studio.errors import FileError

WIDTH = 128
"""Feature size of both towers."""
LENGTH = 24
WORD = re.compile(r"[a-z0-9']+")
SPLIT_SEED = 90_210
"""Scenes for MiniCLIP are drawn from random streams no other training or measurement uses."""
MAX_BYTES = 2_000_000


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, concept names and synonyms included; index 0 pads, 1 stands for unknown words."""
    texts = [*PHRASES.values(), "a an of on the left right center and", *(p for phrases in STYLES.values() for p in phrases)]
    for concept in concepts().values():
        texts += [concept.name, concept.class_word, *concept.synonyms]
    return ("<pad>", "<unknown>", *sorted({word for text in texts for word in words(text)}))


class Block(nn.Module):
    """Residual block: two 3x3 convolutions with GroupNorm; halves the picture when ``stride`` is 2."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, out), nn.GroupNorm(8, out)])
        self.skip = nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(h)) + self.skip(x))


class MiniClip(nn.Module):
    """``image(pixels [B, 3, 64, 64] in 0..1)`` and ``text(captions)`` -> unit features ``[B, 128]``."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self._index = {word: i for i, word in enumerate(self.vocabulary)}
        self.stem = nn.Conv2d(3, 24, 5, 2, 2)
        self.blocks = nn.Sequential(Block(24, 48, 2), Block(48, 96, 2), Block(96, 128, 1))
        self.picture_out = nn.Linear(128 * 6, WIDTH)
        self.words = nn.Embedding(len(self.vocabulary), 64, padding_idx=0)
        self.places = nn.Parameter(torch.randn(LENGTH, 64) * 0.02)
        self.mixer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.text_out = nn.Linear(64, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(2.7))

    def image(self, pixels: Tensor) -> Tensor:
        features = self.blocks(F.silu(self.stem(pixels * 2 - 1)))
        thirds = F.adaptive_avg_pool2d(features, (1, 3)).flatten(1)
        peaks = F.adaptive_max_pool2d(features, (1, 3)).flatten(1)
        return F.normalize(self.picture_out(torch.cat([thirds, peaks], 1)), dim=1)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(captions), LENGTH, dtype=torch.long)
        for row, text in zip(rows, captions, strict=True):
            ids = [self._index.get(word, 1) for word in words(text)][:LENGTH] or [1]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def text(self, captions: Sequence[str]) -> Tensor:
        tokens = self.tokens(captions)
        empty = tokens == 0
        mixed = self.mixer(self.words(tokens) + self.places, src_key_padding_mask=empty)
        kept = (~empty)[..., None].float()
        return F.normalize(self.text_out((mixed * kept).sum(1) / kept.sum(1)), dim=1)


def contrastive(pictures: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over a batch of matching rows of unit features."""
    logits = pictures @ texts.T * log_scale.clamp(max=4.6).exp()
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def batch_of(step: int, size: int, part: str = "train") -> tuple[Tensor, list[str]]:
    """Pictures ``[B, 3, 64, 64]`` in 0..1 and captions that use every concept's own name. ``part``: ``train`` or ``test``.

    Three training batches of four hold single subjects in one style on one background: only the subjects tell them apart,
    which is what background and style would otherwise spare the towers from learning.
    """
    rng = np.random.default_rng([SPLIT_SEED, {"train": 0, "test": 1}[part], step])
    names = tuple(concepts())
    alike = part == "train" and step % 4 > 0
    places = [str(rng.choice(BASE + HELDOUT))] if alike else BASE + HELDOUT
    styles = [str(rng.choice(list(STYLES)))] if alike else tuple(STYLES)
    pictures, texts = [], []
    for i in range(size):
        scene = _scene(rng, names, 1 if alike else 1 + i % 2, places, styles)
        pictures.append(render(scene).image)
        texts.append(caption(scene, rng, nouns={name: name for name in names}))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, texts


def _scene(
    rng: np.random.Generator, names: Sequence[str], count: int, backgrounds: Sequence[str], styles: Sequence[str]
) -> Scene:
    scene = sample_scene(rng, [str(x) for x in rng.choice(names, count, replace=False)], backgrounds, styles)
    return mirrored(scene) if rng.random() < 0.5 else scene


def train(
    minutes: float, batch: int = 96, rate: float = 2e-3, seed: int = 0, steps: int | None = None
) -> tuple[MiniClip, list[float]]:
    """Train for ``minutes`` (or ``steps``) with a falling rate; returns the model and the loss of every step."""
    torch.manual_seed(seed)
    model = MiniClip(vocabulary())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    losses: list[float] = []
    start = time.monotonic()
    while True:
        spent = len(losses) / steps if steps else (time.monotonic() - start) / (60 * minutes)
        if spent >= 1:
            return model.eval(), losses
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (len(losses) + 1) / 50) * (1 + np.cos(np.pi * spent)) / 2
        pictures, texts = batch_of(len(losses), batch)
        loss = contrastive(model.image(pictures), model.text(texts), model.log_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}, loss {np.mean(losses[-50:]):.3f}", flush=True)


@torch.no_grad()
def retrieval(model: MiniClip, size: int = 100, batches: int = 3) -> float:
    """Share of test pictures whose own caption is the nearest of ``size``."""
    hits = []
    for step in range(batches):
        pictures, texts = batch_of(step, size, "test")
        hits.append((model.image(pictures) @ model.text(texts).T).argmax(1) == torch.arange(size))
    return float(torch.cat(hits).float().mean())


def save(model: MiniClip, path: Path) -> None:
    """Write weights in half precision with the vocabulary beside them in the file's metadata; at most 2 MB."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"vocabulary": json.dumps(model.vocabulary)})


def load(path: Path) -> MiniClip:
    """Read what :func:`save` wrote.

    Raises:
        FileError: not such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, tensors = file.metadata() or {}, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - a handle, not a dict
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read MiniCLIP weights from {path}: {error}") from error
    if "vocabulary" not in facts:
        raise FileError(f"{path} holds no MiniCLIP vocabulary: make it with python -m tests.bench.miniclip")
    model = MiniClip(json.loads(facts["vocabulary"]))
    model.load_state_dict(tensors)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model, losses = train(given.minutes, given.batch, seed=given.seed)
    save(model, given.out)
    print(f"{len(losses)} steps, {given.out.stat().st_size / 1e6:.2f} MB, own caption nearest of 100: {retrieval(model):.3f}")


if __name__ == "__main__":
    main()
