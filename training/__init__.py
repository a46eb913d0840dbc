"""Training: losses and loops on accelerate. Importing this room is light; torch comes with the first training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.concept import TrainResult, train_concept
    from training.config import ConceptConfig, make_config
    from training.config_file import load_config
    from training.many import Outcome, configs_of, train_many
    from training.plan import Description, describe

__all__ = [
    "ConceptConfig",
    "Description",
    "Outcome",
    "TrainResult",
    "configs_of",
    "describe",
    "load_config",
    "make_config",
    "train_concept",
    "train_many",
]
_HOMES = {
    "ConceptConfig": "config",
    "Description": "plan",
    "Outcome": "many",
    "TrainResult": "concept",
    "configs_of": "many",
    "describe": "plan",
    "load_config": "config_file",
    "make_config": "config",
    "train_concept": "concept",
    "train_many": "many",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'training' has no attribute '{name}'")
    return getattr(import_module(f"training.{_HOMES[name]}"), name)
