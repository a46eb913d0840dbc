"""LoRA layers on a base while it is trained: attached by PEFT, exported as deltas, and gone afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compose.layerwise import reading_layers
from studio.errors import NumericsError, RequestError
from studio.lora.model import LoraDelta
from training.config import SECTIONS, ConceptConfig
from training.words import ENCODERS, LearntWord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft.tuners.lora import LoraLayer

    from studio.base import Base

NAME = "concept"
PEFT = "peft_config"
"""The attribute that PEFT leaves on a model."""
# Transformer2DModel's own projections count as feed-forward: kohya's default set has them too.
ATTENTION = r"\.attn\d+\.(to_q|to_k|to_v|to_out\.0)$"
FEED_FORWARD = r"\.(ff\.net\.0\.proj|ff\.net\.2)$|attentions\.\d+\.proj_(in|out)$"
SELF_ATTENTION = r"\.attn1\.(to_q|to_k|to_v|to_out\.0)$"
RESNETS = r"resnets\.\d+\.conv"
TEXT_ATTENTION = r"\.self_attn\.(q|k|v|out)_proj$"
TEXT_FEED_FORWARD = r"\.mlp\.fc[12]$"
ADVICE = "names are diffusers', such as 'up_blocks.1' or 'mid_block'"
"""For patterns that match nothing: they are often those of another trainer, such as ``input_blocks``."""


def target_names(model: nn.Module, targets: str | Sequence[str], rates: Mapping[str, float]) -> list[str]:
    """Names of the UNet layers a LoRA goes to: linear layers and convolutions selected by ``targets``, without those of rate 0.

    Raises:
        RequestError: nothing is selected, or a pattern of ``targets`` or ``rates`` is in no name.
    """
    patterns: tuple[str, ...] = {
        "attn": (ATTENTION,),
        "attn+ff": (ATTENTION, FEED_FORWARD),
        "image": (SELF_ATTENTION, FEED_FORWARD, RESNETS),
        "all": ("",),
    }.get(targets if isinstance(targets, str) else "", (targets,) if isinstance(targets, str) else tuple(targets))
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not isinstance(targets, str) and (lost := _in_none(patterns, every)) is not None:
        raise RequestError(f"targets holds '{lost}', which is in the name of no layer of this base: {ADVICE}")
    chosen = [name for name in every if any(re.search(pattern, name) for pattern in patterns)]
    if chosen and (lost := _in_none(rates, chosen)) is not None:
        raise RequestError(f"block_rates holds '{lost}', which is in the name of no layer that targets select: {ADVICE}")
    chosen = [name for name in chosen if rate_factor(name, rates) > 0]
    if not chosen:
        shown = targets if isinstance(targets, str) else ", ".join(targets)
        raise RequestError(
            f"targets '{shown}' select no layer of this base: use {', '.join(SECTIONS)} or patterns such as 'attn2'"
        )
    return chosen


def _in_none(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first of ``patterns`` that none of ``names`` holds."""
    return next((pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)), None)


