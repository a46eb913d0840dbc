"""Denoising maths against its definitions."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from diffusers import DDPMScheduler

from training.losses import (
    Levels,
    add_noise,
    huber_widths,
    min_snr_weights,
    snr,
    stratified_timesteps,
    target,
    velocity,
    weighted_huber,
    weighted_mse,
)


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_noise_and_velocity_agree_with_the_scheduler(scheduler: DDPMScheduler) -> None:
    x, noise, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 10, 500, 999])
    abar = scheduler.alphas_cumprod
    torch.testing.assert_close(add_noise(x, noise, t, abar), scheduler.add_noise(x, noise, t))
    torch.testing.assert_close(velocity(x, noise, t, abar), scheduler.get_velocity(x, noise, t))
    assert target("epsilon", x, noise, t, abar) is noise
    assert target("sample", x, noise, t, abar) is x
    with pytest.raises(ValueError, match="prediction type"):
        target("flow", x, noise, t, abar)


def test_min_snr_weights_make_every_prediction_type_minimise_the_same(scheduler: DDPMScheduler) -> None:
    """The same error in x costs the same whether the model says x, noise or velocity."""
    abar, t = scheduler.alphas_cumprod, torch.arange(0, 1000, 37)
    ratio = snr(t, abar)
    x_weight = min_snr_weights(t, abar, 5.0, "sample")
    torch.testing.assert_close(min_snr_weights(t, abar, 5.0) * ratio, x_weight)
    torch.testing.assert_close(min_snr_weights(t, abar, 5.0, "v_prediction") * (ratio + 1), x_weight)
    assert x_weight.max() == 5.0
    assert (min_snr_weights(t, abar, None) == 1).all()


def test_min_snr_is_finite_at_zero_terminal_snr() -> None:
    abar = torch.tensor([0.9, 0.0])
    assert min_snr_weights(torch.tensor([1]), abar, 5.0).tolist() == [1.0]
    assert min_snr_weights(torch.tensor([1]), abar, 5.0, "v_prediction").tolist() == [0.0]


def test_weighted_mse_weighs_rows() -> None:
    wanted = torch.zeros(2, 1, 2, 2)
    said = torch.stack([torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)])
    assert weighted_mse(said, wanted, torch.tensor([1.0, 0.5])).item() == pytest.approx((1 + 2) / 2)


def test_pseudo_huber_is_square_for_small_errors_and_straight_for_large_ones() -> None:
    wanted, one = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 0.5])
    small, large, widths = wanted + 1e-3, wanted + 100.0, torch.tensor([0.5, 0.1])
    for tiny in (small, wanted + 1e-6):
        assert weighted_huber(tiny, wanted, one, widths).item() == pytest.approx(
            weighted_mse(tiny, wanted, one).item(), rel=1e-2
        )
    assert weighted_huber(large, wanted, one, widths).item() == pytest.approx((100 * 1.0 + 20 * 0.5) / 2, rel=1e-2)
    assert weighted_huber(large, wanted, one, widths, smooth=True).item() == pytest.approx((200 + 200 * 0.5) / 2, rel=1e-2)


def test_pseudo_huber_is_straighter_where_there_is_noise(scheduler: DDPMScheduler) -> None:
    abar, t = scheduler.alphas_cumprod, torch.tensor([0, 500, 999])
    assert huber_widths(t, abar, 0.1, "constant").tolist() == pytest.approx([0.1] * 3)
    exponential = huber_widths(t, abar, 0.1, "exponential").tolist()
    assert exponential == pytest.approx([1.0, 0.1**0.5, 0.1 ** (999 / 1000)])
    most, middle, least = huber_widths(t, abar, 0.1, "snr").tolist()
    assert 0.9 < most <= 1 and most > middle > least > 0.1 and least < 0.11


def test_timesteps_keep_to_the_levels_asked_for() -> None:
    whole, part = (torch.Generator().manual_seed(3) for _ in range(2))
    everything = stratified_timesteps(50, Levels(low=0, high=1000), whole)
    some = stratified_timesteps(50, Levels(low=200, high=300), part)
    assert everything.min() >= 0 and everything.max() < 1000
    assert some.min() >= 200 and some.max() < 300 and torch.equal((some - 200), everything // 10)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_timesteps_that_prefer_the_middle(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_timesteps(4, Levels(low=200, high=1200, spread=scale), generator) for _ in range(4000)])
    assert draws.min() >= 200 and draws.max() < 1200
    # Below a quarter, a half and three quarters lie what normal numbers below -ln 3 / s, 0 and ln 3 / s make up.
    normal = statistics.NormalDist(sigma=scale)
    for level, share in ((450, normal.cdf(-math.log(3))), (700, 0.5), (950, normal.cdf(math.log(3)))):
        assert (draws < level).double().mean().item() == pytest.approx(share, abs=0.01)
    assert ((draws < 700).sum(1) == 2).all()


def test_timesteps_cover_every_slice_and_stay_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_timesteps(8, Levels(low=0, high=1000), generator) for _ in range(2000)])
    assert ((draws.sort(1).values // 125) == torch.arange(8)).all()
    first = draws[:, 0].double()
    assert first.mean().item() == pytest.approx(499.5, abs=25)
    assert first.std().item() == pytest.approx(288.7, abs=15)
