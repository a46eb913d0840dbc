"""The memory estimate against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch

from studio.base import Base
from tests.training.conftest import Configure
from training.adapters import attached, chosen_layers
from training.memory import estimate, parameter_count


@pytest.mark.parametrize("targets", ["attn", "all"])
def test_activations_are_what_autograd_keeps(base: Base, configure: Configure, targets: str) -> None:
    config = configure(targets=targets, batch=2)
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with attached(base, config) as adapters:
        base.unet.train()
        own = {parameter.untyped_storage().data_ptr() for parameter in base.unet.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            base.unet(torch.randn(2, 8, 16, 16), torch.tensor([5, 9]), torch.randn(2, 16, 32))
        trained = sum(weight.numel() for weight in adapters.weights().values())
    real = sum(size for key, (size, _) in kept.items() if key not in own)
    layers = chosen_layers(base, config)
    guess = estimate(base, config, layers, (64, 64))
    assert parameter_count(base, config.rank, layers) == trained
    assert guess.adapters == trained * 16
    assert guess.activations == pytest.approx(real, rel=0.25)
