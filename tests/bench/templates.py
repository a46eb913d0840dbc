"""The bank of sprites the judge compares pictures with: every concept, art style and look at five log-spaced sizes.

A template is a square window: the sprite in its middle, two pixels of margin around it. It is kept as straight-alpha RGBA; what
it looks like in a picture follows from the background there. With a ``roundtrip`` (the shipped VAE) the colours are those that
come back from encoding and decoding the sprite on mid grey, so that softness the VAE adds to every picture costs no score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from studio.art import atlas, looks
from studio.art.atlas import STYLES, atlas_dir, concepts, known, sized
from studio.art.looks import apply_look
from studio.files import whole
from studio.hashes import cache_folder

SIZES = (22, 24, 27, 29, 32)
"""Longer sides of the templates in pixels, log-spaced around the trained 24..30."""
COARSE = (2,)
"""Indices into :data:`SIZES` that the coarse search uses: the middle one is as good as two. The exact search tries all."""
PAD = 2
"""Margin of a template window around the sprite, in pixels: its ring shows the silhouette."""
RING = 0.5
"""Weight of a ring pixel, against 1 for a pixel of the sprite."""
COARSE_RANK = 128
"""Principal components kept of the coarse colour templates; of the coarse weights half as many."""
GREY = 0.5
TWIN = 0.9
"""Two drawings whose templates correlate above this count as one."""

Drawing = tuple[str, str]
"""``(concept, style)``."""
RoundTrip = Callable[[Tensor], Tensor]
"""Pictures ``[B, 3, H, W]`` in 0..1 through the VAE and back, same shape and range."""


class AutoEncoder(Protocol):
    """The part of ``AutoencoderKL`` used here."""

    def encode(self, x: Tensor) -> object: ...

    def decode(self, z: Tensor) -> object: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class VaeRoundTrip:
    """Encoding (mode) and decoding by a VAE, for pictures in 0..1; ``digest`` tells its weights from any others."""

    vae: AutoEncoder

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        latents = self.vae.encode(pictures * 2 - 1).latent_dist.mode()  # type: ignore[attr-defined]
        decoded: Tensor = self.vae.decode(latents).sample  # type: ignore[attr-defined]
        return (decoded / 2 + 0.5).clamp(0, 1)

    @cached_property
    def digest(self) -> str:
        found = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().float().cpu().numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True, order=True)
class Key:
    """What a template shows: a concept in an art style, redrawn in ``look`` when given."""

    concept: str
    style: str
    look: str | None = None


@dataclass(frozen=True)
class CoarseBank:
    """Half-resolution templates of one size, compressed by principal components.

    With ``T`` the colour, ``a`` the alpha and ``w`` the matching weight: ``colour [q, K]`` is ``a T`` on ``colour_basis
    [3nn, q]``, ``tinted`` is ``a^2 T`` on ``energy_basis``, ``alpha, alpha_squared, weight [p, K]`` are ``a, a^2, w`` on
    ``weight_basis [nn, p]``, and ``energy [K]`` is ``sum a^2 T^2``.
    """

    side: int
    colour_basis: Tensor
    colour: Tensor
    energy_basis: Tensor
    tinted: Tensor
    weight_basis: Tensor
    alpha: Tensor
    alpha_squared: Tensor
    weight: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Bank:
    """Templates of all ``keys``: per size ``[K, N, N, 4]`` uint8 (straight alpha) and matching weights ``[K, N, N]`` uint8."""

    keys: tuple[Key, ...]
    rgba: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    coarse: tuple[CoarseBank, ...]
    equivalents: dict[Drawing, frozenset[Drawing]] = field(default_factory=dict)

    @cached_property
    def index(self) -> dict[Key, int]:
        return {key: i for i, key in enumerate(self.keys)}

    def same(self, one: Key, other: Key) -> bool:
        """Whether two keys show one drawing (near-identical, or mirror images) in the same look."""
        if one.look != other.look:
            return False
        twins = self.equivalents.get((one.concept, one.style), frozenset())
        return one == other or (other.concept, other.style) in twins


def window_side(size: int) -> int:
    """Side of the template window of a sprite ``size`` pixels long; even, so that it halves."""
    return size + 2 * PAD + size % 2


def make_keys(
    names: Iterable[str] | None = None, styles: Sequence[str] = tuple(STYLES), looks: Sequence[str | None] = (None,)
) -> tuple[Key, ...]:
    """Keys of the whole atlas, or of ``names`` only."""
    picked = list(concepts()) if names is None else [known(name, concepts(), "concept") for name in names]
    return tuple(Key(name, style, look) for look in looks for style in styles for name in dict.fromkeys(picked))


def template(key: Key, size: int) -> np.ndarray:
    """The sprite of ``key`` in the middle of its window, ``[N, N, 4]`` uint8."""
    art = sized(key.concept, key.style, size)
    if key.look:
        art = apply_look(key.look, art)
    side = window_side(size)
    out = np.zeros((side, side, 4), np.uint8)
    height, width = art.shape[:2]
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = art
    return out


def build_bank(keys: Sequence[Key], roundtrip: RoundTrip | None = None, group: bool = True, cache: Path | None = None) -> Bank:
    """Draw every template of ``keys``; the whole atlas takes half a minute of one core, with a VAE a minute and a half.

    Templates that went through a :class:`VaeRoundTrip` are kept in the folder ``cache`` (default: :func:`default_cache`), one
    file of 30 MB or less for a VAE, an atlas and a set of keys.
    """
    if isinstance(roundtrip, VaeRoundTrip):
        rgba, twins = _cached(keys, roundtrip, group, cache or default_cache())
    else:
        rgba, twins = _made(keys, roundtrip, group)
    weights = [matching_weight(drawn[..., 3]) for drawn in rgba]
    coarse = tuple(compress(rgba[i], weights[i]) for i in COARSE)
    return Bank(tuple(keys), tuple(rgba), tuple(weights), coarse, twins)


Twins = dict[Drawing, frozenset[Drawing]]


def _made(keys: Sequence[Key], roundtrip: RoundTrip | None, group: bool) -> tuple[list[Tensor], Twins]:
    """Templates of all sizes and the drawings one cannot tell apart."""
    rgba = [torch.from_numpy(np.stack([template(key, size) for key in keys])) for size in SIZES]
    twins = equivalents(keys) if group else {}
    return rgba if roundtrip is None else [through(part, roundtrip) for part in rgba], twins


def default_cache() -> Path:
    """Where banks are kept: ``judge`` in the user's cache folder of this product. May be deleted at any time."""
    return cache_folder() / "judge"


