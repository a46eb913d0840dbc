"""The VAE of the embedded base: factor 4, trained on dense crops of art first, then on whole scenes.

Loss: L1 in a luma/chroma space with chroma weighted (small objects otherwise come back brown), L1 of the pixel gradients, and a
light KL. GroupNorm with one channel a group destroys flat colours, so the groups are few.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from studio.art.atlas import STYLES, splits
from studio.art.backgrounds import BASE
from studio.art.scenes import Placement, Scene, render, sample_scene
from training.base.data import random_look

CROP = 32
CHROMA = 2.5
GRADIENT = 0.5
KL = 1e-6


def build(latent_channels: int = 8) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def luma_chroma(rgb: Tensor) -> Tensor:
    """RGB ``[B, 3, H, W]`` to (luma, red difference, blue difference), chroma weighted by :data:`CHROMA`."""
    red, green, blue = rgb.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luma, CHROMA * 0.5 * (red - luma), CHROMA * 0.5 * (blue - luma)], 1)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


class Objective(nn.Module):
    """Reconstruction and KL of one batch of pictures ``[B, 3, H, W]`` in -1..1."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        target, output = luma_chroma(pixels), luma_chroma(decoded)
        l1 = F.l1_loss(output, target)
        edge = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(target), strict=True))
        kl = posterior.kl().mean()
        mse = F.mse_loss(decoded.detach(), pixels)
        return {"loss": l1 + GRADIENT * edge + KL * kl, "l1": l1, "mse": mse, "kl": kl}


def seen() -> tuple[str, ...]:
    return splits().named + splits().class_seen


def dense_canvas(rng: np.random.Generator, side: int = 64, looks: float = 0.0) -> np.ndarray:
    """A canvas crowded with sprites of all sizes: most of its pixels are art. ``looks``: share of canvases in a look."""
    names, styles = seen(), tuple(STYLES)
    items = tuple(
        Placement(
            str(names[rng.integers(len(names))]), styles[rng.integers(len(styles))],
            float(rng.uniform(0, side)), float(rng.uniform(0, side)), int(rng.integers(18, 35)), bool(rng.random() < 0.5),
        )
        for _ in range(12)
    )  # fmt: skip
    return render(Scene(items, str(rng.choice(list(BASE))), random_look(rng, looks), side)).image


@lru_cache(maxsize=1)
def canvases(count: int = 12_000, seed: int = 1, looks: float = 0.0) -> np.ndarray:
    """Dense canvases and a third of ordinary scenes, ``[count, 64, 64, 3]`` uint8; a share of both in a look."""
    rng = np.random.default_rng(seed)
    names = seen()
    out = np.empty((count, 64, 64, 3), np.uint8)
    for i in range(count):
        if i % 3:
            out[i] = dense_canvas(rng, looks=looks)
        else:
            picked = [str(x) for x in rng.choice(names, int(rng.integers(1, 3)), replace=False)]
            out[i] = render(sample_scene(rng, picked, BASE, look=random_look(rng, looks))).image
    return out


def batch_at(step: int, rank: int, size: int, crop: int, looks: float = 0.0) -> Tensor:
    """Random crops with flips, and in a quarter of them permuted colour channels, so that colours generalise."""
    rng = np.random.default_rng([11, step, rank])
    data = canvases(looks=looks)
    pool = len(data)
    out = np.empty((size, crop, crop, 3), np.uint8)
    for i in range(size):
        y, x = rng.integers(0, 64 - crop + 1, 2)
        picture = data[rng.integers(pool), y : y + crop, x : x + crop]
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        if rng.random() < 0.25:
            picture = picture[..., rng.permutation(3)]
        out[i] = picture
    return torch.from_numpy(out).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def scores(vae: AutoencoderKL, count: int = 200, seed: int = 99, names: tuple[str, ...] | None = None) -> dict[str, float]:
    """PSNR in dB over whole scenes and over object pixels, and the standard deviation of the latents."""
    rng = np.random.default_rng(seed)
    names = names or splits().named
    rendered = [
        render(sample_scene(rng, [str(x) for x in rng.choice(names, 1 + i % 2, replace=False)], BASE)) for i in range(count)
    ]
    pixels = torch.from_numpy(np.stack([r.image for r in rendered])).permute(0, 3, 1, 2).float() / 127.5 - 1
    mask = torch.from_numpy(np.stack([sum(r.masks) for r in rendered])) > 0.5
    latents = vae.encode(pixels).latent_dist.mode()
    error = (vae.decode(latents).sample.clamp(-1, 1) - pixels).square().mean(1)
    psnr = [float(10 * torch.log10(4 / e.mean())) for e in (error, error[mask])]
    return {"scenes": psnr[0], "objects": psnr[1], "std": float(latents.std())}
