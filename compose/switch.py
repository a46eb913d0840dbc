"""LoRA Switch (Zhong et al., "Multi-LoRA Composition for Image Generation", TMLR 2024, section 3.1): one LoRA at a time.

    k(i) = floor(i / tau) mod n          active LoRA at the 0-based step i, in the order of the request

What is different here:
* ``tau`` is 5 as in the paper, but never so long that a LoRA has fewer than two turns: the paper samples 100 to 200 steps, and
  with 20 of them the fifth LoRA would never act. Set it to have it as it is.
* The published callback fires after a step, so that its first turn lasts tau + 1 steps; here every turn lasts tau.
* Prompts are encoded with the LoRA whose turn it is, not once with the first.
* Samplers that visit a noise level twice keep their LoRA there, and samplers that look between two levels (dpm2, dpm2_a,
  dpmpp_2s, dpmpp_sde) keep the one with which the step began: a turn counts noise levels, not passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

from torch import Tensor

from compose.bank import row_names
from compose.figures import Figure, Schedule
from compose.options import Count
from compose.run import Options, Run, Step
from compose.separate import Separate, SeparateOptions

TAU = 5


class SwitchOptions(SeparateOptions):
    """Options of :class:`Switch`.

    Args:
        tau: steps of one turn. By default the paper's 5, shortened so that each LoRA has at least two turns.
    """

    tau: Count | None = None


def turn_length(steps: int, count: int) -> int:
    """The paper's tau, shortened where ``count`` LoRAs would not have two turns each in ``steps`` steps; at least 1."""
    return max(1, min(TAU, steps // (2 * max(count, 1))))


def active(index: int, count: int, tau: int) -> int:
    """``floor(i / tau) mod n``."""
    return index // tau % count


def levels(scheduler: Any, timesteps: Tensor, skipped: int) -> list[int]:
    """The noise level, counted from 0, at which each of ``timesteps [T]`` stands; ``skipped`` lie before the first.

    Where a sampler looks between levels, those looks count to the level at which their step began. Timesteps would not tell:
    what dpm2_a looks at is the next level but for rounding.
    """
    orders = getattr(scheduler, "order_list", None)
    if orders is not None:
        begins = [orders[skipped + index] == 1 for index in range(len(timesteps))]
    elif hasattr(scheduler, "sigmas_interpol"):
        begins = [index % scheduler.order == 0 for index in range(len(timesteps))]
    else:
        begins = [True, *(timesteps[1:] != timesteps[:-1]).tolist()]
    # A run that starts in the middle begins a step there, whatever the schedule says.
    return list(accumulate(begins[1:], initial=0))


class Switch(Separate):
    """One LoRA per step, in turns."""

    takes: ClassVar[type[Options]] = SwitchOptions
    options: SwitchOptions

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.levels = levels(run.scheduler, run.timesteps, run.skipped)
        count = self.levels[-1] + 1
        self.tau = self.options.tau or turn_length(count, len(self.concepts))
        self.turns: list[int] = []
        if run.bank is not None and (late := self.concepts[-(-count // self.tau) :]):
            unseen = ", ".join(f"'{run.bank.adapters[k].name}'" for k in late)
            run.notes.append(f"{count} steps with turns of {self.tau} never reach LoRA {unseen}: take more steps")

    def before_step(self, run: Run, step: Step) -> None:
        if not self.concepts or run.bank is None:
            return
        now = self.concepts[active(self.levels[step.index], len(self.concepts), self.tau)]
        run.bank.route = self.only(run, now)
        if not self.turns or self.turns[-1] != now:
            run.condition(*self.prompts[now])
        self.turns.append(now)

    def explain(self, run: Run) -> Sequence[Figure]:
        if run.bank is None or not self.turns:
            return ()
        names = row_names(run.bank.adapters)
        rows = {names[k]: [float(turn == k) for turn in self.turns] for k in self.concepts}
        rows |= {names[k]: [1.0] * len(self.turns) for k in self.always}
        return [Schedule(title="Turns", text=f"One LoRA acts at a time, {self.tau} steps long.", rows=rows)]
