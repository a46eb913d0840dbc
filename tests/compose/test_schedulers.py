"""Samplers that need a package of their own, with stand-ins where it is not installed, and those that do not fit the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from compose.bank import Adapter
from compose.denoise import generators_of
from compose.schedulers import KNOWN, OPTIONAL, SAMPLERS, make_scheduler, sampler_name, sampler_named
from compose.switch import Switch
from studio.base import Base
from studio.errors import MissingDependencyError, RequestError, UnknownNameError
from studio.lora.model import Lora


class Interval:
    """What diffusers asks of ``torchsde.BrownianInterval``: increments that follow from the entropy."""

    def __init__(self, *, size: tuple[int, ...], entropy: int, **others: Any) -> None:
        self.size, self.entropy = size, entropy

    def __call__(self, start: Tensor, stop: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.entropy, float(start), float(stop))) % 2**63)
        return torch.randn(self.size, generator=generator) * (stop - start) ** 0.5


def quad(function: Callable[[float], Any], start: Tensor, stop: Tensor, **others: Any) -> tuple[float, float]:
    """``scipy.integrate.quad`` by Gauss and Legendre, exact for the polynomials that LMS integrates."""
    places, weights = np.polynomial.legendre.leggauss(4)
    half, middle = float(stop - start) / 2, float(stop + start) / 2
    return half * sum(w * float(function(middle + half * x)) for x, w in zip(places, weights, strict=True)), 0.0


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all samplers be used: what is not installed of scipy and torchsde is replaced by what diffusers asks of it."""
    if find_spec("scipy") is None:
        lms = import_module("diffusers.schedulers.scheduling_lms_discrete")
        monkeypatch.setattr(lms, "integrate", SimpleNamespace(quad=quad), raising=False)
    if find_spec("torchsde") is None:
        fake = ModuleType("torchsde")
        monkeypatch.setattr(fake, "BrownianInterval", Interval, raising=False)
        monkeypatch.setitem(sys.modules, "torchsde", fake)
        # The module that is imported now holds the stand-in: it has to go with it.
        monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_dpmsolver_sde", fake)
        del sys.modules["diffusers.schedulers.scheduling_dpmsolver_sde"]
    monkeypatch.setattr("compose.schedulers.find_spec", lambda name: object())


def test_every_scheduler_of_diffusers_is_here_or_names_the_nearest() -> None:
    missing = {each.name for each in KarrasDiffusionSchedulers} - {sampler.cls for sampler in KNOWN.values()}
    assert missing == {"EDMEulerScheduler"}
    with pytest.raises(UnknownNameError, match="the nearest here is 'euler_karras'"):
        sampler_name("EDM Euler")
    assert not {*SAMPLERS} & {*OPTIONAL}


@pytest.mark.parametrize(("name", "package"), [("lms", "scipy"), ("dpm_sde", "torchsde")])
@pytest.mark.parametrize("ending", ["", "_karras", "_normal"])
def test_a_missing_package_is_one_sentence_before_sampling(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, ending: str
) -> None:
    monkeypatch.setattr("compose.schedulers.find_spec", lambda asked: None if asked == package else object())
    instead = OPTIONAL[name].instead
    with pytest.raises(MissingDependencyError, match=f"^the sampler '{name}' needs the package {package}: install it, or"):
        sampler_name(name + ending)
    assert instead in SAMPLERS


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("LMS", "lms"), ("LMS Karras", "lms_karras"), ("k_lms", "lms"), ("lms_sgm_uniform", "lms_sgm_uniform"),
        ("DPM SDE", "dpm_sde"), ("dpmsolver_sde", "dpm_sde"), ("DPM SDE Exponential", "dpm_sde_exponential"),
        ("SA Solver", "sa_solver"), ("sa_solver_karras", "sa_solver_karras"),
    ],
)  # fmt: skip
def test_names_of_other_programs(monkeypatch: pytest.MonkeyPatch, theirs: str, ours: str) -> None:
    stand_in(monkeypatch)
    assert sampler_name(theirs) == ours
    assert sampler_name(sampler_named(ours).title) == ours


@pytest.mark.parametrize("word", ["karras", "exponential", "sgm_uniform"])
@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_schedules_take_effect(base: Base, monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    stand_in(monkeypatch)
    levels = []
    for written in (name, f"{name}_{word}"):
        scheduler = make_scheduler(written, base.scheduler)
        scheduler.set_timesteps(7)
        levels.append(scheduler.sigmas)
    assert not torch.equal(*levels)


def test_a_base_that_samples_with_sa_solver_chooses_only_for_itself(base: Base) -> None:
    from diffusers import SASolverScheduler

    like = SASolverScheduler.from_config(base.scheduler.config, predictor_order=3, corrector_order=4)
    config = make_scheduler("sa_solver", like).config
    assert (config.predictor_order, config.corrector_order) == (2, 2)


def test_a_turn_of_switch_lasts_while_dpm_sde_looks_between_levels(
    monkeypatch: pytest.MonkeyPatch, sample: Callable[..., Tensor], make_lora: Callable[..., Lora]
) -> None:
    stand_in(monkeypatch)
    switch = Switch.of(tau=1)
    adapters = [Adapter(f"lora {seed}", make_lora(seed, "attn2", size=0.2)) for seed in range(3)]
    sample(switch, adapters, scheduler="dpm_sde", steps=4, guidance=1.0)
    assert switch.turns == [0, 0, 1, 1, 2, 2, 0]


def test_each_row_of_dpm_sde_has_the_noise_of_its_own_seed(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    ours, x = make_scheduler("dpm_sde", base.scheduler), torch.ones(2, 4, 2, 2)
    stock = import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    theirs = stock.from_config(ours.config, noise_sampler_seed=[5, 6])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(3)
    got = ours.step(x, ours.timesteps[0], x, generator=generators_of([5, 6]), return_dict=False)[0]
    assert torch.equal(got, theirs.step(x, theirs.timesteps[0], x, return_dict=False)[0])
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("name", ["dpm2", "dpm2_a", "dpm2_karras", "euler_a", "pndm", "euler_a_sgm_uniform"])
def test_a_sampler_that_cannot_read_pictures_is_refused(base: Base, name: str) -> None:
    like = type(base.scheduler).from_config(base.scheduler.config, prediction_type="sample")
    with pytest.raises(RequestError, match=f"which the sampler '{name}' cannot read: choose 'ddim'"):
        make_scheduler(name, like)
    assert make_scheduler("ddim", like).config["prediction_type"] == "sample"
    assert make_scheduler(name, base.scheduler)


def test_lms_that_starts_in_the_middle_goes_where_a_perfect_model_leads(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    scheduler: Any = make_scheduler("lms", base.scheduler)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(8)
    noise = torch.ones(1, 1, 1, 1)
    x = scheduler.sigmas[8] * noise
    for index in range(8, 20):
        x = scheduler.step(noise, scheduler.timesteps[index], x, return_dict=False)[0]
        torch.testing.assert_close(x, scheduler.sigmas[index + 1] * noise, atol=1e-4, rtol=1e-4)
