"""Optimisers by name and learning-rate schedules as pure functions."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from studio.errors import MissingDependencyError

if TYPE_CHECKING:
    import torch

    from training.config import ConceptConfig

PACKAGES = {"adamw8bit": "bitsandbytes", "lion8bit": "bitsandbytes", "lion": "lion_pytorch", "prodigy": "prodigyopt"}
"""Optimisers that need an optional package."""
FINAL_RATE = 0.05
"""What a falling schedule ends at, as a share of the full rate: the last steps should still do something."""


def rate_share(step: int, steps: int, warmup: int, schedule: str, cycles: int = 1) -> float:
    """Share of the full learning rate at ``step`` (from 0): linear warm-up, then constant, or falling to :data:`FINAL_RATE`.

    ``cosine_with_restarts`` falls ``cycles`` times; ``polynomial`` falls as the square of what is left.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if schedule == "cosine":
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "cosine_with_restarts":
        turn = done * cycles % 1 if done < 1 else 1.0
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * turn))
    if schedule == "polynomial":
        return FINAL_RATE + (1 - FINAL_RATE) * (1 - done) ** 2
    if schedule == "linear":
        return 1 - (1 - FINAL_RATE) * done
    return 1.0


def check_optimizer(name: str) -> None:
    """Refuse an optimiser that is not here.

    Raises:
        MissingDependencyError: the optimiser's package is not installed.
    """
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise MissingDependencyError(f"optimizer '{name}' needs the package {package}: install it, or use 'adamw'")


def make_optimizer(config: ConceptConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser ``config`` names over parameter ``groups``."""
    import torch

    check_optimizer(config.optimizer)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, weight_decay=config.weight_decay)
    if config.optimizer == "lion8bit":
        from bitsandbytes.optim import Lion8bit

        return Lion8bit(groups, weight_decay=config.weight_decay)
    if config.optimizer == "lion":
        from lion_pytorch import Lion

        return Lion(groups, weight_decay=config.weight_decay)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=config.weight_decay)
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, weight_decay=config.weight_decay, decouple=True, use_bias_correction=True, safeguard_warmup=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group ``share`` of its ``initial_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
