"""One reader per trainer: where each tensor of a file belongs.

A reader's ``place(key)`` names the module and the *slot* of one tensor (``down``, ``up``, ``alpha``, ``hada_w1_a``, ...) from
its key alone, so the same code serves the header-only look and the real load. Every key of a file is placed, or the file is
refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from studio.embeddings import TOKEN_KEY
from studio.errors import UnknownFormatError
from studio.lora.formats import comfy, diffusers, kohya, lycoris, motion, peft, processor
from studio.lora.formats.slots import Place

Reader = Callable[[str], Place | None]

# The prefixes exclude each other except for bare paths, which come last.
READERS: dict[str, Reader] = {
    "kohya": kohya.place,
    "lycoris": lycoris.place,
    "comfy": comfy.place,
    "processor": processor.place,
    "diffusers": diffusers.place,
    "motion": motion.place,
    "peft": peft.place,
}

_REASONS = (
    (r"\.(diff|diff_b|w_norm|b_norm)$|\.set_weight$", "holds whole weight differences, which are no low-rank adapter"),
    (r"\.on_input$|ia3_", "is an IA3 adapter, which scales activations and is no weight difference"),
    (r"\.oft_|oft_blocks|\.lora_R\b|boft_", "is an OFT adapter, which rotates weights and is no weight difference"),
    (r"^bundle_emb\.", "bundles textual-inversion embeddings, which are not supported inside a LoRA"),
    (r"^emb_params$|string_to_param|^clip_[lg]$", "is a textual-inversion embedding, not a LoRA: use it with --embedding"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", "is a whole checkpoint: use it as --base"),
    (r"double_blocks|single_blocks|joint_blocks|single_transformer_|lora_transformer_", "is for a FLUX or SD3 transformer"),
    (
        r"^(lora_unet_|lycoris_|diffusion_model\.)_?(blocks|layers|transformer_blocks)[._]\d",
        "is for a transformer (Wan, Qwen-Image, Z-Image, ...), not for a UNet as Stable Diffusion has",
    ),
    (r"lora_prior_(unet|te)_", "is for Stable Cascade"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "is a GLoRA adapter, which changes weights by a product with themselves"),
    (r"^(unet|text_encoder):\d+:(up|down)$", "counts its layers instead of naming them, as the first LoRA programs did"),
    (r"lora_te3_", "trains a third text encoder, which no supported base has"),
    (r"lora_[AB]\.(.*\.)?bias$", "trains biases, which are no low-rank adapter"),
    (r"^(?!.*lora).*motion_modules\..*\.(weight|bias)$", "is a whole motion module, not a motion LoRA"),
    (r"lora_controlnet|control_model|input_hint_block", "is a ControlNet, not a LoRA"),
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where every tensor of a file belongs: ``layers[module][slot]`` is its key; ``format`` is the reader of most keys.

    ``tokens`` are the keys of learnt words, which belong to no layer.
    """

    format: str
    layers: dict[str, dict[str, str]]
    tokens: tuple[str, ...] = ()


def place_all(keys: Iterable[str], *, name: str) -> Placement:
    """Place every key of a file.

    Args:
        keys: tensor names.
        name: of the file, for the message.

    Raises:
        UnknownFormatError: some tensor has no place, or two claim the same one; the message names some of them and, where
            known, the kind.
    """
    layers: dict[str, dict[str, str]] = {}
    used: Counter[str] = Counter()
    homeless: list[str] = []
    tokens: list[str] = []
    for key in keys:
        if TOKEN_KEY.fullmatch(key):
            tokens.append(key)
            continue
        found = next(
            ((format_name, place) for format_name, reader in READERS.items() if (place := reader(key)) is not None), None
        )
        if found is None:
            homeless.append(key)
            continue
        format_name, place = found
        used[format_name] += 1
        slots = layers.setdefault(place.module, {})
        if place.slot in slots:
            raise UnknownFormatError(f"{name} names one layer twice: '{slots[place.slot][:100]}' and '{key[:100]}'")
        slots[place.slot] = key
    if homeless:
        raise UnknownFormatError(_complaint(name, homeless, placed=used.total()))
    if not layers and not tokens:
        raise UnknownFormatError(f"{name} holds no tensors")
    return Placement(used.most_common(1)[0][0] if used else "diffusers", layers, tuple(tokens))


def _complaint(name: str, homeless: list[str], placed: int) -> str:
    some = ", ".join(f"'{key[:100]}'" for key in homeless[:3]) + (", ..." if len(homeless) > 3 else "")
    for pattern, reason in _REASONS:
        if any(re.search(pattern, key[:500]) for key in homeless[:200]):
            return f"{name} {reason} ({some})"
    share = f"{len(homeless)} of its {len(homeless) + placed} tensors" if placed else "its tensors"
    return f"{name} is in no LoRA format known here: {share} cannot be placed ({some})"
