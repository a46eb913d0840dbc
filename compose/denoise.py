"""The one sampling loop: timesteps, guidance, per-item noise, callbacks, cancellation, previews. A method only predicts.

Classifier-free guidance (Ho & Salimans, 2022): ``eps = eps_uncond + g (eps_cond - eps_uncond)``. With ``g = 1`` no
unconditional pass is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.bank import LoraBank
from compose.routes import Grid
from compose.schedulers import make_scheduler, set_steps
from compose.text import Encoded, added_conditions
from studio.errors import CancelledError, NumericsError

if TYPE_CHECKING:
    from PIL.Image import Image

    from studio.base import Base


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One timestep of the loop: ``index`` of ``count`` (samplers of second order visit some noise levels twice)."""

    index: int
    count: int
    timestep: Tensor

    @property
    def fraction(self) -> float:
        """How much of the schedule lies behind, 0..1."""
        return self.index / self.count


@dataclass(eq=False, kw_only=True)
class Run:
    """Everything of one sampling run, handed to every hook.

    Args:
        latents: the current state ``[n, c, h, w]``, single precision; a hook may replace it.
        negative, positive: conditioning, one row per item. ``negative`` is not used when ``guidance`` is 1.
        generators: one CPU generator per item: all randomness of item ``i`` comes from its own.
        size: picture (width, height) in pixels.
    """

    base: Base
    positive: Encoded
    negative: Encoded
    size: tuple[int, int]
    guidance: float
    generators: list[torch.Generator]
    scheduler: Any
    latents: Tensor
    bank: LoraBank | None = None
    cancelled: Callable[[], bool] | None = None
    _both: Encoded | None = field(default=None, repr=False)

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    def check_cancelled(self) -> None:
        """Raise when the user has cancelled; methods with inner passes call it between them."""
        if self.cancelled is not None and self.cancelled():
            raise CancelledError("cancelled")

    def forward(self, x: Tensor, timestep: Tensor, encoded: Encoded) -> Tensor:
        """One pass of the UNet over rows ``x [n, c, h, w]`` with as many rows of conditioning; single precision in and out."""
        unet = self.base.unet
        if self.bank is not None:
            self.bank.at(Grid(rows=len(x), height=x.shape[-2], width=x.shape[-1]))
        added = added_conditions(self.base, encoded, self.size)
        more = {} if added is None else {"added_cond_kwargs": added}
        out = unet(x.to(unet.dtype), timestep, encoder_hidden_states=encoded.states, return_dict=False, **more)[0]
        return out.to(x.dtype)

    def forward_guided(self, x: Tensor, timestep: Tensor) -> tuple[Tensor | None, Tensor]:
        """The stock prediction: unconditional and conditional rows in one pass."""
        if not self.guided:
            return None, self.forward(x, timestep, self.positive)
        if self._both is None:
            self._both = joined(self.negative, self.positive)
        uncond, cond = self.forward(torch.cat([x, x]), timestep, self._both).chunk(2)
        return uncond, cond


class Method:
    """How a prediction is made. The base class is the stock model, with whatever the bank's route lets act."""

    def prepare(self, run: Run) -> None:
        """Called once, before the first step."""

    def before_step(self, run: Run, step: Step) -> None:
        """Called before each timestep: set routes here."""

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """``(eps_uncond or None, eps_cond)`` for the scaled input ``x [n, c, h, w]``; the loop does guidance."""
        return run.forward_guided(x, step.timestep)

    def after_step(self, run: Run, step: Step) -> None:
        """Called after each timestep, with the new ``run.latents``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Event:
    """What a callback sees after each timestep. ``original`` is the present estimate of the clean latents."""

    step: Step
    latents: Tensor
    original: Tensor
    base: Base

    def preview(self) -> list[Image]:
        """The present estimate as pictures; costs one pass of the VAE's decoder."""
        from studio.media import decode

        return decode(self.base.vae, self.original)


OnStep = Callable[[Event], None]


def joined(first: Encoded, second: Encoded) -> Encoded:
    """The rows of ``first``, then those of ``second``."""
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    return Encoded(states=torch.cat([first.states, second.states]), ids=torch.cat([first.ids, second.ids]), pooled=pooled)


