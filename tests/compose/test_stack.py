"""What a layer remembers between forwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compose.routes import Kind, Site
from compose.stack import Stack
from studio.lora.model import LoraDelta


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack_of(*ranks: int) -> Stack:
    """LoRAs of these ranks on a linear layer of 6 inputs and 5 outputs."""
    found = [
        (index, 1.0, LoraDelta(some(rank, 6, seed=index), some(5, rank, seed=10 + index), float(rank)))
        for index, rank in enumerate(ranks)
    ]
    return Stack.of(Site("unet.x", Kind.IMAGE), nn.Linear(6, 5), found, len(ranks))


def rows(stack: Stack) -> int:
    return sum(len(up) for _, up in stack.kept.values())


def expected(stack: Stack, x: Tensor, weights: list[float]) -> Tensor:
    out = torch.zeros(len(x), 5)
    for piece in stack.pieces:
        assert stack.down is not None
        assert stack.up is not None
        part = slice(piece.start, piece.stop)
        out = out + weights[piece.index] * piece.scale * x @ stack.down[part].T @ stack.up[part]
    return out


def test_a_schedule_does_not_fill_the_memory() -> None:
    stack, x = stack_of(2, 3), some(4, 6, seed=5)
    for step in range(20):
        weights = [1 - step / 20, step / 20]
        torch.testing.assert_close(stack.add_constant(torch.zeros(4, 5), x, weights), expected(stack, x, weights))
        assert rows(stack) <= 2 * 5
    assert list(stack.kept)[-1] == (1 - 19 / 20, 19 / 20)


@pytest.mark.parametrize("ranks", [(4,), (2, 3), (2, 2, 2, 2, 2), (16, 1, 1, 1), (1, 1, 1, 16), (1, 8, 2, 1, 1)])
@pytest.mark.parametrize("always", [None, 0, -1])
def test_one_set_per_lora_is_remembered(ranks: tuple[int, ...], always: int | None) -> None:
    """Also beside one that always acts, first or last in the stack: those that take turns are not computed again each time."""
    stack = stack_of(*ranks)
    count = len(ranks)
    constant = [] if always is None else [always % count]
    turns = [[float(k == turn or k in constant) for k in range(count)] for turn in range(count)]
    first = [stack.thin_pair(weights) for weights in turns]
    assert len(stack.kept) == count
    assert all(stack.thin_pair(weights) is pair for weights, pair in zip(turns, first, strict=True))
    assert rows(stack) <= stack.room


def test_a_route_of_nothing_is_not_remembered() -> None:
    stack = stack_of(2, 3)
    assert stack.thin_pair([0.0, 0.0]) is None
    assert not stack.kept
