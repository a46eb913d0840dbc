"""How much memory a training step needs, found by running the base's shape on the meta device: no weights, no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compose.layerwise import cross_layers

if TYPE_CHECKING:
    from studio.base import Base
    from training.config import ConceptConfig

OVERHEAD = 300 * 2**20
"""The libraries themselves."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 1, "lion": 4, "lion8bit": 1, "prodigy": 16, "sgd": 4}
"""State per trained parameter."""


@dataclass(frozen=True)
class Memory:
    """Bytes: ``weights`` of the frozen base, ``adapters`` with gradients and optimiser state, ``activations`` of one batch."""

    weights: int
    adapters: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.activations + OVERHEAD


def estimate(
    base: Base, config: ConceptConfig, layers: Mapping[str, Sequence[str]], size: tuple[int, int], chunks: int = 1
) -> Memory:
    """Memory of training ``layers`` of ``base`` on pictures of ``size`` (width, height), with captions of ``chunks`` chunks. An
    estimate, not a promise."""
    weights = sum(_bytes(model) for model in base.models().values()) + _bytes(base.vae)
    parameters = parameter_count(base, config.rank, layers) + word_count(base, config)
    adapters = parameters * (4 + 4 + OPTIMIZER_BYTES[config.optimizer])
    length = base.context_length * chunks
    row = _row(base, config, layers.get("unet", ()), size, length)
    rows = config.batch
    if config.prior != "none":
        rows += config.prior_rows
    text = _text(base, config, length)
    share = 0.6 if config.precision != "fp32" else 1.0  # norms and softmax stay in single precision under autocast
    return Memory(weights, adapters, int((row * rows + text) * share))


def parameter_count(base: Base, rank: int, layers: Mapping[str, Sequence[str]]) -> int:
    """Trained numbers of a LoRA on ``layers``."""
    total = 0
    for key, names in layers.items():
        for name in names:
            weight: Any = base.models()[key].get_submodule(name).weight
            total += rank * (weight[0].numel() + weight.shape[0])
    return total


def word_count(base: Base, config: ConceptConfig) -> int:
    """Trained numbers of learnt words."""
    if not config.words:
        return 0
    each = config.tokens * (len(cross_layers(base.unet)) if config.layerwise else 1)
    encoders = [base.text_encoder] + ([base.text_encoder_2] if base.text_encoder_2 is not None else [])
    return sum(each * int(encoder.get_input_embeddings().weight.shape[1]) for encoder in encoders)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


class _Attend(torch.autograd.Function):
    """Stands for a fused attention kernel: keeps queries, keys, values and output, and no attention matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class _Processor:
    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        out: Tensor = _Attend.apply(attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        return attn.to_out[0](out)


def _text(base: Base, config: ConceptConfig, length: int) -> int:
    """Bytes kept for the backward pass of the text encoders, when something of the text is learnt, for captions of ``length``
    tokens; in single precision.

    A caption with a layer-wise word is read once for every cross-attention layer; other prompts once.
    """
    if config.train_text == "none":
        return 0
    readings = config.batch * (len(cross_layers(base.unet)) if config.words and config.layerwise else 1)
    readings += config.prior_rows if config.prior != "none" else 0
    total = 0
    for encoder in [base.text_encoder] + ([base.text_encoder_2] if base.text_encoder_2 is not None else []):
        shape = encoder.config
        layers = 2 if config.gradient_checkpointing else int(shape.num_hidden_layers)
        # Queries, keys, values, the output and both norms; the input and the slope of the activation; inputs of LoRA layers.
        numbers = 7 * int(shape.hidden_size) + 2 * int(shape.intermediate_size)
        numbers += 5 * int(shape.hidden_size) if config.text_lora else 0
        total += readings * length * layers * numbers * 4
    return total


def _row(base: Base, config: ConceptConfig, names: Sequence[str], size: tuple[int, int], length: int) -> int:
    """Bytes kept for the backward pass of one picture in single precision."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(base.unet.config)
    unet.set_attn_processor(_Processor())
    unet.requires_grad_(False).train()
    if names:
        inject_adapter_in_model(LoraConfig(r=config.rank, target_modules=list(names)), unet, "estimate")
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # the tensor is held too, or its storage's address could be used again
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock | ResnetBlock2D)]
    outputs: list[int] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out.numel() * out.element_size()))
    factor = base.latent_factor
    width = base.unet.config.cross_attention_dim
    sample = torch.zeros(1, base.latent_channels, size[1] // factor, size[0] // factor, device="meta")
    added: dict[str, Tensor] | None = None
    if base.text_encoder_2 is not None:
        pooled = base.text_encoder_2.config.projection_dim
        added = {"text_embeds": torch.zeros(1, pooled, device="meta"), "time_ids": torch.zeros(1, 6, device="meta")}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        time = torch.zeros(1, dtype=torch.long, device="meta")
        text = torch.zeros(1, length, width, device="meta", requires_grad=config.train_text != "none")
        unet(sample, time, text, added_cond_kwargs=added)
    total = sum(size for size, _ in kept.values())
    if config.gradient_checkpointing:  # only the blocks' outputs stay, and one block is computed again at a time
        return min(total, sum(outputs) + 2 * total // max(len(blocks), 1))
    return total
