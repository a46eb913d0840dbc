"""ComfyUI: ``diffusion_model.<UNet path>`` and ``text_encoders.clip_l.transformer.<CLIP path>``, with any ending.

OneTrainer's text encoders are called nearly the same, ``clip_l.<CLIP path>``.
"""

from __future__ import annotations

from studio.lora.formats.slots import Place, split_slot
from studio.lora.names import text_path, unet_path

_TEXT_PREFIXES = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.transformer.": "text_encoder",
    "clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
}


def place(key: str) -> Place | None:
    """The module and slot of one ComfyUI tensor; None when it is not one."""
    split = split_slot(key)
    if split is None:
        return None
    head, slot = split
    if head.startswith("diffusion_model."):
        path = unet_path(head.removeprefix("diffusion_model."))
        return Place(f"unet.{path}", slot) if path else None
    for prefix, component in _TEXT_PREFIXES.items():
        if head.startswith(prefix):
            path = text_path(head.removeprefix(prefix))
            return Place(f"{component}.{path}", slot) if path else None
    return None
