"""The memory estimate against what autograd really keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from studio.base import Base
from tests.training.conftest import Configure
from training.adapters import attached, chosen_layers
from training.memory import _text, estimate, parameter_count, word_count
from training.text import Reader


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[int, tuple[int, torch.Tensor]]]:
    """What autograd saves inside but the weights of ``model``, by storage: bytes, and the tensor that keeps it alive."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_learning_words_costs_the_text_encoder_s_memory(base: Base, configure: Configure) -> None:
    """One reading for every cross-attention layer; what autograd keeps is within a third of the estimate."""
    config = configure(train_text="embedding", batch=4, train_unet=False)
    with attached(base, config) as adapters:
        assert adapters.word is not None
        with saved_for_backward(base.text_encoder) as kept:
            Reader(base, [adapters.word.embedding]).read([f"a zqx {word}" for word in ("apple", "cat", "dog", "style")])
    real = sum(size for size, _ in kept.values())
    assert _text(base, config, base.context_length) == pytest.approx(real, rel=0.34)
    plain = configure(batch=4)
    assert _text(base, plain, base.context_length) == 0
    assert parameter_count(base, 2, chosen_layers(base, config)) == 0
    assert word_count(base, config) == next(iter(adapters.word.vectors.values())).numel()


@pytest.mark.parametrize("targets", ["attn", "all"])
def test_activations_are_what_autograd_keeps(base: Base, configure: Configure, targets: str) -> None:
    config = configure(targets=targets, batch=2)
    with attached(base, config) as adapters:
        base.unet.train()
        with saved_for_backward(base.unet) as kept:
            base.unet(torch.randn(2, 8, 16, 16), torch.tensor([5, 9]), torch.randn(2, 16, 32))
        trained = sum(weight.numel() for weight in adapters.weights().values())
    real = sum(size for size, _ in kept.values())
    layers = chosen_layers(base, config)
    guess = estimate(base, config, layers, (64, 64))
    assert parameter_count(base, config.rank, layers) == trained
    assert guess.adapters == trained * 16
    assert guess.activations == pytest.approx(real, rel=0.25)
