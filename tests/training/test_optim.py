"""Optimisers by name, and learning rates over a run."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from studio.errors import MissingDependencyError, RequestError, UnknownNameError
from tests.training.conftest import Configure
from training.optim import FINAL_RATE, PACKAGES, check_optimizer, make_optimizer, rate_share, rates


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
