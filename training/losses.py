"""The maths of a denoising loss, as pure functions.

Shapes: latents ``x``, noise and predictions ``[B, C, H, W]``; timesteps ``t [B]`` int64; ``alphas_cumprod [T]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """``values[t]`` shaped to broadcast over ``like``."""
    return values.to(like.device, like.dtype)[t].reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps`` (Ho et al., 2020, eq. 4)."""
    abar = at(alphas_cumprod, t, x)
    return abar.sqrt() * x + (1 - abar).sqrt() * noise


def velocity(x: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x`` (Salimans & Ho, 2022)."""
    abar = at(alphas_cumprod, t, x)
    return abar.sqrt() * noise - (1 - abar).sqrt() * x


def target(kind: str, x: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the UNet should say: ``epsilon``, ``v_prediction`` or ``sample``."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return velocity(x, noise, t, alphas_cumprod)
    if kind == "sample":
        return x
    raise ValueError(f"prediction type {kind!r}")


def snr(t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio ``abar / (1 - abar)``, ``[B]``, 0 at a zero-terminal-SNR end."""
    abar = alphas_cumprod.to(t.device, torch.float32)[t]
    return abar / (1 - abar)


def min_snr_weights(t: Tensor, alphas_cumprod: Tensor, gamma: float | None, kind: str = "epsilon") -> Tensor:
    """Min-SNR-gamma (Hang et al., 2023, section 3.4): ``min(SNR, gamma)`` for x-prediction, over ``SNR`` for epsilon and over
    ``SNR + 1`` for v. ``[B]``; all one without a gamma. At SNR 0 epsilon's weight is its limit, 1."""
    if gamma is None:
        return torch.ones(t.shape, device=t.device)
    ratio = snr(t, alphas_cumprod)
    clipped = ratio.clamp(max=gamma)
    if kind == "sample":
        return clipped
    if kind == "v_prediction":
        return clipped / (ratio + 1)
    return torch.where(ratio > 0, clipped / ratio.clamp_min(1e-12), torch.ones_like(ratio))


def weighted_mse(prediction: Tensor, wanted: Tensor, weights: Tensor, masks: Tensor | None = None) -> Tensor:
    """Mean over rows of ``weights [B]`` times each row's mean squared error, in float32, within its mask if there are
    ``masks [B, 1, h, w]``."""
    return (row_means((prediction.float() - wanted.float()).square(), masks) * weights).mean()


def row_means(values: Tensor, masks: Tensor | None) -> Tensor:
    """``[B]`` of ``values [B, C, h, w]``; what counts is in ``masks [B, 1, h, w]``, 0..1, none of them zero all over. A small
    subject weighs as much as a large one."""
    if masks is None:
        return values.flatten(1).mean(1)
    counted = masks.expand_as(values)
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)


def huber_widths(t: Tensor, alphas_cumprod: Tensor, c: float, schedule: str) -> Tensor:
    """Where a pseudo-Huber loss goes over from square to straight, ``[B]`` (Khrapov et al., 2024): ``c`` at any noise
    (``constant``), or from 1 without noise down to ``c``: ``c^(t / T)`` (``exponential``), ``(1 - c) / (1 + sigma)^2 + c``
    (``snr``), ``sigma^2 = (1 - abar) / abar``.
    """
    if schedule == "exponential":
        return torch.pow(c, t.float() / len(alphas_cumprod))
    if schedule == "snr":
        abar = alphas_cumprod.to(t.device, torch.float32)[t]
        return (1 - c) / (1 + ((1 - abar) / abar).sqrt()).square() + c
    return torch.full(t.shape, c, device=t.device)


def weighted_huber(
    prediction: Tensor,
    wanted: Tensor,
    weights: Tensor,
    widths: Tensor,
    masks: Tensor | None = None,
    *,
    smooth: bool = False,
) -> Tensor:
    """As :func:`weighted_mse`, with ``2 c (sqrt(d^2 + c^2) - c)`` for each difference ``d`` and width ``c`` of ``widths [B]``:
    the square of a small ``d``, ``2 c |d|`` of a large one. ``smooth``: without the leading ``c``: ``d^2 / c`` and ``2 |d|``.
    """
    c = widths.float().reshape(-1, *[1] * (prediction.ndim - 1))
    squares = (prediction.float() - wanted.float()).square()
    rows = 2 * squares / ((squares + c * c).sqrt() + c) * (1 if smooth else c)  # the same, and exact for small differences
    return (row_means(rows, masks) * weights).mean()


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The noise levels that are learnt: timesteps ``low <= t < high``.

    ``spread``: None draws them uniformly; a number s draws ``low + (high - low) sigmoid(s z)`` with z normal, which prefers the
    middle; from s = 1.41 on it has two peaks instead, towards the ends (Esser et al., 2024, eq. 19).
    """

    low: int
    high: int
    spread: float | None = None


def stratified_timesteps(count: int, levels: Levels, generator: torch.Generator) -> Tensor:
    """``[count]`` int64: one draw in each of ``count`` equally likely slices of ``levels``, in random order.

    Every element alone is drawn as ``levels`` says; the batch covers all noise levels, so the loss swings less than with
    independent draws.
    """
    slices = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    if levels.spread is not None:
        slices = count * torch.sigmoid(levels.spread * torch.special.ndtri(slices / count))
    steps = levels.high - levels.low
    return levels.low + (slices * (steps / count)).long().clamp(max=steps - 1)
