"""Samplers by name: diffusers' scheduler classes with their settings, and the names other programs use for them.

Every class of diffusers' ``KarrasDiffusionSchedulers`` is here but ``EDMEuler``, which gives its model ``log(sigma) / 4`` for a
timestep and reads its output as EDM does, so that no model of discrete timesteps understands it. ``IPNDM`` is not here either:
its timesteps run from 1 to 0 over noise levels of its own, whatever the base was trained with.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from studio.errors import MissingDependencyError, RequestError, UnknownNameError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One sampler: where its class lives in ``diffusers.schedulers``, the settings that make it, and its name in A1111.

    ``mixin`` goes before its class. ``package`` is what it needs beside diffusers, ``instead`` a sampler near it that does not.
    """

    module: str
    cls: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""
    instead: str = ""
    mixin: type | None = None


class _Seeded:
    """Goes before ``DPMSolverSDEScheduler``, which draws the noise of a whole batch from one seed of its own: here each row's
    comes from the seed of its generator. ``order_list`` is 1 where a step begins and 2 where it looks between levels."""

    def set_timesteps(self: Any, steps: int, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(steps, *args, **kwargs)  # type: ignore[misc]
        self.order_list = [1 + index % 2 for index in range(len(self.timesteps))]

    def step(self: Any, out: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        if self.noise_sampler is None and generator is not None:
            self.noise_sampler_seed = [each.initial_seed() for each in generator]
        return super().step(out, timestep, sample, return_dict)  # type: ignore[misc]


class _FromHere:
    """Goes before ``LMSDiscreteScheduler``, which counts on the derivatives of all steps before: a run that starts in the
    middle of its schedule has none."""

    def step(self: Any, out: Tensor, timestep: Tensor, sample: Tensor, order: int = 4, return_dict: bool = True) -> Any:
        return super().step(out, timestep, sample, min(len(self.derivatives) + 1, order), return_dict)  # type: ignore[misc]


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
    "dpmpp_2m_sde_heun": _multistep("DPM++ 2M SDE Heun", algorithm_type="sde-dpmsolver++", solver_type="heun"),
    "dpmpp_2s": _singlestep("DPM++ 2S"),
    "dpmpp_3m_sde": _multistep("DPM++ 3M SDE", algorithm_type="sde-dpmsolver++", solver_order=3),
    "dpmpp_sde": _singlestep("DPM++ SDE", algorithm_type="sde-dpmsolver++"),
    "dpmpp_sde_karras": _singlestep("DPM++ SDE Karras", algorithm_type="sde-dpmsolver++", **KARRAS),
    "euler": _plain("euler_discrete", "EulerDiscrete", "Euler"),
    "euler_karras": _plain("euler_discrete", "EulerDiscrete", "Euler Karras", **KARRAS),
    "euler_a": _plain("euler_ancestral_discrete", "EulerAncestralDiscrete", "Euler a"),
    "heun": _plain("heun_discrete", "HeunDiscrete", "Heun"),
    "lcm": _plain("lcm", "LCM", "LCM"),
    "pndm": _plain("pndm", "PNDM", "PLMS", skip_prk_steps=True),
    "sa_solver": _plain("sasolver", "SASolver", "SA Solver"),
    "tcd": _plain("tcd", "TCD", "TCD"),
    "unipc": _plain("unipc_multistep", "UniPCMultistep", "UniPC"),
}

OPTIONAL: Mapping[str, Sampler] = {
    "dpm_sde": replace(
        _plain("dpmsolver_sde", "DPMSolverSDE", "DPM SDE"), mixin=_Seeded, package="torchsde", instead="dpmpp_sde"
    ),
    "lms": replace(_plain("lms_discrete", "LMSDiscrete", "LMS"), mixin=_FromHere, package="scipy", instead="euler"),
}
"""Samplers that need a package which this project does not; all of them know every schedule."""

KNOWN: Mapping[str, Sampler] = {**SAMPLERS, **OPTIONAL}
"""All samplers."""

ALIASES: Mapping[str, str] = {
    "euler_ancestral": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_dpmpp_2m": "dpmpp_2m",
    "k_dpmpp_sde": "dpmpp_sde",
    "k_heun": "heun",
    "k_lms": "lms",
    "dpmpp": "dpmpp_2m",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun",
    "dpmpp_2s_a": "dpmpp_2s",
    "dpmpp_2s_ancestral": "dpmpp_2s",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmsolver_sde": "dpm_sde",
    "dpm_2": "dpm2",
    "dpm_2_a": "dpm2_a",
    "dpm_2_ancestral": "dpm2_a",
    "plms": "pndm",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}

NEAREST: Mapping[str, str] = {
    "ddim_cfgpp": "ddim",
    "dpm_adaptive": "dpmpp_2m",
    "dpm_fast": "dpmpp_2m",
    "edm_euler": "euler_karras",
    "euler_a_cfg_pp": "euler_a",
    "euler_ancestral_cfg_pp": "euler_a",
    "euler_cfg_pp": "euler",
    "heunpp2": "heun",
    "ipndm": "deis",
    "ipndm_v": "deis",
    "restart": "heun",
    "sa_solver_pece": "sa_solver",
}
"""Samplers of other programs that are not here, and what comes nearest."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the noise levels are spread, for the samplers ``fits``."""

    title: str
    settings: Mapping[str, Any]
    fits: frozenset[str]


_SIGMAS = frozenset({
    "deis", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_2s", "dpmpp_3m_sde", "dpmpp_sde",
    "euler", "heun", "sa_solver", "unipc",
})  # fmt: skip
_SPACED = (_SIGMAS | {"ddim", "ddpm", "euler_a", "pndm"}) - {"dpmpp_2s", "dpmpp_sde"}
SCHEDULES: Mapping[str, Schedule] = {
    "karras": Schedule(title="Karras", settings=KARRAS, fits=_SIGMAS),
    "exponential": Schedule(title="Exponential", settings={"use_exponential_sigmas": True}, fits=_SIGMAS),
    "sgm_uniform": Schedule(title="SGM Uniform", settings={"timestep_spacing": "trailing"}, fits=_SPACED),
}
_SAME_SCHEDULE = {"simple": "sgm_uniform", "normal": "", "uniform": "", "ddim_uniform": ""}

# What a latent diffusion schedule needs and some classes default otherwise; used only where the base's own file is silent.
LATENT_DEFAULTS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "thresholding": False}
# Classes that cannot read the output of a model that predicts the picture itself.
_NO_PICTURES = frozenset(KNOWN[name].cls for name in ("dpm2", "dpm2_a", "dpm_sde", "euler_a", "pndm"))
# What makes one sampler of another: a base's file may hold it for its own, but it is the request's to choose.
CHOOSING = frozenset({
    "algorithm_type", "corrector_order", "euler_at_final", "final_sigmas_type", "lower_order_final", "predictor_order",
    "solver_order", "solver_type", "use_beta_sigmas", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas",
    "use_lu_lambdas",
})  # fmt: skip


