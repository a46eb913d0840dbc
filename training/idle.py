"""Options that would do nothing: to give one is a misunderstanding, so that it is refused and never passed over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.config import ConceptConfig

Rule = tuple[str, str, bool]
"""An option, what has to be set for it to act, and whether that is not so."""


def idle(config: ConceptConfig) -> str:
    """A sentence on the first option of ``config`` that would do nothing, whatever the base; "" when there is none."""
    words = "train_text to 'embedding' or 'embedding+lora'"
    return _first(
        config,
        (
            ("keep_tokens", "shuffle_caption to true", not config.shuffle_caption),
            ("unmasked_weight", "masks to a folder or 'alpha'", config.masks is None),
            ("huber_c", "loss to 'huber' or 'smooth_l1'", config.loss == "l2"),
            ("huber_schedule", "loss to 'huber' or 'smooth_l1'", config.loss == "l2"),
            ("sigmoid_scale", "timestep_sampling to 'sigmoid'", config.timestep_sampling == "uniform"),
            ("keep_last", "save_every to a number of steps", not config.save_every),
            ("cycles", "schedule to 'cosine_with_restarts'", config.schedule != "cosine_with_restarts"),
            *(
                (key, words, not config.words)
                for key in ("tokens", "layerwise", "token_init", "token_learning_rate", "token_norm")
            ),
        ),
    )


def idle_prior(config: ConceptConfig) -> str:
    """As :func:`idle`, of the options of the prior, once it is settled."""
    none = config.prior == "none"
    return _first(
        config,
        [(key, "prior to 'consistency' or 'images'", none) for key in ("prior_weight", "prior_batch", "prior_prompts")],
    )


def _first(config: ConceptConfig, rules: Iterable[Rule]) -> str:
    for key, needed, nothing in rules:
        if nothing and getattr(config, key) != type(config).model_fields[key].default:
            return f"{key} is given but would do nothing: set {needed}, or leave it out"
    return ""
