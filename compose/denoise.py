"""The one sampling loop: timesteps, guidance, per-item noise, callbacks, cancellation, previews. A method only predicts.

Classifier-free guidance (Ho & Salimans, 2022): ``eps = eps_uncond + g (eps_cond - eps_uncond)``. With ``g = 1`` no
unconditional pass is made. Inversion is the same loop with ascending timesteps (Song et al., 2021, eq. 14 read backwards).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.bank import LoraBank
from compose.run import Encode, Method, Run, Step
from compose.schedulers import inverse_scheduler, make_scheduler, set_steps
from compose.text import Encoded, Wording
from studio.errors import NumericsError, RequestError
from studio.requests import Region

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.figures import Figure
    from compose.residuals import Residuals
    from studio.base import Base

RESTARTS = 20
"""A method that asks for more restarts than this in one run has lost its way."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """A run that begins at a picture: its latents ``[n, c, h, w]`` (scaled as the UNet has them) and how much may change.

    ``strength`` in (0, 1] is the share of the schedule that is run, as in the stock image-to-image pipeline.
    """

    latents: Tensor
    strength: float = 0.6


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


def guide(uncond: Tensor | None, cond: Tensor, guidance: float | Tensor) -> Tensor:
    """``eps_uncond + g (eps_cond - eps_uncond)``; exactly ``eps_cond`` where ``g`` is 1 or there was no unconditional pass.

    ``guidance`` may be one number per row ``[n, 1, 1, 1]``.
    """
    if uncond is None:
        return cond
    guided = uncond + guidance * (cond - uncond)
    return torch.where(guidance == 1, cond, guided) if isinstance(guidance, Tensor) else guided


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
        shown = run.guidance if isinstance(run.guidance, float | int) else float(run.guidance.max())
        raise NumericsError(
            f"the model produced NaN or infinity at step {step.index + 1} of {step.count} (guidance {shown:g}, "
            f"{run.base.dtype}): lower the guidance or the LoRA weights, or use single precision"
        )
    method.after_step(run, step)
    return original_estimate(run.scheduler, x, out, step.timestep)


def loop(run: Run, method: Method, *, stop: int | None = None, on_step: OnStep | None = None) -> None:
    """Visit all timesteps of ``run``, or the first ``stop``. Route and attention are as before at the end, however it ends."""
    with run.resources:
        if run.bank is not None:
            run.resources.enter_context(run.bank.acting(None))
        takes_generator = "generator" in inspect.signature(run.scheduler.step).parameters
        method.prepare(run)
        count, index, restarts = len(run.timesteps), 0, 0
        end = count if stop is None else min(stop, count)
        while index < end:
            step = Step(index=index, count=count, timestep=run.timesteps[index], skipped=run.skipped)
            original = advance(run, method, step, takes_generator)
            if on_step is not None:
                on_step(Event(step=step, latents=run.latents, original=original, base=run.base))
            index += 1
            if run.again:
                restarts += 1
                if restarts > RESTARTS:
                    raise RuntimeError(f"{type(method).__name__} asked for more than {RESTARTS} restarts in one run")
                run.again, run.scheduler, index = False, run.fresh(), 0
                run.latents = run.first(run.noise)


@torch.no_grad()
def denoise(
    base: Base,
    negative: Encoded,
    positive: Encoded,
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float | Sequence[float],
    scheduler: str,
    method: Method | None = None,
    bank: LoraBank | None = None,
    noise: Tensor | None = None,
    start: Start | None = None,
    states: int = 1,
    encode: Encode | None = None,
    wording: Wording | None = None,
    on_step: OnStep | None = None,
    cancelled: Callable[[], bool] | None = None,
    notes: list[str] | None = None,
    regions: Sequence[Region] = (),
    figures: list[Figure] | None = None,
    residuals: Residuals | None = None,
    room: int | None = None,
) -> Tensor:
    """Sample one latent per seed and state.

    Args:
        negative, positive: conditioning with one row per row of the result.
        size: (width, height) in pixels, multiples of ``base.latent_factor``.
        guidance: at least 1, or one such number per state; where all are 1 no unconditional pass is made.
        scheduler: a name of :mod:`compose.schedulers`.
        bank: attached LoRAs, if any.
        noise: unit noise ``[n, c, h, w]`` instead of the seeds' own; one row per seed, or one per row of the result.
        start: a picture to begin at instead of noise alone; one row of latents per seed, or one for all.
        states: latents side by side from the same noise, such as a source beside its edit; state-major rows
            ``[states * n]``. A method sees all of them in one forward.
        encode: encodes the prompts again under the bank's present route, for methods that give each LoRA its own.
        wording: the prompts as written, for methods that make other prompts of them; all rows say the same then.
        on_step: called after every timestep. cancelled: asked before every timestep.
        notes: what the method has to say is appended here.
        regions: parts of the picture with LoRAs of their own, for methods that take them.
        figures: what the method shows of its work is appended here; None: nothing is kept for it.
        residuals: what an image condition adds inside the UNet (:mod:`compose.residuals`).
        room: rows of latents that a forward has room for, for methods that make passes side by side; None: the family's batch.

    Returns:
        Latents ``[states * n, c, h, w]`` as the VAE's decoder wants them times its scaling factor, single precision.

    Raises:
        NumericsError, CancelledError, RequestError.
    """
    if len(positive.states) != states * len(seeds):
        raise ValueError(f"{len(positive.states)} rows of prompts for {len(seeds)} seeds and {states} states")
    generators = generators_of(list(seeds) * states)
    unit = initial_noise(base, generators, size) if noise is None else noise.to(base.device, torch.float32)
    unit = _every_row(unit, states * len(seeds))

    def fresh() -> Any:
        sampler = make_scheduler(scheduler, base.scheduler)
        set_steps(sampler, steps, base.device)
        if skipped and hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(skipped)
        return sampler

    skipped = 0
    sampler = fresh()
    if start is not None:
        skipped = skipped_by(sampler, steps, start.strength)
        sampler = fresh()
    timesteps = sampler.timesteps[skipped:]

    def first(unit_noise: Tensor) -> Tensor:
        if start is None:
            return unit_noise * sampler.init_noise_sigma
        picture = _every_row(start.latents.to(unit_noise), len(unit_noise))
        return fresh().add_noise(picture, unit_noise, timesteps[:1].expand(len(unit_noise)))

    run = Run(
        base=base,
        positive=positive,
        negative=negative,
        size=size,
        guidance=_per_row(guidance, states, len(seeds), base),
        generators=generators,
        scheduler=sampler,
        latents=first(unit),
        noise=unit,
        first=first,
        fresh=fresh,
        bank=bank,
        cancelled=cancelled,
        encode=encode,
        wording=wording,
        states=states,
        timesteps=timesteps,
        skipped=skipped,
        notes=[] if notes is None else notes,
        regions=tuple(regions),
        explaining=figures is not None,
        residuals=residuals,
        room=room or base.family.batch,
    )
    chosen = method or Method()
    loop(run, chosen, on_step=on_step)
    if figures is not None:
        figures += chosen.explain(run)
    return run.latents


@torch.no_grad()
def invert(
    base: Base,
    latents: Tensor,
    positive: Encoded,
    *,
    size: tuple[int, int],
    steps: int,
    method: Method | None = None,
    bank: LoraBank | None = None,
    on_step: OnStep | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Tensor:
    """The unit noise ``[n, c, h, w]`` from which DDIM with as many steps and guidance 1 leads back to ``latents``.

    DDIM inversion: each step is solved backwards with the prediction of where it stands, so the way back only meets the
    picture in the limit of many steps. ``on_step`` sees every state on the way.
    """

    def fresh() -> Any:
        sampler = inverse_scheduler(base.scheduler)
        set_steps(sampler, steps, base.device)
        return sampler

    picture = latents.to(base.device, torch.float32)
    sampler = fresh()
    run = Run(
        base=base,
        positive=positive,
        negative=positive,
        size=size,
        guidance=1.0,
        generators=generators_of([0] * len(picture)),
        scheduler=sampler,
        latents=picture,
        noise=picture,
        first=lambda given: given,
        fresh=fresh,
        bank=bank,
        cancelled=cancelled,
        timesteps=sampler.timesteps,
        room=base.family.batch,
    )
    loop(run, method or Method(), on_step=on_step)
    return run.latents


def skipped_by(sampler: Any, steps: int, strength: float) -> int:
    """Timesteps left out when only the share ``strength`` of the schedule is run.

    Raises:
        RequestError: a strength out of range, or one that leaves no step.
    """
    if not 0 < strength <= 1:
        raise RequestError(f"strength {strength:g} is out of range: choose a number over 0 and up to 1")
    kept = int(steps * strength)
    if kept == 0:
        raise RequestError(f"strength {strength:g} leaves none of {steps} steps: raise the strength or the steps")
    return int((steps - kept) * getattr(sampler, "order", 1))


def _every_row(tensor: Tensor, rows: int) -> Tensor:
    if rows % len(tensor):
        raise ValueError(f"{len(tensor)} latents do not fit {rows} rows")
    return tensor.repeat(rows // len(tensor), 1, 1, 1)


def _per_row(guidance: float | Sequence[float], states: int, each: int, base: Base) -> float | Tensor:
    if not isinstance(guidance, Sequence):
        return guidance
    if len(guidance) != states:
        raise ValueError(f"{len(guidance)} guidance scales for {states} states")
    rows = torch.tensor([scale for scale in guidance for _ in range(each)], device=base.device)
    return rows.view(-1, 1, 1, 1)