def sampler_name(name: str) -> str:
    """The canonical name of a sampler: ours, A1111's ("DPM++ 2M Karras") or ComfyUI's ("euler_ancestral").

    The name of a schedule may follow the sampler's, as those programs show them: ``dpm2_karras``, ``euler_sgm_uniform``.

    Raises:
        UnknownNameError: no such sampler, or one that does not know the schedule.
        MissingDependencyError: the package that it needs is not installed.
    """
    plain = name.strip().lower().replace("++", "pp").replace("-", "_").replace(" ", "_").replace("a1111_", "")
    plain = ALIASES.get(plain, plain)
    if plain in KNOWN:
        return _at_hand(plain)
    for word in sorted({*SCHEDULES, *_SAME_SCHEDULE}, key=len, reverse=True):
        head, found = plain.removesuffix(f"_{word}"), _SAME_SCHEDULE.get(word, word)
        head = ALIASES.get(head, head)
        if plain.endswith(f"_{word}") and head in KNOWN:
            if not found:
                return _at_hand(head)
            if head in SCHEDULES[found].fits or head in OPTIONAL:
                return f"{_at_hand(head)}_{found}"
            raise UnknownNameError("scheduler", name, [head], hint=f"('{head}' knows no schedule '{word}')")
        plain = head if head in NEAREST else plain
    hint = f"(other programs have it; the nearest here is '{NEAREST[plain]}')" if plain in NEAREST else ""
    raise UnknownNameError("scheduler", name, [*KNOWN, *ALIASES], hint=hint)


