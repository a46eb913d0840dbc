"""Numbers that are none end a run before its weights follow them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from studio.errors import NumericsError
from tests.training.conftest import Configure
from training import train_concept
from training.objective import Objective
from training.progress import Progress
from training.state import find


def quiet(progress: Progress) -> None:
    pass


def test_a_diverging_run_says_so(configure: Configure) -> None:
    with pytest.raises(NumericsError, match="lower learning_rate"):
        train_concept(configure(learning_rate=10.0, clip=0, optimizer="sgd", steps=200, rank=16, alpha=1e6), quiet)


@pytest.mark.parametrize(
    ("where", "said"),
    [("prior", "the prior's loss became nan at step 3"), ("gradient", "the norm of the gradients became nan")],
)
def test_what_would_spoil_the_weights_ends_the_run_before_it_does(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, where: str, said: str
) -> None:
    forward, calls = Objective.forward, []

    def broken(self: Objective, *args: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        losses = dict(forward(self, *args))
        if len(calls) == 3 and where == "prior":
            losses["prior"] = losses["prior"] * float("nan")
        elif len(calls) == 3:
            next(iter(self._adapters.weights().values())).register_hook(lambda gradient: gradient * float("nan"))
        return losses

    monkeypatch.setattr(Objective, "forward", broken)
    config = configure(checkpoint_every=1)
    with pytest.raises(NumericsError, match=f"{said}.*: lower learning_rate") as caught:
        train_concept(config, quiet)
    assert "\n" not in str(caught.value)
    kept = find(config.work)
    assert kept is not None and kept.name == "checkpoint-000002"
    assert all(value.isfinite().all() for value in load_file(kept / "weights.safetensors").values())
