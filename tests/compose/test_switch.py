"""Which LoRA Switch lets act at each evaluation, with samplers of one and of two evaluations a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter
from compose.denoise import Start
from compose.guidance import begins_step
from compose.run import Run, Step
from compose.schedulers import SAMPLERS
from compose.switch import Switch
from studio.lora.model import Lora

Sample = Callable[..., Tensor]
BETWEEN = ("dpm2", "dpm2_a", "dpm2_karras", "dpmpp_2s", "dpmpp_sde", "dpmpp_sde_karras")
"""Samplers that look between two noise levels."""


@pytest.fixture(scope="module")
def three(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [Adapter(f"lora {seed}", make_lora(seed, "attn2", size=0.2)) for seed in range(3)]


class Watched(Switch):
    """Also notes where the sampler itself says that a step begins, and at which timesteps."""

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.begins: list[bool] = []
        self.seen: list[float] = []

    def before_step(self, run: Run, step: Step) -> None:
        self.begins.append(begins_step(run.scheduler))
        self.seen.append(float(step.timestep))
        super().before_step(run, step)


@pytest.mark.parametrize(
    ("scheduler", "steps", "turns"),
    [
        ("ddim", 4, [0, 1, 2, 0]),
        ("dpmpp_2m", 4, [0, 1, 2, 0]),
        ("pndm", 4, [0, 1, 1, 2, 0]),
        ("heun", 4, [0, 1, 1, 2, 2, 0, 0]),
        ("dpm2", 4, [0, 0, 1, 1, 2, 2, 0]),
        ("dpm2_karras", 4, [0, 0, 1, 1, 2, 2, 0]),
        ("dpm2_a", 4, [0, 0, 1, 1, 2, 2, 0]),
        ("dpmpp_2s", 7, [0, 0, 1, 1, 2, 2, 0]),
        ("dpmpp_2s", 6, [0, 0, 1, 1, 2, 0]),
        ("dpmpp_sde", 7, [0, 0, 1, 1, 2, 2, 0]),
    ],
)
def test_who_acts_at_each_evaluation(
    three: list[Adapter], sample: Sample, scheduler: str, steps: int, turns: list[int]
) -> None:
    switch = Switch.of(tau=1)
    sample(switch, three, scheduler=scheduler, steps=steps, guidance=1.0)
    assert switch.turns == turns


@pytest.mark.parametrize("scheduler", sorted({*SAMPLERS, *BETWEEN}))
@pytest.mark.parametrize("strength", [1.0, 0.8])
def test_levels_are_those_of_the_sampler(three: list[Adapter], sample: Sample, scheduler: str, strength: float) -> None:
    """A new level where a step begins, or where a sampler without looks between levels comes to another timestep."""
    switch = Watched.of(tau=1)
    start: Any = None if strength == 1 else Start(latents=torch.zeros(1, 8, 8, 16), strength=strength)
    sample(switch, three, scheduler=scheduler, steps=5, start=start, guidance=1.0)
    moved = [now != before for before, now in zip(switch.seen, switch.seen[1:], strict=False)]
    new = switch.begins[1:] if scheduler in BETWEEN else moved
    assert switch.levels == [sum(new[:index]) for index in range(len(switch.seen))]
    assert switch.turns == [level % 3 for level in switch.levels]


def test_a_turn_and_the_note_count_steps_not_passes(three: list[Adapter], sample: Sample) -> None:
    notes: list[str] = []
    switch = Switch()
    sample(switch, three, scheduler="dpm2", steps=2, notes=notes)
    assert switch.turns == [0, 0, 1]
    assert notes == ["2 steps with turns of 1 never reach LoRA 'lora 2': take more steps"]
    longer = Switch()
    sample(longer, three[:2], scheduler="dpm2", steps=8)
    assert longer.tau == 2
    assert longer.turns == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 3
