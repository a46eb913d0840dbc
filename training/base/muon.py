"""Muon for matrices and convolutions, Adam for the rest (Jordan et al., 2024; scaling of Liu et al., 2025, eq. 4).

A step along the nearest semi-orthogonal matrix of the momentum uses every direction of a layer alike; on these small
networks it reaches AdamW's loss in about half the pictures. ``torch.optim.Muon`` refuses the four-dimensional weights
convolutions have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """About ``U V^T`` of ``matrix = U S V^T`` (singular values in 0.7..1.2), by the quintic Newton-Schulz iteration.

    Each iteration multiplies X by a polynomial of its Gram matrix G, and all of them commute: so the small G is iterated
    and X is touched twice in all, which for a 192 x 1728 kernel is 2.5 times cheaper than iterating X.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    eye = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    product = eye
    for _ in range(steps):
        factor = torch.addmm(torch.add(a * eye, gram, alpha=b), gram, gram, alpha=c)
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if tall else x


def parameter_groups(model: nn.Module, rate: float, adam_rate: float | None = None) -> list[dict[str, Any]]:
    """Hidden matrices and kernels to Muon; embeddings, biases, norms, first and last layers to Adam."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        edge = any(part in name for part in ("conv_in", "conv_out", "embed", "places", "heads"))
        (matrices if parameter.ndim >= 2 and not edge else others).append(parameter)
    scale = 1.0 if adam_rate is None else adam_rate / rate
    return [
        {"params": matrices, "muon": True, "rate_scale": 1.0},
        {"params": others, "muon": False, "rate_scale": scale},
    ]


class Muon(torch.optim.Optimizer):
    """Groups with ``muon=True`` take orthogonal steps of RMS ``0.2 * lr``, like AdamW's; the others take Adam's."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, lr = self.state[parameter], group["lr"]
                if group["weight_decay"]:
                    parameter.mul_(1 - lr * group["weight_decay"])
                update = _muon if group["muon"] else _adam
                parameter.add_(update(parameter.grad, state, group), alpha=-lr)


def _muon(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    momentum = group["momentum"]
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(grad)
    state["momentum"].lerp_(grad, 1 - momentum)
    direction = torch.lerp(grad, state["momentum"], momentum).flatten(1)
    rows, columns = direction.shape
    return (orthogonalise(direction) * (0.2 * max(rows, columns) ** 0.5)).view_as(grad)


def _adam(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    first, second = group["betas"]
    if "step" not in state:
        state.update(step=torch.zeros(()), mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
    state["step"] += 1
    count = float(state["step"])
    state["mean"].lerp_(grad, 1 - first)
    state["square"].lerp_(grad.square(), 1 - second)
    return (state["mean"] / (1 - first**count)) / ((state["square"] / (1 - second**count)).sqrt() + 1e-8)
