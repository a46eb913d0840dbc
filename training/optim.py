"""Optimisers by name and learning-rate schedules as pure functions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from studio.errors import MissingDependencyError, RequestError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from training.config import ConceptConfig

PACKAGES = {"adamw8bit": "bitsandbytes", "lion8bit": "bitsandbytes", "lion": "lion_pytorch", "prodigy": "prodigyopt"}
"""Optimisers that need an optional package."""
CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adafactor": ("transformers.optimization", "Adafactor"),
    "sgd": ("torch.optim", "SGD"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit"),
    "lion": ("lion_pytorch", "Lion"),
    "prodigy": ("prodigyopt", "Prodigy"),
}
CHOSEN: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"betas": (0.9, 0.99)},
    # Rates as given: scaled by the size of the weights a LoRA would learn next to nothing: half of it begins at zero.
    "adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    "sgd": {"momentum": 0.9},
    "prodigy": {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True},
}
"""Arguments that are ours and not the optimiser's own defaults; ``optimizer_args`` win."""
OWN = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Arguments that are options of their own."""
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


def check_optimizer(config: ConceptConfig) -> None:
    """Refuse an optimiser that is not here, or arguments that it does not take.

    Raises:
        MissingDependencyError: the optimiser's package is not installed.
        UnknownNameError, RequestError: an argument it does not have, or a value that it refuses.
    """
    package = PACKAGES.get(config.optimizer)
    if package and find_spec(package) is None:
        raise MissingDependencyError(f"optimizer '{config.optimizer}' needs the package {package}: install it, or use 'adamw'")
    if not config.optimizer_args:
        return
    for name in config.optimizer_args:
        if name in OWN:
            raise RequestError(f"optimizer_args holds '{name}', which is an option of its own: set {OWN[name]}")
    taken = inspect.signature(_class(config.optimizer)).parameters.values()
    known = [parameter.name for parameter in taken if parameter.name not in ("self", "params", *OWN)]
    for name in config.optimizer_args:
        if name not in known:
            raise UnknownNameError(f"argument of optimizer '{config.optimizer}'", name, known)
    import torch

    try:
        make_optimizer(config, [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": config.learning_rate}])
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(
            f"optimizer '{config.optimizer}' does not take optimizer_args {config.optimizer_args}: {text}"
        ) from None


def make_optimizer(config: ConceptConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser ``config`` names over parameter ``groups``."""
    # Every group has a rate of its own; it is told here too, or arguments that would pass it over would not be refused.
    own = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    made: torch.optim.Optimizer = _class(config.optimizer)(groups, **own, **optimizer_arguments(config))
    return made


def optimizer_arguments(config: ConceptConfig) -> dict[str, Any]:
    """Ours, and those of ``config``, which win."""
    return {**CHOSEN.get(config.optimizer, {}), **config.optimizer_args}


def _class(name: str) -> Any:
    module, made = CLASSES[name]
    return getattr(import_module(module), made)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group ``share`` of its ``initial_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def rates(optimizer: torch.optim.Optimizer, labels: Sequence[str]) -> dict[str, float]:
    """The present rates for a log: ``rate`` of the first group, ``rate/<label>`` of every group where there are several, and
    ``rate/d_lr...``, the real one, of an optimiser that finds a factor ``d`` by itself.
    """
    groups = optimizer.param_groups
    found = {"rate": float(groups[0]["lr"])}
    for label, group in zip(labels, groups, strict=True):
        several = f"-{label}" if len(groups) > 1 else ""
        if several:
            found[f"rate/{label}"] = float(group["lr"])
        if "d" in group:
            found[f"rate/d_lr{several}"] = float(group["d"]) * float(group["lr"])
    return found
