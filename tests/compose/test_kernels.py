"""Kernels of attention: the layout of xformers, and the proof a kernel gives before it is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compose.kernels import choose, in_xformers_layout, proves_itself, sdpa


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_layout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A reference of xformers' contract: ``[B, M, H, K]`` in and out."""
    logits = torch.einsum("bmhk,bnhk->bhmn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhmn,bnhk->bmhk", logits.softmax(-1), v)


def test_large_batches_are_split_for_the_xformers_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compose.kernels.BATCH_LIMIT", 4)
    sizes: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes.append(len(q))
        return in_layout(q, k, v)

    q, k = some(10, 3, 5, 8), some(10, 3, 7, 8, seed=1)
    torch.testing.assert_close(in_xformers_layout(attend)(q, k, k), sdpa(q, k, k), atol=1e-6, rtol=1e-5)
    assert sizes == [4, 4, 2]


def test_a_kernel_must_prove_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, sizes = torch.device("cpu"), (40, 64, 80, 160)
    assert proves_itself(in_xformers_layout(in_layout), cpu, torch.float32, sizes) == ""
    assert proves_itself(in_xformers_layout(in_layout), cpu, torch.bfloat16, sizes) == ""
    assert "off by" in proves_itself(in_xformers_layout(lambda q, k, v: in_layout(q, k, v) * 1.1), cpu, torch.float32, sizes)
    assert "off by nan" in proves_itself(in_xformers_layout(lambda q, k, v: q * float("nan")), cpu, torch.float32, sizes)

    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this card")

    assert "NotImplementedError: no kernel" in proves_itself(in_xformers_layout(refuses), cpu, torch.float32, sizes)
    assert choose(cpu, torch.float32, sizes) == (sdpa, "")
