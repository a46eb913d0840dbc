"""The UNet of the embedded base: epsilon prediction with a canvas curriculum.

Stage 1 shows single subjects on a 32 x 32 canvas (8 x 8 latents): a quarter of the cost, and all of what things look
like. Stage 2 goes on with whole 64 x 64 scenes, half of them pairs. VAE and text side are frozen: their outputs are
computed once per pool of scenes.
Loss: mean squared error of epsilon with min-SNR weighting (Hang et al., 2023), gamma = 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from studio.art.scenes import render
from training.base.data import Mixture, sample
from training.base.text import WIDTH, tokenizer
from training.losses import add_noise, min_snr_weights

TRAIN_STEPS = 1000
MIN_SNR = 5.0
DROP_CAPTION = 0.1


def build(latent_channels: int = 8) -> UNet2DConditionModel:
    """8.9 M parameters. ``attention_head_dim`` is, in this class, the *number* of heads a block."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=latent_channels, out_channels=latent_channels, block_out_channels=(64, 128, 192),
        layers_per_block=1, attention_head_dim=(2, 4, 6), cross_attention_dim=WIDTH, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's scaled-linear schedule: betas linear in their square root from .00085 to .012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS) ** 2
    return torch.cumprod(1 - betas, 0)


class Batch(NamedTuple):
    """``latents [B, C, h, w]`` (scaled), ``states [B, 32, 192]``, ``noise`` like latents, ``timesteps [B]``."""

    latents: Tensor
    states: Tensor
    noise: Tensor
    timesteps: Tensor


class Objective(nn.Module):
    """The ``loss`` of one batch, and its ``mse`` without weights, to compare runs by."""

    alphas: Tensor

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("alphas", alphas_cumprod(), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        noisy = add_noise(batch.latents, batch.noise, batch.timesteps, self.alphas)
        error = (self.unet(noisy, batch.timesteps, batch.states).sample - batch.noise).square().mean((1, 2, 3))
        weights = min_snr_weights(batch.timesteps, self.alphas, MIN_SNR)
        return {"loss": (error * weights).mean(), "mse": error.mean()}


class Pool:
    """Encoded scenes, made in blocks from their number alone, so that any process can make any block again.

    Block ``i`` is used for one pass and replaced; the pool holds ``keep`` blocks and batches mix them.
    """

    def __init__(
        self, vae: AutoencoderKL, text: CLIPTextModel, mixture: Mixture, scale: float, block: int = 2048, keep: int = 6,
        passes: int = 4,
    ) -> None:  # fmt: skip
        self.vae, self.text, self.mixture, self.scale = vae.eval(), text.eval(), mixture, scale
        self.block, self.keep, self.passes = block, keep, passes
        self.blocks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.device = next(vae.parameters()).device

    @torch.no_grad()
    def encode(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Block ``index``: posterior means and deviations ``[n, C, h, w]`` in half precision, caption states ``[n, 32,
        192]``."""
        rng = np.random.default_rng([31, self.mixture.side, index])
        pairs = [sample(rng, self.mixture) for _ in range(self.block)]
        means, deviations, states = [], [], []
        for start in range(0, self.block, 64):
            part = pairs[start : start + 64]
            pixels = torch.from_numpy(np.stack([render(scene).image for scene, _ in part])).to(self.device)
            posterior = self.vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
            means.append(posterior.mean.half())
            deviations.append(posterior.std.half())
            states.append(encode_captions(self.text, [text for _, text in part]).half())
        return torch.cat(means), torch.cat(deviations), torch.cat(states)

    def get(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index not in self.blocks:
            self.blocks[index] = self.encode(index)
            for old in sorted(self.blocks)[: -self.keep]:
                del self.blocks[old]
        return self.blocks[index]


def encode_captions(text: CLIPTextModel, captions: list[str]) -> Tensor:
    words = tokenizer()
    ids = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text(ids.to(next(text.parameters()).device)).last_hidden_state


def batch_source(pool: Pool, size: int, world: int) -> Callable[[int, int], Batch]:
    """``batch_at(step, rank)``: items drawn from a window of blocks that slides with the number of items seen."""
    empty = encode_captions(pool.text, [""]).detach()

    def batch_at(step: int, rank: int) -> Batch:
        rng = np.random.default_rng([41, step, rank])
        newest = step * size // (pool.block * pool.passes) * world + rank
        window = list(range(newest, -1, -world))[: pool.keep]
        chosen = np.sort(rng.choice(window, size))
        parts = []
        for index in np.unique(chosen):
            means, deviations, states = pool.get(int(index))
            rows = torch.from_numpy(rng.integers(0, pool.block, int((chosen == index).sum())))
            parts.append((means[rows], deviations[rows], states[rows]))
        means, deviations, states = (torch.cat(p).float() for p in zip(*parts, strict=True))
        noise_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        draw = lambda: torch.randn(means.shape, generator=noise_rng).to(means.device)  # noqa: E731
        latents = (means + deviations * draw()) * pool.scale
        dropped = torch.rand(size, generator=noise_rng).to(means.device) < DROP_CAPTION
        states = torch.where(dropped[:, None, None], empty, states)
        # Stratified timesteps: one a slice of the schedule, so that every step sees all noise levels.
        spread = (torch.arange(size) + torch.rand(size, generator=noise_rng)) / size
        timesteps = (spread * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1).to(means.device)
        return Batch(latents, states, draw(), timesteps)

    return batch_at
