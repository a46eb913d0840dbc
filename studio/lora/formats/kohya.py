"""kohya's sd-scripts and all that write like it: ``lora_unet_<flat path>.lora_down.weight``, in diffusers' or LDM spelling."""

from __future__ import annotations

from studio.lora.formats.slots import Place, split_slot
from studio.lora.names import text_path, unet_path, unflatten

PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


def place(key: str) -> Place | None:
    """The module and slot of one kohya tensor; None when it is not one."""
    for prefix, component in PREFIXES.items():
        if key.startswith(prefix):
            return place_flat(key.removeprefix(prefix), component)
    return None


def place_flat(key: str, component: str) -> Place | None:
    """A flattened path with its ending, of a known component."""
    split = split_slot(key)
    dotted = unflatten(split[0]) if split else None
    if split is None or dotted is None:
        return None
    path = unet_path(dotted) if component == "unet" else text_path(dotted)
    return Place(f"{component}.{path}", split[1]) if path else None