def _cached(keys: Sequence[Key], roundtrip: VaeRoundTrip, group: bool, folder: Path) -> tuple[list[Tensor], Twins]:
    """:func:`_made`, from ``folder`` when what this VAE makes of this atlas is there."""
    digest = hashlib.sha256(repr((roundtrip.digest, atlas_digest(), keys, group)).encode()).hexdigest()
    path = folder / f"bank-{digest[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            pairs = json.loads(str(kept["twins"]))
            return [torch.from_numpy(kept[str(size)]) for size in SIZES], {
                (a, b): frozenset((c, d) for c, d in others) for (a, b), others in pairs
            }
    rgba, twins = _made(keys, roundtrip, group)
    parts = {str(size): part.numpy() for size, part in zip(SIZES, rgba, strict=True)}
    parts["twins"] = np.array(json.dumps([(one, sorted(others)) for one, others in sorted(twins.items())]))
    with whole(path) as fresh, fresh.open("wb") as stream:
        np.savez_compressed(stream, **parts)  # type: ignore[arg-type]
    return rgba, twins


@lru_cache(maxsize=1)
def atlas_digest() -> str:
    """SHA-256 of the committed art and of the code that draws templates from it."""
    art = [path for path in sorted(atlas_dir().iterdir()) if path.suffix in {".webp", ".json"}]
    code = [Path(str(module)) for module in (atlas.__file__, looks.__file__, __file__)]
    found = hashlib.sha256()
    for path in (*art, *code):
        found.update(path.read_bytes())
    return found.hexdigest()


