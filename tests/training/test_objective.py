"""One forward for pictures and prior says what one for each says."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.utils import _to_kwargs

from studio.base import Base
from tests.training.conftest import Configure
from training.adapters import attached
from training.batches import Batch, Captions
from training.losses import add_noise, min_snr_weights
from training.objective import Objective
from training.text import Reader


@pytest.mark.parametrize("train_text", ["none", "lora"])
def test_a_forward_of_both_is_one_of_each(configure: Configure, base: Base, train_text: str) -> None:
    config = configure(prior="consistency", prior_weight=0.7, train_text=train_text)
    draw = torch.Generator().manual_seed(3)
    captions = Captions(base, True)
    for text in ("a zqx apple", "a zqx apple on the left", "an apple", "a frog"):
        captions.number(text)
    latents, noise = (torch.randn(4, 8, 16, 16, generator=draw) for _ in range(2))
    batch = Batch(latents=latents, noise=noise, t=torch.tensor([900, 40, 500, 300]), captions=torch.tensor([0, 1, 1, 0]))
    prompts, abar = (2, 3), base.scheduler.alphas_cumprod
    with attached(base, config) as adapters:
        weights = list(adapters.weights().values())
        for weight in weights:
            torch.nn.init.normal_(weight, std=0.05, generator=draw)
        objective = Objective(base, adapters, captions, config, torch.device("cpu")).train()
        (arguments,), _ = _to_kwargs((batch, None, prompts), {}, torch.device("meta"), False)
        assert objective(*arguments)["loss"].isfinite()  # what a process with a card of its own is given
        losses = objective(batch, prompts=prompts)
        together = torch.autograd.grad(losses["loss"], weights)

        noised = add_noise(latents, noise, batch.t, abar)[:2]
        with torch.no_grad(), adapters.absent():
            teacher = base.unet(noised, batch.t[:2], captions.states(torch.tensor(prompts)).states).sample
        said = base.unet(noised, batch.t[:2], Reader(base).read(captions.called(torch.tensor(prompts))).states).sample
        squares = (said - teacher).square().flatten(1).mean(1)
        prior = (squares * min_snr_weights(batch.t[:2], abar, config.min_snr)).mean()
        apart = objective(batch)
        alone = torch.autograd.grad(apart["loss"] + 0.7 * prior, weights)
    assert losses["denoising"].item() == pytest.approx(apart["denoising"].item(), rel=1e-5)
    assert losses["prior"].item() == pytest.approx(prior.item(), rel=1e-4)
    assert prior.item() > 0
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
