"""Samplers by name: diffusers' scheduler classes with their settings, and the names other programs use for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from studio.errors import RequestError, UnknownNameError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One sampler: where its class lives in ``diffusers.schedulers``, the settings that make it, and its name in A1111."""

    module: str
    cls: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def _multistep(title: str, **settings: Any) -> Sampler:
    return Sampler(module="scheduling_dpmsolver_multistep", cls="DPMSolverMultistepScheduler", title=title, settings=settings)


def _singlestep(title: str, **settings: Any) -> Sampler:
    return Sampler(module="scheduling_dpmsolver_singlestep", cls="DPMSolverSinglestepScheduler", title=title, settings=settings)


def _plain(stem: str, cls: str, title: str, **settings: Any) -> Sampler:
    return Sampler(module=f"scheduling_{stem}", cls=f"{cls}Scheduler", title=title, settings=settings)


KARRAS = {"use_karras_sigmas": True}
SAMPLERS: Mapping[str, Sampler] = {
    "ddim": _plain("ddim", "DDIM", "DDIM"),
    "ddpm": _plain("ddpm", "DDPM", "DDPM"),
    "deis": _plain("deis_multistep", "DEISMultistep", "DEIS"),
    "dpm2": _plain("k_dpm_2_discrete", "KDPM2Discrete", "DPM2"),
    "dpm2_a": _plain("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscrete", "DPM2 a"),
    "dpmpp_2m": _multistep("DPM++ 2M"),
    "dpmpp_2m_karras": _multistep("DPM++ 2M Karras", **KARRAS),
    "dpmpp_2m_sde": _multistep("DPM++ 2M SDE", algorithm_type="sde-dpmsolver++"),
    "dpmpp_2m_sde_karras": _multistep("DPM++ 2M SDE Karras", algorithm_type="sde-dpmsolver++", **KARRAS),
    "dpmpp_2s": _singlestep("DPM++ 2S"),
    "dpmpp_sde": _singlestep("DPM++ SDE", algorithm_type="sde-dpmsolver++"),
    "dpmpp_sde_karras": _singlestep("DPM++ SDE Karras", algorithm_type="sde-dpmsolver++", **KARRAS),
    "euler": _plain("euler_discrete", "EulerDiscrete", "Euler"),
    "euler_karras": _plain("euler_discrete", "EulerDiscrete", "Euler Karras", **KARRAS),
    "euler_a": _plain("euler_ancestral_discrete", "EulerAncestralDiscrete", "Euler a"),
    "heun": _plain("heun_discrete", "HeunDiscrete", "Heun"),
    "lcm": _plain("lcm", "LCM", "LCM"),
    "pndm": _plain("pndm", "PNDM", "PLMS", skip_prk_steps=True),
    "tcd": _plain("tcd", "TCD", "TCD"),
    "unipc": _plain("unipc_multistep", "UniPCMultistep", "UniPC"),
}

ALIASES: Mapping[str, str] = {
    "euler_ancestral": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "dpmpp": "dpmpp_2m",
    "dpmpp_2s_a": "dpmpp_2s",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "plms": "pndm",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}

# What a latent diffusion schedule needs and some classes default otherwise; used only where the base's own file is silent.
LATENT_DEFAULTS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "thresholding": False}


def sampler_name(name: str) -> str:
    """The canonical name of a sampler: ours, A1111's ("DPM++ 2M Karras") or ComfyUI's ("euler_ancestral").

    Raises:
        UnknownNameError: no such sampler.
    """
    plain = name.strip().lower().replace("++", "pp").replace("-", "_").replace(" ", "_").replace("a1111_", "")
    plain = ALIASES.get(plain, plain)
    if plain in SAMPLERS:
        return plain
    raise UnknownNameError("scheduler", name, [*SAMPLERS, *ALIASES])


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """A fresh scheduler called ``name`` over the noise schedule of ``like`` (betas, prediction type, offsets)."""
    sampler = SAMPLERS[sampler_name(name)]
    cls = getattr(import_module(f"diffusers.schedulers.{sampler.module}"), sampler.cls)
    config = dict(like.config)
    defaults = {key: value for key, value in LATENT_DEFAULTS.items() if key not in config}
    return cls.from_config(config, **{**defaults, **sampler.settings})


def inverse_scheduler(like: SchedulerMixin) -> SchedulerMixin:
    """DDIM backwards, with ascending timesteps, over the noise schedule of ``like``."""
    from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler

    config = dict(like.config)
    # Both must agree on the cumulative alpha of the cleanest level, or the last step would jump.
    return DDIMInverseScheduler.from_config(config, set_alpha_to_one=config.get("set_alpha_to_one", False))


def set_steps(scheduler: SchedulerMixin, steps: int, device: Any) -> None:
    """``scheduler.set_timesteps``, with a sentence where a sampler cannot do so few or so many steps."""
    try:
        scheduler.set_timesteps(steps, device=device)
    except (ValueError, IndexError, RuntimeError, AssertionError) as error:
        raise RequestError(
            f"{type(scheduler).__name__} cannot sample in {steps} steps ({error}): choose another number"
        ) from error
