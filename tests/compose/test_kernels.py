"""Kernels of attention: the layout of xformers, and the proof a kernel gives before it is used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.kernels import Kernel, choose, in_xformers_layout, proves_itself, sdpa


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


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Kernel, str]]]:
    """``card(attend)``: what is chosen on a card beside whose torch an xformers with this attention is installed.

    The self-test computes on the processor instead. Without ``attend`` importing ``xformers.ops`` fails.
    """
    real_find, real_test = importlib.util.find_spec, proves_itself

    def on_processor(kernel: Kernel, device: torch.device, dtype: torch.dtype, sizes: Any) -> str:
        return real_test(kernel, torch.device("cpu"), dtype, sizes)

    def chosen(attend: Any = None) -> tuple[Kernel, str]:
        package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
        if attend is not None:
            ops.memory_efficient_attention = attend  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        return choose(torch.device("cuda"), torch.float32, (40, 64))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "xformers" else real_find(name))
    monkeypatch.setattr("compose.kernels.proves_itself", on_processor)
    choose.cache_clear()
    yield chosen
    choose.cache_clear()


def test_xformers_computes_on_a_card_where_it_proves_itself(card: Callable[..., tuple[Kernel, str]]) -> None:
    calls: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[-1])
        return in_layout(q, k, v)

    kernel, said = card(attend)
    assert said == ""
    assert calls == [40, 40, 64, 64]
    q, k, v = (some(2, 3, 5, 8, seed=seed) for seed in range(3))
    torch.testing.assert_close(kernel(q, k, v), sdpa(q, k, v), atol=1e-6, rtol=1e-5)
    assert calls[4:] == [8]
    assert card(attend)[0] is kernel
    assert len(calls) == 5


def test_xformers_that_computes_something_else_is_not_used(card: Callable[..., tuple[Kernel, str]]) -> None:
    kernel, said = card(lambda q, k, v: in_layout(q, k, v) * (1.1 if q.shape[-1] == 64 else 1))
    assert kernel is sdpa
    assert said.startswith("xformers fails its self-test (head size 64: off by ")
    assert said.endswith("): torch's own attention is used")


def test_xformers_without_a_kernel_for_the_card_is_not_used(card: Callable[..., tuple[Kernel, str]]) -> None:
    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this card")

    assert card(refuses) == (
        sdpa,
        "xformers fails its self-test (head size 40: NotImplementedError: no kernel for this card): "
        "torch's own attention is used",
    )


def test_xformers_that_cannot_be_imported_is_not_used(card: Callable[..., tuple[Kernel, str]]) -> None:
    assert card() == (sdpa, "xformers cannot be imported (ImportError): torch's own attention is used")


def test_a_card_without_xformers_says_nothing(card: Callable[..., tuple[Kernel, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert card(in_layout) == (sdpa, "")
