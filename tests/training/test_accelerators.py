"""Which device a training gets, how several processes find each other, and that nothing sticks in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch

from studio.errors import RequestError
from tests.training.conftest import Configure
from training import describe
from training.accelerators import accelerator_for, launched, launcher_notes, smaller


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What accelerate was asked for; its stand-in is one process alone."""
    seen: list[dict[str, Any]] = []

    def stand_in(**arguments: Any) -> Any:
        seen.append(arguments)
        return SimpleNamespace(num_processes=1, device=torch.device("mps"), free_memory=lambda: None)

    monkeypatch.setattr(accelerate, "Accelerator", stand_in)
    return seen


@pytest.mark.parametrize(
    ("cuda", "device", "cpu"), [(False, "auto", True), (True, "auto", False), (True, "cpu", True), (True, "cuda", False)]
)
def test_the_cpu_is_asked_for_where_there_is_nothing_else(
    configure: Configure, no_gpu: None, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    cuda: bool, device: str, cpu: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with accelerator_for(configure(device=device)):
        pass
    assert asked[0]["cpu"] is cpu


def test_processes_that_would_each_train_alone_are_refused(
    configure: Configure, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == 2
    with (
        pytest.raises(RequestError, match="2 processes were started, but on 'mps' each would train alone"),
        accelerator_for(configure()),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with accelerator_for(configure()):
        pass


@pytest.mark.parametrize(
    ("told", "precision", "noted"),
    [("bf16", "fp32", True), ("no", "bf16", True), ("no", "fp32", False), ("bf16", "bf16", False), (None, "bf16", False)],
)
def test_the_launcher_s_precision_does_not_count(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, told: str | None, precision: str, noted: bool
) -> None:
    if told is None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    config = configure(precision=precision)
    notes = launcher_notes(config)
    assert notes == ([f"the launcher's mixed precision is '{told}', but the run's own precision counts, '{precision}'"] * noted)
    assert set(notes) <= set(describe(config).notes)
    with accelerator_for(config) as accelerator:
        assert accelerator.mixed_precision == {"fp32": "no"}.get(precision, precision)


def test_the_device_of_one_training_does_not_stick_to_the_next(configure: Configure) -> None:
    from accelerate.state import PartialState

    with accelerator_for(configure()):
        PartialState._shared_state["device"] = torch.device("meta")
    assert not PartialState._shared_state
    PartialState(cpu=True)
    PartialState._shared_state["device"] = torch.device("meta")  # as somebody else may have left it
    with accelerator_for(configure()) as accelerator:
        assert accelerator.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 8}, "try batch 4 with accumulation 2, gradient"),
        ({"batch": 8, "prior_batch": 8}, "try batch 4 and prior_batch 4 with accumulation 2, gradient"),
        ({"batch": 8, "prior_batch": 4}, "try batch 4 with accumulation 2, gradient"),
        ({"batch": 8, "prior_batch": 8, "prior": "images", "prior_data": "class"}, "try batch 4 with accumulation 2, gradient"),
    ],
)
def test_what_would_need_less_memory_is_not_refused(configure: Configure, changes: dict[str, Any], said: str) -> None:
    assert said in smaller(configure(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"precision": "fp16"}, "needs a CUDA device"), ({"device": "mps"}, "this machine has none that works")],
)
def test_a_dry_run_checks_the_device_too(configure: Configure, no_gpu: None, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        describe(configure(**changes))