def _at_hand(name: str) -> str:
    """The name of a sampler, if what it needs is here."""
    sampler = KNOWN[name]
    if sampler.package and find_spec(sampler.package) is None:
        raise MissingDependencyError(
            f"the sampler '{name}' needs the package {sampler.package}: install it, or choose '{sampler.instead}'"
        )
    return name


def sampler_named(name: str) -> Sampler:
    """The sampler of any name that :func:`sampler_name` takes."""
    canonical = sampler_name(name)
    if canonical in KNOWN:
        return KNOWN[canonical]
    word = next(word for word in SCHEDULES if canonical.endswith(f"_{word}"))
    plain, schedule = KNOWN[canonical.removesuffix(f"_{word}")], SCHEDULES[word]
    return replace(plain, title=f"{plain.title} {schedule.title}", settings={**plain.settings, **schedule.settings})


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """A fresh scheduler called ``name`` over the noise schedule of ``like`` (betas, prediction type, offsets).

    Raises:
        RequestError: a base that predicts the picture itself, and a sampler that cannot read that.
        UnknownNameError, MissingDependencyError: see :func:`sampler_name`.
    """
    sampler = sampler_named(name)
    if like.config.get("prediction_type") == "sample" and sampler.cls in _NO_PICTURES:
        raise RequestError(f"this base predicts the picture itself, which the sampler '{name}' cannot read: choose 'ddim'")
    cls = getattr(import_module(f"diffusers.schedulers.{sampler.module}"), sampler.cls)
    if sampler.mixin is not None:
        cls = type(sampler.cls, (sampler.mixin, cls), {})
    return cls.from_config(noise_schedule(like), **sampler.settings)


def noise_schedule(like: SchedulerMixin) -> dict[str, Any]:
    """What the file of ``like`` says about noise, without what only chooses a sampler; :data:`LATENT_DEFAULTS` where it is
    silent: the class that read the file has filled in its own."""
    silent = {"_use_default_values", *like.config.get("_use_default_values", ())}
    told = {key: value for key, value in like.config.items() if key not in silent and key not in CHOOSING}
    return {**LATENT_DEFAULTS, **told}


def inverse_scheduler(like: SchedulerMixin) -> SchedulerMixin:
    """DDIM backwards, with ascending timesteps, over the noise schedule of ``like``."""
    from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler

    # Both must agree on the cumulative alpha of the cleanest level, or the last step would jump.
    known = inspect.signature(DDIMInverseScheduler).parameters
    return DDIMInverseScheduler.from_config({key: value for key, value in noise_schedule(like).items() if key in known})


def set_steps(scheduler: SchedulerMixin, steps: int, device: Any) -> None:
    """``scheduler.set_timesteps``, with a sentence where a sampler cannot do so few or so many steps."""
    try:
        scheduler.set_timesteps(steps, device=device)
    except (ValueError, IndexError, RuntimeError, AssertionError) as error:
        raise RequestError(
            f"{type(scheduler).__name__} cannot sample in {steps} steps ({error}): choose another number"
        ) from error