def text_names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the text-encoder layers that go with ``targets``: attention, and the feed-forward unless it is ``attn``."""
    patterns = (TEXT_ATTENTION,) if targets == "attn" else (TEXT_ATTENTION, TEXT_FEED_FORWARD)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(re.search(pattern, name) for pattern in patterns)
    ]


def rate_factor(name: str, rates: Mapping[str, float]) -> float:
    """The learning-rate factor of a layer: that of the first pattern found in its name, else 1."""
    return next((factor for pattern, factor in rates.items() if re.search(pattern, name)), 1.0)


def chosen_layers(base: Base, config: ConceptConfig) -> dict[str, list[str]]:
    """Per model of ``base`` the layers that get a LoRA.

    Raises:
        RequestError: nothing selected, a pattern that matches no layer, or a rank no selected layer can use.
    """
    models = base.models()
    chosen: dict[str, list[str]] = {}
    if config.train_unet:
        chosen["unet"] = target_names(models["unet"], config.targets, config.block_rates)
    if config.text_lora:
        chosen |= {key: text_names(model, config.targets) for key, model in models.items() if key != "unet"}
    if not chosen:
        return chosen
    widest = max(_useful_rank(models[key].get_submodule(name)) for key, names in chosen.items() for name in names)
    if config.rank > widest:
        raise RequestError(f"rank {config.rank} is more than any chosen layer of '{base.name}' can use: give at most {widest}")
    return chosen


def _useful_rank(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return min(weight.shape[0], weight[0].numel())


@dataclass(frozen=True, eq=False)
class Adapters:
    """What is in training: LoRA layers by ``unet.<path>`` or ``text_encoder.<path>``, and the learnt word if there is one."""

    models: Mapping[str, nn.Module]
    layers: Mapping[str, LoraLayer]
    alpha: float
    word: LearntWord | None = None

    def weights(self) -> dict[str, nn.Parameter]:
        """All trained parameters by ``<layer>.down`` and ``<layer>.up``, and ``word.<text encoder>``."""
        found: dict[str, nn.Parameter] = {}
        for key, layer in self.layers.items():
            found[f"{key}.down"] = layer.lora_A[NAME].weight
            found[f"{key}.up"] = layer.lora_B[NAME].weight
        if self.word is not None:
            found |= {f"word.{encoder}": rows for encoder, rows in self.word.vectors.items()}
        return found

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`weights`."""
        with torch.no_grad():
            for key, parameter in self.weights().items():
                parameter.copy_(weights[key])

    def groups(self, config: ConceptConfig) -> list[dict[str, Any]]:
        """Optimiser groups, one per learning rate, in a fixed order; ``initial_lr`` is what a schedule scales."""
        groups: dict[float, list[nn.Parameter]] = {}
        for key, parameter in self.weights().items():
            groups.setdefault(self._rate(key, config), []).append(parameter)
        return [{"params": params, "lr": rate, "initial_lr": rate} for rate, params in groups.items()]

    def labels(self, config: ConceptConfig) -> list[str]:
        """What each of :meth:`groups` learns, for people: ``unet``, ``unet-0.5`` (its factor), ``text``, ``words``."""
        found: dict[float, dict[str, None]] = {}
        for key in self.weights():
            found.setdefault(self._rate(key, config), {})[_label(key, config)] = None
        return ["-".join(parts) for parts in found.values()]

    def _rate(self, key: str, config: ConceptConfig) -> float:
        model, name = key.split(".", 1)
        if model == "unet":
            return config.learning_rate * rate_factor(name, config.block_rates)
        if config.optimizer == "prodigy":  # takes one rate only, and finds the real one
            return config.learning_rate
        if model == "word" and self.word is not None:
            return config.token_learning_rate or self.word.rates[name]
        return config.text_rate

    def held(self) -> AbstractContextManager[None]:
        """Around an optimiser step: what has learnt enough stays as it is."""
        return nullcontext() if self.word is None else self.word.held()

    def deltas(self) -> dict[str, LoraDelta]:
        """The learnt deltas, copied to the CPU in single precision.

        Raises:
            NumericsError: a weight is not finite.
        """
        found = {}
        for key, layer in self.layers.items():
            down, up = (module[NAME].weight.detach().float().cpu().clone() for module in (layer.lora_A, layer.lora_B))
            if not (down.isfinite().all() and up.isfinite().all()):
                raise NumericsError(f"the LoRA weights of {key} became NaN or infinite: lower learning_rate")
            found[key] = LoraDelta(down, up, self.alpha)
        return found

    @contextmanager
    def absent(self) -> Iterator[None]:
        """The base as it was before, for a teacher's forward or a preview; the LoRA layers come back afterwards."""
        with ExitStack() as stack:
            for key, layer in self.layers.items():
                model, path = key.split(".", 1)
                parent_path, _, child = path.rpartition(".")
                parent = self.models[model].get_submodule(parent_path)
                stack.callback(setattr, parent, child, layer)
                setattr(parent, child, layer.get_base_layer())
            yield


def _label(key: str, config: ConceptConfig) -> str:
    model, name = key.split(".", 1)
    if model == "unet":
        factor = rate_factor(name, config.block_rates)
        return model if factor == 1 else f"{model}-{factor:g}"
    if model == "word":
        return "words" if name == ENCODERS[0] else "words_2"
    return "text"


@contextmanager
def attached(base: Base, config: ConceptConfig) -> Iterator[Adapters]:
    """``base`` with fresh LoRA layers in single precision, initialised from the seed alone; on exit the base is as it was."""
    from peft import LoraConfig, inject_adapter_in_model

    chosen = chosen_layers(base, config)
    touched = {*chosen, *(("unet", *ENCODERS) if config.words else ())}
    models = {key: model for key, model in base.models().items() if key in touched}
    layers: dict[str, LoraLayer] = {}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_unchanged(model))
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            for key, names in chosen.items():
                pattern = "|".join(re.escape(name) for name in names)
                inject_adapter_in_model(
                    LoraConfig(r=config.rank, lora_alpha=config.strength, target_modules=pattern), models[key], NAME
                )
                for name in names:
                    layer: Any = models[key].get_submodule(name)
                    layers[f"{key}.{name}"] = layer
        for model in models.values() if config.words else ():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".lora_" in name)
        word = LearntWord.of(base, config) if config.words else None
        if word is not None and config.layerwise:
            stack.enter_context(reading_layers(base.unet))
        adapters = Adapters(models, layers, config.strength, word)
        for parameter in adapters.weights().values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        yield adapters


@contextmanager
def checkpointing(base: Base, config: ConceptConfig) -> Iterator[None]:
    """Gradient checkpointing on the models in training, off again afterwards."""
    if not config.gradient_checkpointing:
        yield
        return
    encoders: list[Any] = [m for key, m in base.models().items() if key != "unet" and config.train_text != "none"]
    base.unet.enable_gradient_checkpointing()
    for encoder in encoders:
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        base.unet.disable_gradient_checkpointing()
        for encoder in encoders:
            encoder.gradient_checkpointing_disable()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """On exit ``model`` has the layers, gradient flags and mode it had on entry, and nothing of PEFT.

    Attributes of others stay: transformers notes on a model that its hidden states are hooked, and without the note it would
    hook them a second time.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = PEFT in vars(model)
    try:
        yield
    finally:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
            parent_path, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent_path), child, layer.get_base_layer())
        if PEFT in vars(model) and not before:
            delattr(model, PEFT)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for module, training in modes.items():
            module.training = training
