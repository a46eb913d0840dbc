"""What each part of the embedded base minimises, and the batches it sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training.base import checkpoint, text, unet, vae
from training.base.data import Mixture
from training.base.loop import Run, train


def test_the_vae_learns_from_every_term() -> None:
    torch.manual_seed(0)
    objective = vae.Objective(vae.build())
    losses = objective(torch.rand(2, 3, 32, 32) * 2 - 1)
    losses["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in objective.parameters())
    gray = torch.full((1, 3, 4, 4), 0.3)
    assert torch.allclose(vae.luma_chroma(gray)[:, 1:], torch.zeros(1, 2, 4, 4), atol=1e-6)


def test_dense_canvases_are_full_of_art() -> None:
    crowded = vae.dense_canvas(np.random.default_rng(0))
    assert crowded.shape == (64, 64, 3)
    assert len(np.unique(crowded.reshape(-1, 3), axis=0)) > 500


def test_the_text_side_learns_from_sketch_heads_and_bare_words() -> None:
    words = text.tokenizer()
    torch.manual_seed(0)
    objective = text.Objective(text.build(len(words), words.bos_token_id, words.eos_token_id))
    batch = text.batch_at(3, 0, 6, Mixture())
    again = text.batch_at(3, 0, 6, Mixture())
    assert torch.equal(batch.ids, again.ids) and torch.equal(batch.thumbnails, again.thumbnails)
    losses = objective(batch)
    losses["loss"].backward()
    assert all(bool(value.isfinite()) for value in losses.values())
    sketcher = [p.grad for p in objective.sketcher.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in sketcher)


def test_the_unet_s_loss_is_min_snr_weighted_and_its_batches_follow_from_their_number() -> None:
    words = text.tokenizer()
    torch.manual_seed(0)
    encoder = text.build(len(words), words.bos_token_id, words.eos_token_id)
    objective = unet.Objective(unet.build())

    def source() -> unet.Batch:
        pool = unet.Pool(vae.build(), encoder, Mixture(side=32), 0.5, block=6, keep=2, passes=1)
        return unet.batch_source(pool, 4, 1)(3, 0)

    torch.manual_seed(5)
    one = source()
    assert one.latents.shape == (4, 8, 8, 8) and one.states.shape == (4, 32, 192)
    assert (one.timesteps.diff() > 0).all()  # one in each quarter of the schedule
    with torch.no_grad():
        losses = objective(one)
        abar = unet.alphas_cumprod()[one.timesteps]
        noisy = abar.sqrt()[:, None, None, None] * one.latents + (1 - abar).sqrt()[:, None, None, None] * one.noise
        error = (objective.unet(noisy, one.timesteps, one.states).sample - one.noise).square().mean((1, 2, 3))
    snr = abar / (1 - abar)
    torch.testing.assert_close(losses["loss"], (error * snr.clamp(max=5) / snr).mean())
    torch.testing.assert_close(losses["mse"], error.mean())
    torch.manual_seed(5)
    two = source()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_sitting_without_time_saves_and_ends(tmp_path: Path) -> None:
    run = Run(work=tmp_path, name="vae", items=320, batch=32, rate=1e-3, minutes=0)
    model = vae.Objective(vae.build())
    train(model, lambda step, rank: torch.rand(1, 3, 32, 32), run)
    groups, facts = checkpoint.load(run.folder)
    assert facts["items"] == 0
    assert set(groups["model"]) == set(model.state_dict())
