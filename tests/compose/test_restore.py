"""Models are as before after an error or a cancel in the middle of the work: routed layers, shallow blocks, processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose import method_named
from compose.bank import Adapter, LoraBank
from compose.cmlora import CMLoRA, refresh_steps
from compose.routes import per_row
from studio.base import Base
from studio.errors import CancelledError
from studio.lora.model import Lora
from tests.compose.test_bank import EVERYWHERE, GRID, inputs, run, snapshot

Sample = Callable[..., Tensor]


@pytest.fixture(scope="module")
def pair(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [Adapter(f"lora {seed}", make_lora(seed, EVERYWHERE + " text_encoder", size=0.1)) for seed in (1, 2)]


@contextmanager
def failing(layer: nn.Module, calls: int = 1) -> Iterator[None]:
    """The pass with the number ``calls`` through ``layer`` raises."""
    seen: list[int] = []

    def hook(*_: Any) -> None:
        seen.append(1)
        if len(seen) == calls:
            raise ZeroDivisionError

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def mixed(base: Base, adapters: list[Adapter], given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A forward of three rows, each with its own mix of LoRAs."""
    with LoraBank.on(base, adapters) as bank:
        bank.route = per_row(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]]))
        bank.at(GRID)
        return run(base.unet, *given)


@pytest.mark.parametrize(
    "layer", ["down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "conv_out"]
)
def test_an_error_inside_a_forward_with_rows_of_their_own(base: Base, pair: list[Adapter], layer: str) -> None:
    given = inputs(base)
    plain, before = run(base.unet, *given), snapshot(base.models())
    with failing(base.unet.get_submodule(layer)), pytest.raises(ZeroDivisionError):
        mixed(base, pair, given)
    assert snapshot(base.models()) == before
    assert torch.equal(run(base.unet, *given), plain)


@pytest.mark.parametrize(
    ("name", "options", "times"),
    [
        ("merge", {}, 1),
        ("composite", {"chunk": 1}, 3),
        ("cmlora", {"chunk": 1, "order": "rotation"}, 3),
        ("attend", {"words": "apple", "thresholds": {}}, 2),
    ],
)
def test_a_cancel_at_the_third_step(
    base: Base, pair: list[Adapter], sample: Sample, name: str, options: dict[str, Any], times: int
) -> None:
    """Where a method asks more than once a step, between its forwards: CMLoRA between two shallow ones, no refresh is due."""
    plain, before = sample(None), snapshot(base.models())
    assert 2 not in refresh_steps(5)
    steps: list[int] = []
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(len(steps))
        return asked.count(2) == times

    method = method_named(name, **options)
    with pytest.raises(CancelledError):
        sample(method, pair, cancelled=cancelled, on_step=lambda event: steps.append(event.step.index))
    assert steps == [0, 1]
    if isinstance(method, CMLoRA):
        assert (method.whole, method.shallow) == (2 + 1, 1 + 1)
    assert snapshot(base.models()) == before
    assert torch.equal(sample(None), plain)


def test_an_error_inside_a_shallow_forward(base: Base, pair: list[Adapter], sample: Sample) -> None:
    """The passes through the last layer: one whole, then one whole and one shallow, then the shallow one that fails."""
    plain, before = sample(None), snapshot(base.models())
    method = CMLoRA.of(order="rotation")
    with failing(base.unet.conv_out, 4), pytest.raises(ZeroDivisionError):
        sample(method, pair)
    assert (method.whole, method.shallow) == (2 + 1, 1)
    assert snapshot(base.models()) == before
    assert torch.equal(sample(None), plain)