def guide(uncond: Tensor | None, cond: Tensor, guidance: float) -> Tensor:
    """``eps_uncond + g (eps_cond - eps_uncond)``; only ``eps_cond`` where there was no unconditional pass."""
    return cond if uncond is None else uncond + guidance * (cond - uncond)


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(base: Base, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
    """Unit noise ``[n, c, h, w]``; row ``i`` depends on generator ``i`` alone, whatever the batch and the device."""
    width, height = (side // base.latent_factor for side in size)
    shape = (1, base.latent_channels, height, width)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(base.device)


def original_estimate(scheduler: Any, x: Tensor, out: Tensor, timestep: Tensor) -> Tensor:
    """The clean latents that the scaled input ``x`` and the model's output imply.

    ``x_0 = (x - sqrt(1 - a) eps) / sqrt(a)`` (Ho et al., 2020, eq. 15), or its form for models that predict ``v`` or ``x_0``.
    """
    alphas = scheduler.alphas_cumprod
    a = alphas[int(timestep.clamp(0, len(alphas) - 1))].to(x)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "v_prediction":
        return a.sqrt() * x - (1 - a).sqrt() * out
    if kind == "sample":
        return out
    return (x - (1 - a).sqrt() * out) / a.sqrt()


def advance(run: Run, method: Method, step: Step, takes_generator: bool) -> Tensor:
    """One timestep: the method predicts, the loop guides, the scheduler steps. Returns the estimate of the clean latents."""
    run.check_cancelled()
    method.before_step(run, step)
    x = run.scheduler.scale_model_input(run.latents, step.timestep)
    uncond, cond = method.predict(run, step, x)
    out = guide(uncond, cond, run.guidance)
    more = {"generator": run.generators} if takes_generator else {}
    run.latents = run.scheduler.step(out, step.timestep, run.latents, return_dict=False, **more)[0]
    if not bool(torch.isfinite(run.latents).all()):
        raise NumericsError(
            f"the model produced NaN or infinity at step {step.index + 1} of {step.count} (guidance {run.guidance:g}, "
            f"{run.base.dtype}): lower the guidance or the LoRA weights, or use single precision"
        )
    method.after_step(run, step)
    return original_estimate(run.scheduler, x, out, step.timestep)


@torch.no_grad()
def denoise(
    base: Base,
    negative: Encoded,
    positive: Encoded,
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    scheduler: str,
    method: Method | None = None,
    bank: LoraBank | None = None,
    noise: Tensor | None = None,
    on_step: OnStep | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Tensor:
    """Sample one latent per seed.

    Args:
        negative, positive: conditioning with one row per seed.
        size: (width, height) in pixels, multiples of ``base.size_step``.
        guidance: at least 1; at 1 no unconditional pass is made.
        scheduler: a name of :mod:`compose.schedulers`.
        bank: attached LoRAs, if any.
        noise: unit noise ``[n, c, h, w]`` instead of the seeds' own.
        on_step: called after every timestep. cancelled: asked before every timestep.

    Returns:
        Latents ``[n, c, h, w]`` as the VAE's decoder wants them times its scaling factor, single precision.

    Raises:
        NumericsError, CancelledError, RequestError.
    """
    sampler = make_scheduler(scheduler, base.scheduler)
    set_steps(sampler, steps, base.device)
    generators = generators_of(seeds)
    start = initial_noise(base, generators, size) if noise is None else noise.to(base.device, torch.float32)
    run = Run(
        base=base,
        positive=positive,
        negative=negative,
        size=size,
        guidance=guidance,
        generators=generators,
        scheduler=sampler,
        latents=start * sampler.init_noise_sigma,
        bank=bank,
        cancelled=cancelled,
    )
    how = method or Method()
    takes_generator = "generator" in inspect.signature(sampler.step).parameters
    how.prepare(run)
    count = len(sampler.timesteps)
    for index, timestep in enumerate(sampler.timesteps):
        step = Step(index=index, count=count, timestep=timestep)
        original = advance(run, how, step, takes_generator)
        if on_step is not None:
            on_step(Event(step=step, latents=run.latents, original=original, base=base))
    return run.latents
