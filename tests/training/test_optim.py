"""Optimisers by name, and learning rates over a run."""

from __future__ import annotations

import io
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from studio.errors import MissingDependencyError, RequestError, UnknownNameError
from tests.training.conftest import Configure
from training.optim import FINAL_RATE, PACKAGES, check_optimizer, make_optimizer, rate_share, rates
from training.plan import prepare


def shares(schedule: str, cycles: int = 1) -> list[float]:
    return [rate_share(step, 100, 10, schedule, cycles) for step in range(100)]


def falls(values: list[float]) -> bool:
    return all(later <= earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial"])
def test_a_schedule_rises_and_then_falls_to_its_end(schedule: str) -> None:
    values = shares(schedule)
    assert values[0] < values[5] < values[10] == 1.0
    assert falls(values[10:])
    assert values[-1] == pytest.approx(FINAL_RATE, abs=0.02)
    assert rate_share(100, 100, 10, schedule) == pytest.approx(FINAL_RATE)


def test_a_constant_rate_and_restarts() -> None:
    assert set(shares("constant")[10:]) == {1.0}
    values = shares("cosine_with_restarts", cycles=3)[10:]
    assert [values[k] for k in (0, 30, 60)] == pytest.approx([1.0, 1.0, 1.0])
    assert all(falls(values[k : k + 30]) and values[k + 29] < 0.1 for k in (0, 30, 60))
    assert rate_share(100, 100, 10, "cosine_with_restarts", 3) == pytest.approx(FINAL_RATE)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD"])
def test_an_optimiser_goes_downhill(configure: Configure, name: str) -> None:
    weight = torch.nn.Parameter(torch.full((4, 3), 2.0))
    optimizer = make_optimizer(configure(optimizer=name), [{"params": [weight], "lr": 0.05, "initial_lr": 0.05}])
    for _ in range(30):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert float(weight.detach().abs().max()) < 1.7


def learnt_up(configure: Configure, name: str, pause: int | None = None) -> torch.Tensor:
    """What 60 steps on the same gradients make of a LoRA's ``up``, ``[16, 4]``; through a checkpoint after ``pause``."""
    config = configure(optimizer=name)
    draw = torch.Generator().manual_seed(0)
    down = torch.nn.Parameter(torch.randn(4, 16, generator=draw) / 4)
    up = torch.nn.Parameter(torch.zeros(16, 4))
    slope = torch.randn(16, 4, generator=draw)

    def fresh() -> torch.optim.Optimizer:
        return make_optimizer(config, [{"params": [up, down], "lr": 1e-4, "initial_lr": 1e-4}])

    optimizer = fresh()
    for step in range(60):
        if step == pause:
            kept = io.BytesIO()
            torch.save(optimizer.state_dict(), kept)
            kept.seek(0)
            optimizer = fresh()
            optimizer.load_state_dict(torch.load(kept, weights_only=True))
        noise = torch.randn(16, 4, generator=draw)
        up.grad, down.grad = slope + noise, torch.zeros_like(down)
        optimizer.step()
    return up.detach()


def test_adafactor_learns_what_begins_at_zero_as_fast_as_others(configure: Configure) -> None:
    """Rates that are scaled by the size of the weights would leave it a thousandth of that."""
    sizes = {name: float(learnt_up(configure, name).square().mean().sqrt()) for name in ("adamw", "adafactor")}
    assert 0.1 < sizes["adafactor"] / sizes["adamw"] < 10
    assert torch.equal(learnt_up(configure, "adafactor", pause=25), learnt_up(configure, "adafactor"))


def test_adafactor_s_arguments_are_checked_and_recorded(configure: Configure) -> None:
    check_optimizer(configure(optimizer="adafactor", optimizer_args={"clip_threshold": 0.5}))
    with pytest.raises(RequestError, match=r"does not take optimizer_args .*: Cannot combine manual `lr`"):
        check_optimizer(configure(optimizer="adafactor", optimizer_args={"relative_step": True}))
    told = prepare(configure(optimizer="adafactor", optimizer_args={"clip_threshold": 0.5})).identity()["optimizer_args"]
    assert told == {"scale_parameter": False, "relative_step": False, "warmup_init": False, "clip_threshold": 0.5}
    assert "optimizer_args" not in prepare(configure()).identity()


@pytest.mark.parametrize(
    ("asked", "module", "made"),
    [
        ("AdamW8bit", "bitsandbytes.optim", "AdamW8bit"),
        ("Lion8bit", "bitsandbytes.optim", "Lion8bit"),
        ("Lion", "lion_pytorch", "Lion"),
        ("Prodigy", "prodigyopt", "Prodigy"),
    ],
)
def test_optional_ones_are_used_where_installed(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, asked: str, module: str, made: str
) -> None:
    """With stand-ins for the packages, which need a GPU or are not installed."""
    seen: list[dict[str, Any]] = []

    class StandIn(torch.optim.SGD):
        def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
            seen.append(options)
            super().__init__(groups)

    for name in {module.partition(".")[0], module}:
        stand_in = ModuleType(name)
        setattr(stand_in, made, StandIn)
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr("training.optim.find_spec", lambda name: object())
    group = {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.1, "initial_lr": 0.1}
    assert isinstance(make_optimizer(configure(optimizer=asked, weight_decay=0.3), [group]), StandIn)
    assert seen[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("training.optim.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=rf"'{name}' needs the package {PACKAGES[name]}: install it, or use"):
        check_optimizer(configure(optimizer=name))


def test_names_of_other_trainers_and_unknown_ones(configure: Configure) -> None:
    assert configure(optimizer="AdamW8bit").optimizer == "adamw8bit"
    assert configure(schedule="constant_with_warmup").schedule == "constant"
    with pytest.raises(RequestError, match="'SGDNesterov' is two options here: optimizer 'sgd', and nesterov: true in"):
        configure(optimizer="SGDNesterov")
    check_optimizer(configure(optimizer="sgd", optimizer_args={"nesterov": True}))
    with pytest.raises(RequestError, match="'optimizer' is 'dadapt'"):
        configure(optimizer="DAdapt")


def test_arguments_reach_the_optimiser_and_win_over_ours(configure: Configure) -> None:
    config = configure(optimizer_args={"betas": [0.8, 0.95], "eps": "1e-6", "amsgrad": True})
    check_optimizer(config)
    optimizer = make_optimizer(config, [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.1, "initial_lr": 0.1}])
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-6, True)
    assert group["weight_decay"] == config.weight_decay


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"beta": [0.9, 0.99]}, UnknownNameError, "argument of optimizer 'adamw' 'beta': did you mean 'betas'"),
        ({"lr": 1e-3}, RequestError, "'lr', which is an option of its own: set learning_rate"),
        ({"weight_decay": 0.1}, RequestError, "an option of its own: set weight_decay"),
        ({"params": 1}, UnknownNameError, "'params'"),
        ({"betas": [2.0, 0.99]}, RequestError, "does not take optimizer_args {'betas': (2.0, 0.99)}: Invalid beta"),
        ({"betas": "high"}, RequestError, "does not take optimizer_args"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    configure: Configure, arguments: dict[str, Any], error: type[RequestError], said: str
) -> None:
    with pytest.raises(error) as caught:
        check_optimizer(configure(optimizer_args=arguments))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rates_of_all_groups_are_told() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.02)]
    optimizer = torch.optim.SGD(groups)
    assert rates(optimizer, ["unet", "text"]) == {"rate": 0.1, "rate/unet": 0.1, "rate/text": 0.02}
    del optimizer.param_groups[1]
    assert rates(optimizer, ["unet"]) == {"rate": 0.1}
    optimizer.param_groups[0]["d"] = torch.tensor(0.5)  # as Prodigy keeps it
    assert rates(optimizer, ["unet"]) == {"rate": 0.1, "rate/d_lr": 0.05}
