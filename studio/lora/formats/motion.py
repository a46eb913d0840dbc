"""AnimateDiff's MotionLoRA, original names: ``...temporal_transformer...attention_blocks.1.processor.to_q_lora.up.weight``."""

from __future__ import annotations

import re

from studio.lora.formats import processor
from studio.lora.formats.slots import Place, split_slot
from studio.lora.names import unet_path

_ATTENTION = re.compile(r"\.attention_blocks\.([01])\.")


def place(key: str) -> Place | None:
    """The module and slot of one MotionLoRA tensor; None when it is not one. ``attention_blocks.0`` is diffusers' ``attn1``."""
    if ".temporal_transformer." not in key:
        return None
    renamed = key.removeprefix("module.").removeprefix("unet.").replace(".temporal_transformer.", ".")
    renamed = _ATTENTION.sub(lambda match: f".attn{int(match.group(1)) + 1}.", renamed)
    if found := processor.place(renamed):
        return found
    split = split_slot(renamed)
    path = unet_path(split[0]) if split else None
    return Place(f"unet.{path}", split[1]) if split and path else None
