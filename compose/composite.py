"""LoRA Composite (Zhong et al., "Multi-LoRA Composition for Image Generation", TMLR 2024, section 3.2): the mean of all scores.

    e(z, c) = (1/n) sum_k [ e_k(z, 0) + g (e_k(z, c) - e_k(z, 0)) ]        e_k: the UNet with LoRA k alone

Guidance is linear, so the means of both halves are guided once, by the loop.

What is different here:
* All LoRAs are rows of one batched forward; ``chunk`` LoRAs at a time keep memory flat in their number.
* Prompts are encoded with each LoRA alone, not once with all of them.
* LoRAs have weights. The mean of scores is weaker than their sum: ``amplify`` it (:mod:`compose.separate`), or let ``gain``
  multiply every weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor

from compose.bank import row_names
from compose.figures import Figure, Schedule
from compose.run import Options, Run, Step
from compose.separate import Mean, MeanOptions
from studio.requests import Finite


class CompositeOptions(MeanOptions):
    """Options of :class:`Composite`.

    Args:
        gain: multiplies the weights of LoRAs, because a mean is weaker than a sum; the paper has 1.
    """

    gain: Finite = 1.0


class Composite(Mean):
    """The mean of what each LoRA alone predicts."""

    takes: ClassVar[type[Options]] = CompositeOptions
    options: CompositeOptions

    def weights(self, run: Run, concept: int) -> list[float]:
        plain = super().weights(run, concept)
        return [w * self.options.gain if k == concept else w for k, w in enumerate(plain)]

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.concepts:
            return run.forward_guided(x, step.timestep)
        shares = dict.fromkeys(self.concepts, 1 / len(self.concepts))
        return self.mean(run, x, shares, [(self.passes, partial(self.each, run, x, step.timestep))])

    def explain(self, run: Run) -> Sequence[Figure]:
        if run.bank is None or not self.concepts:
            return ()
        share = [1 / len(self.concepts)] * len(run.timesteps)
        names = row_names(run.bank.adapters)
        rows = {names[k]: share for k in self.concepts}
        text = f"Every LoRA predicts alone at each step; the mean counts.{self.told}"
        return [Schedule(title="Shares", text=text, rows=rows)]
