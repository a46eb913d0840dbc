"""Going on from a finished LoRA: its weights as those of a run before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compose.layerwise import cross_layers
from studio.errors import RequestError
from studio.lora.files import load_lora
from studio.lora.model import LoraDelta
from training.words import ENCODERS

if TYPE_CHECKING:
    from studio.base import Base
    from studio.lora.model import Lora
    from training.config import ConceptConfig


@dataclass(frozen=True, eq=False)
class Start:
    """``weights`` by the names of :meth:`training.adapters.Adapters.weights`, single precision; ``sha256`` of the file they
    come from. Empty: a run begins at its own random weights."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sha256: str = ""


def start_of(base: Base, config: ConceptConfig, layers: Mapping[str, Sequence[str]]) -> Start:
    """What ``config.start_from`` gives to a run on ``layers`` of ``base``. The deltas are the file's, whatever alphas it and
    the run have.

    Raises:
        FileError: it is no LoRA that can be read.
        RequestError: it was learnt on another base, or has other layers, words or another rank.
    """
    if config.start_from is None:
        return Start()
    lora, name = load_lora(config.start_from), config.start_from.name
    told = lora.metadata.get("studio.base_sha256", base.sha256)
    if told != base.sha256:
        raise RequestError(
            f"start_from '{name}' was learnt on another base, '{lora.metadata.get('studio.base', told[:10])}', and not on "
            f"'{base.name}': take a LoRA of this base"
        )
    return Start(_layer_weights(lora, name, base, config, layers) | _word_weights(lora, name, base, config), lora.sha256)


def _layer_weights(
    lora: Lora, name: str, base: Base, config: ConceptConfig, layers: Mapping[str, Sequence[str]]
) -> dict[str, Tensor]:
    wanted = {f"{model}.{path}": base.models()[model].get_submodule(path) for model, paths in layers.items() for path in paths}
    odd = sorted(wanted.keys() ^ lora.layers.keys())
    if odd:
        where = "the file" if odd[0] in lora.layers else "this run"
        raise RequestError(
            f"start_from '{name}' has other layers than this run ({len(odd)} differ, '{odd[0]}' is only in {where}): "
            "set targets, block_rates, train_unet and train_text as it was trained"
        )
    weights = {}
    for key, delta in lora.layers.items():
        if not isinstance(delta, LoraDelta) or delta.magnitude is not None:
            raise RequestError(f"start_from '{name}' is no plain LoRA at '{key}': turn it into one with 'studio lora resize'")
        if delta.rank != config.rank:
            raise RequestError(
                f"start_from '{name}' has rank {delta.rank}, but this run {config.rank}: set rank to {delta.rank}"
            )
        shape: torch.Size = wanted[key].weight.shape  # type: ignore[assignment]
        if (delta.up.shape[0], *delta.down.shape[1:]) != tuple(shape):
            raise RequestError(f"start_from '{name}' does not fit '{base.name}' at '{key}': take a LoRA of this base")
        weights[f"{key}.down"] = delta.down
        weights[f"{key}.up"] = delta.up * (delta.scale / (config.strength / config.rank))
    return weights


def _word_weights(lora: Lora, name: str, base: Base, config: ConceptConfig) -> dict[str, Tensor]:
    """The trigger's vectors, which must be as many as the run learns."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    if config.words:
        front = (len(cross_layers(base.unet)), config.tokens) if config.layerwise else (config.tokens,)
        widths = {encoder: _width(model) for encoder, model in base.models().items() if encoder in ENCODERS}
        shapes = {config.trigger: {encoder: (*front, width) for encoder, width in widths.items()}}
    held = {word: {key: tuple(rows.shape) for key, rows in vectors.items()} for word, vectors in lora.tokens.items()}
    if held != shapes:
        raise RequestError(
            f"start_from '{name}' has {_words(held)}, but this run learns {_words(shapes)}: "
            "set trigger, train_text, tokens and layerwise as it was trained"
        )
    return {f"word.{encoder}": rows for vectors in lora.tokens.values() for encoder, rows in vectors.items()}


def _width(encoder: torch.nn.Module) -> int:
    return int(encoder.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def _words(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    if not shapes:
        return "no learnt words"
    return " and ".join(
        f"the word '{word}' as {' and '.join(str(list(shape)) for shape in parts.values())}" for word, parts in shapes.items()
    )
