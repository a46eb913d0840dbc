"""diffusers: ``unet.<path>.lora_A.weight`` or ``.lora.down.weight``, ``text_encoder.<path>...``; transformers by name only.

OneTrainer writes ``unet.`` too, with the original names behind it; its text encoders are placed by the reader of ComfyUI's.
"""

from __future__ import annotations

from studio.lora.formats.slots import Place, split_slot
from studio.lora.names import is_plain_path, text_path, unet_path

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")


def place(key: str) -> Place | None:
    """The module and slot of one diffusers tensor; None when it is not one."""
    split = split_slot(key)
    if split is None:
        return None
    component, _, path = split[0].partition(".")
    if component not in COMPONENTS or not is_plain_path(path):
        return None
    if component.startswith("text_encoder"):
        path = text_path(path) or ""
    elif component == "unet":
        path = unet_path(path) or path
    return Place(f"{component}.{path}", split[1]) if path else None
