"""LyCORIS used as a library: ``lycoris_<flat path>.``; its kohya-style files (LoHa, LoKr, LoCon) go through that reader."""

from __future__ import annotations

from studio.lora.formats.kohya import place_flat
from studio.lora.formats.slots import Place


def place(key: str) -> Place | None:
    """The module and slot of one ``lycoris_`` tensor; None when it is not one."""
    if not key.startswith("lycoris_"):
        return None
    flat = key.removeprefix("lycoris_")
    return place_flat(flat, "unet") or place_flat(flat, "text_encoder")