@torch.no_grad()
def through(rgba: Tensor, roundtrip: RoundTrip, tiles: int = 3, batch: int = 16) -> Tensor:
    """Replace colours of ``[K, N, N, 4]`` uint8 by those that survive the VAE on mid grey; alpha stays.

    ``tiles x tiles`` templates share one picture.
    """
    count, side = rgba.shape[:2]
    pitch = -(-(side + 4) // 8) * 8
    per = tiles * tiles
    alpha = rgba[..., 3:].float() / 255
    flat = alpha * rgba[..., :3] / 255 + (1 - alpha) * GREY
    out = rgba.clone()
    for start in range(0, count, per * batch):
        chunk = flat[start : start + per * batch]
        pictures = torch.full((-(-len(chunk) // per), 3, pitch * tiles, pitch * tiles), GREY)
        spots = [(i // per, i % per // tiles * pitch, i % tiles * pitch) for i in range(len(chunk))]
        for tile, (picture, y, x) in zip(chunk, spots, strict=True):
            pictures[picture, :, y : y + side, x : x + side] = tile.permute(2, 0, 1)
        back = roundtrip(pictures).clamp(0, 1)
        for i, (picture, y, x) in enumerate(spots):
            tile = back[picture, :, y : y + side, x : x + side].permute(1, 2, 0)
            out[start + i, ..., :3] = (straight(tile, alpha[start + i]) * 255).round().to(torch.uint8)
    return out


def straight(flat: Tensor, alpha: Tensor) -> Tensor:
    """Undo compositing over mid grey where the sprite covers enough of a pixel: ``C = a T + (1 - a) g`` solved for ``T``."""
    solved = (flat - (1 - alpha) * GREY) / alpha.clamp_min(0.3)
    return torch.where(alpha > 0.3, solved, flat).clamp(0, 1)


def matching_weight(alpha: Tensor) -> Tensor:
    """``[K, N, N]`` uint8 alpha to weights: alpha itself, and :data:`RING` in a ring of two pixels around it."""
    ring = F.max_pool2d((alpha > 127).float()[:, None], 5, 1, 2)[:, 0] * (255 * RING)
    return torch.maximum(alpha.float(), ring).round().to(torch.uint8)


def halve(x: Tensor) -> Tensor:
    """Mean of 2x2 blocks of ``[B, H, W, C]`` or ``[B, H, W]``."""
    if x.ndim == 3:
        return F.avg_pool2d(x[:, None], 2)[:, 0]
    return F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def compress(rgba: Tensor, weights: Tensor) -> CoarseBank:
    """Half-resolution, principal-component form of the templates of one size."""
    alpha = halve(rgba[..., 3].float() / 255)
    colour = halve(rgba[..., :3].float() * rgba[..., 3:] / 255**2)
    weight = halve(weights.float() / 255)
    side = alpha.shape[1]
    colours, tints = colour.flatten(1), (colour * alpha[..., None]).flatten(1)
    shapes = [x.flatten(1) for x in (alpha, alpha.square(), weight)]
    colour_basis, energy_basis = principal(colours, COARSE_RANK), principal(tints, COARSE_RANK)
    weight_basis = principal(torch.cat(shapes), COARSE_RANK // 2)
    plain, squared, matching = (weight_basis.T @ shape.T for shape in shapes)
    return CoarseBank(
        side=side,
        colour_basis=colour_basis,
        colour=colour_basis.T @ colours.T,
        energy_basis=energy_basis,
        tinted=energy_basis.T @ tints.T,
        weight_basis=weight_basis,
        alpha=plain,
        alpha_squared=squared,
        weight=matching,
        energy=colours.square().sum(1),
    )


def principal(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal basis ``[D, q]`` of the ``q <= rank`` strongest (uncentred) directions of ``rows [K, D]``."""
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, -min(rank, rows.shape[1]) :].contiguous()


def correlations(rgba: Tensor) -> Tensor:
    """``[K, K]``: how alike two sprites look, the lowest over white, grey and blue paper, the higher of plain and mirrored.

    ``rgba [K, N, N, 4]`` uint8. Zero-mean per channel over the whole window.
    """
    alpha = rgba[..., 3:].float() / 255
    alike = torch.full((len(rgba), len(rgba)), 1.0)
    for paper in ((0.98, 0.98, 0.98), (0.5, 0.5, 0.5), (0.3, 0.5, 0.9)):
        flat = alpha * rgba[..., :3].float() / 255 + (1 - alpha) * torch.tensor(paper)
        flat = flat - flat.mean((1, 2), keepdim=True)
        unit, turned = (F.normalize(x.flatten(1), dim=1) for x in (flat, flat.flip(2)))
        alike = torch.minimum(alike, torch.maximum(unit @ unit.T, unit @ turned.T))
    return alike


def equivalents(keys: Sequence[Key], threshold: float = TWIN, size: int = 28) -> dict[Drawing, frozenset[Drawing]]:
    """Each drawing -> the drawings one cannot tell from it: template correlation above ``threshold``.

    Compared are all concepts of one style, and all styles of one concept.
    """
    drawings = list(dict.fromkeys((key.concept, key.style) for key in keys))
    art = torch.from_numpy(np.stack([template(Key(*drawing), size) for drawing in drawings]))
    twins: dict[Drawing, set[Drawing]] = {}
    for attribute in (1, 0):
        for value in dict.fromkeys(drawing[attribute] for drawing in drawings):
            among = [i for i, drawing in enumerate(drawings) if drawing[attribute] == value]
            for a, b in torch.nonzero(correlations(art[among]) > threshold).tolist():
                if a != b:
                    twins.setdefault(drawings[among[a]], set()).add(drawings[among[b]])
    return {drawing: frozenset(others) for drawing, others in twins.items()}


def groups(twins: dict[Drawing, frozenset[Drawing]]) -> list[tuple[Drawing, ...]]:
    """Connected groups of equivalent drawings, for the report."""
    left, out = set(twins), []
    while left:
        group: set[Drawing] = set()
        edge = {min(left)}
        while edge:
            group |= edge
            edge = {other for drawing in edge for other in twins[drawing]} - group
        left -= group
        out.append(tuple(sorted(group)))
    return sorted(out)
