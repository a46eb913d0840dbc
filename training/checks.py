"""Checks of a configuration once it is known which base it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from studio.errors import RequestError
from training.idle import idle_prior

if TYPE_CHECKING:
    from studio.base import Base
    from training.config import ConceptConfig


def check_settled(config: ConceptConfig, base: Base) -> None:
    """The checks of values that base and kind may have chosen.

    Raises:
        RequestError: more prior rows than the batch has, options of the prior that would do nothing, or a layer of the text
            encoder or timesteps that the base lacks.
    """
    if nothing := idle_prior(config):
        raise RequestError(nothing)
    steps = timesteps(base)
    for key in ("min_timestep", "max_timestep"):
        value, most = getattr(config, key), steps - (key == "min_timestep")
        if value is not None and value > most:
            raise RequestError(f"{key} {value} is more than the {steps} timesteps of '{base.name}' allow: give at most {most}")
    if config.prior == "consistency" and config.prior_rows > config.batch:
        raise RequestError(
            f"prior_batch {config.prior_rows} is more than batch {config.batch}, but prior 'consistency' compares rows of the "
            f"batch itself: give at most {config.batch}"
        )
    if config.prior == "images" and len(config.prior_prompts) > 1:
        raise RequestError(
            f"prior_prompts holds {len(config.prior_prompts)} prompts, but prior 'images' gives one to all class pictures "
            "without a caption: leave one, and caption the pictures that need another"
        )
    encoders: list[Any] = [model for key, model in base.models().items() if key != "unet"]
    layers = min(int(encoder.config.num_hidden_layers) for encoder in encoders)
    if config.clip_skip > layers:
        raise RequestError(
            f"clip_skip {config.clip_skip} is more than the {layers} layers of the text encoder of '{base.name}'"
        )


def timesteps(base: Base) -> int:
    """How many noise levels ``base`` was trained on."""
    return int(base.scheduler.config["num_train_timesteps"])
