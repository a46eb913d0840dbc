"""Samplers under every name that people know them by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from compose.schedulers import NEAREST, SAMPLERS, SCHEDULES, inverse_scheduler, make_scheduler, sampler_name, sampler_named
from studio.base import Base
from studio.errors import UnknownNameError

A1111 = {
    "DPM++ 2M": "dpmpp_2m", "DPM++ SDE": "dpmpp_sde", "DPM++ 2M SDE": "dpmpp_2m_sde", "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 2S a": "dpmpp_2s", "DPM++ 3M SDE": "dpmpp_3m_sde", "Euler a": "euler_a", "Euler": "euler", "Heun": "heun",
    "DPM2": "dpm2", "DPM2 a": "dpm2_a", "DDIM": "ddim", "PLMS": "pndm", "UniPC": "unipc", "LCM": "lcm",
    "DPM++ 2M Karras": "dpmpp_2m_karras", "DPM++ SDE Karras": "dpmpp_sde_karras", "DPM2 a Karras": "dpm2_a_karras",
    "DPM++ 2M SDE Exponential": "dpmpp_2m_sde_exponential", "Euler SGM Uniform": "euler_sgm_uniform",
    "Euler a Uniform": "euler_a",
}  # fmt: skip
COMFY = {
    "euler": "euler", "euler_ancestral": "euler_a", "heun": "heun", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a",
    "dpmpp_2s_ancestral": "dpmpp_2s", "dpmpp_sde": "dpmpp_sde", "dpmpp_sde_gpu": "dpmpp_sde", "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde", "dpmpp_3m_sde": "dpmpp_3m_sde", "ddpm": "ddpm",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde", "lcm": "lcm", "deis": "deis", "ddim": "ddim", "uni_pc": "unipc", "uni_pc_bh2": "unipc",
    "dpmpp_2m_karras": "dpmpp_2m_karras", "dpm_2_karras": "dpm2_karras", "euler_normal": "euler",
    "euler_ancestral_simple": "euler_a_sgm_uniform", "dpmpp_3m_sde_gpu_exponential": "dpmpp_3m_sde_exponential",
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), [*A1111.items(), *COMFY.items()])
def test_names_of_other_programs(theirs: str, ours: str) -> None:
    assert sampler_name(theirs) == ours
    assert sampler_name(ours) == ours
    assert sampler_name(sampler_named(ours).title) == ours


@pytest.mark.parametrize("name", sorted(NEAREST))
def test_samplers_that_are_not_here_name_the_nearest(name: str) -> None:
    for written in (name, f"{name}_karras"):
        with pytest.raises(UnknownNameError, match=f"the nearest here is '{NEAREST[name]}'"):
            sampler_name(written)
    assert NEAREST[name] in SAMPLERS


def test_a_schedule_a_sampler_does_not_know_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="'euler_a' knows no schedule 'karras'"):
        sampler_name("euler_ancestral_karras")
    with pytest.raises(UnknownNameError, match="unknown scheduler 'Euler Beta'"):
        sampler_name("Euler Beta")


@pytest.mark.parametrize("word", sorted(SCHEDULES))
def test_every_pair_of_sampler_and_schedule_takes_effect(base: Base, word: str) -> None:
    for name in sorted(SCHEDULES[word].fits):
        levels = []
        for written in (name, f"{name}_{word}"):
            scheduler = make_scheduler(written, base.scheduler)
            scheduler.set_timesteps(7)
            levels.append(getattr(scheduler, "sigmas", scheduler.timesteps))
        same = levels[0].shape == levels[1].shape and torch.equal(levels[0], levels[1])
        assert not same, f"{name} ignores {word}"


def test_a_base_that_is_silent_about_its_latents_gets_those_of_latent_diffusion(tmp_path: Path) -> None:
    """The class that reads the file would fill in its own defaults, which clip latents as if they were pixels."""
    told = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(told))
    like = DDIMScheduler.from_pretrained(tmp_path)
    for made in (make_scheduler("ddim", like), make_scheduler("ddpm", like), inverse_scheduler(like)):
        assert made.config.clip_sample is False
        assert made.config.beta_schedule == "scaled_linear"
    assert make_scheduler("ddim", like).config.set_alpha_to_one is False


def test_what_the_base_says_of_its_own_sampler_does_not_reach_another(tmp_path: Path) -> None:
    told = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++",
            "solver_order": 3, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # fmt: skip
    (tmp_path / "scheduler_config.json").write_text(json.dumps(told))
    like = DDIMScheduler.from_pretrained(tmp_path)
    plain = make_scheduler("dpmpp_2m", like).config
    assert (plain.use_karras_sigmas, plain.algorithm_type, plain.solver_order) == (False, "dpmsolver++", 2)
    assert make_scheduler("euler", like).config.use_karras_sigmas is False
    assert make_scheduler("dpmpp_2m_exponential", like).config.use_exponential_sigmas is True
