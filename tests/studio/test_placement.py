from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import studio.placement
from studio.errors import RequestError
from studio.family import FAMILIES
from studio.placement import Placement, Turns, as_device, as_dtype, fitted, place

XL, TINY = FAMILIES["sdxl"], FAMILIES["embedded"]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one card of 8 GB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(studio.placement, "free_bytes", lambda device: 8 * 10**9)


@pytest.mark.parametrize(
    ("weights", "dtype", "memory", "offload"),
    [
        (10**9, None, "auto", False),
        (10**9, "fp32", "auto", False),
        (2 * 10**9, "fp32", "auto", True),
        (35 * 10**8, None, "auto", True),
        (35 * 10**8, None, "high", False),
        (10**9, None, "low", True),
    ],
)
def test_a_card_that_is_too_small_offloads(card: None, weights: int, dtype: str | None, memory: str, offload: bool) -> None:
    got = fitted(place(XL, None, dtype, memory), lambda: weights)
    assert got == Placement(device=CUDA, dtype=torch.float32 if dtype else torch.float16, memory=memory, offload=offload)


def test_defaults_by_family_and_device(card: None) -> None:
    assert place(TINY).dtype == torch.float32
    assert place(XL, "cpu") == Placement(device=torch.device("cpu"), dtype=torch.float32)
    assert not fitted(place(XL, "cpu", memory="low"), lambda: 0).offload
    assert place(XL, "cuda").device == CUDA
    assert as_dtype("bf16") == torch.bfloat16
    assert as_dtype("auto") is None
    with pytest.raises(RequestError, match="'cuda:3' is not there: this machine has 1, numbered from 0"):
        as_device("cuda:3")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("cuda",), "device 'cuda' is not there: this machine has none that torch can use"),
        (("tpu",), "unknown device 'tpu'"),
        (("meta",), "unknown device 'meta'"),
        (("cpu", "int8"), "unknown dtype 'int8': use auto, float32, float16 or bfloat16"),
        (("cpu", None, "most"), "unknown memory setting 'most': use low, auto or high"),
    ],
)
def test_wrong_words_are_one_sentence(monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match=reason):
        place(XL, *words)


class Moving(nn.Linear):
    """Writes down where it is sent."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(2, 2)
        self.name, self.log = name, log

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append(f"{self.name} to {args[0]}")
        return self


def test_one_model_at_a_time_is_on_the_device() -> None:
    log: list[str] = []
    one, two = Moving("one", log), Moving("two", log)
    whole = nn.Module()
    whole.inner = two
    turns = Turns(torch.device("cpu", 0))
    turns.take(one, [one])
    turns.take(two, [whole.inner])
    log.clear()
    x = torch.ones(1, 2)
    one(x)
    one(x)
    whole.inner(x)
    one(x)
    assert log == ["one to cpu:0", "one to cpu", "two to cpu:0", "two to cpu", "one to cpu:0"]


def test_inputs_come_along() -> None:
    seen: list[Any] = []

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor, *, more: dict[str, torch.Tensor], word: str) -> None:
            seen.extend([x.device.type, more["a"].device.type, word])

    model = Inner()
    Turns(torch.device("meta")).take(model, [model])
    model(torch.ones(1), more={"a": torch.ones(1)}, word="w")
    assert seen == ["meta", "meta", "w"]
