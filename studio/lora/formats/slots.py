"""The ends of tensor names, which trainers mix freely, and the slot each one fills."""

from __future__ import annotations

import re
from typing import NamedTuple


class Place(NamedTuple):
    """Module path with its component (``unet.conv_in``) and the slot of one tensor in that module's delta."""

    module: str
    slot: str


_LYCORIS = (
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"
)
_FIXED = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    **{slot: slot for slot in _LYCORIS.split()},
}
_ENDING = re.compile(r"\.(" + "|".join(re.escape(ending) for ending in sorted(_FIXED, key=len, reverse=True)) + ")$")
# PEFT puts the adapter's name in the middle when a file was not saved by its own function.
_PEFT = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)(?:\.[A-Za-z0-9_-]{1,64})??(?:\.weight)?$")
_PEFT_SLOTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}


def split_slot(key: str) -> tuple[str, str] | None:
    """``("a.b", "down")`` for ``a.b.lora_down.weight``; None when the ending belongs to no delta."""
    if match := _ENDING.search(key):
        return key[: match.start()], _FIXED[match.group(1)]
    if match := _PEFT.search(key):
        complete = match.group(1) == "lora_magnitude_vector" or key.endswith(".weight")
        return (key[: match.start()], _PEFT_SLOTS[match.group(1)]) if complete else None
    return None
