"""PEFT's own files: ``base_model.model.<path>.lora_A.weight``, or the bare path; the path tells UNet from text encoder."""

from __future__ import annotations

from studio.lora.formats.slots import Place, split_slot
from studio.lora.names import text_path, unet_path


def place(key: str) -> Place | None:
    """The module and slot of one PEFT tensor; None when it is not one.

    LoKr is left out: PEFT scales it by ``alpha / r`` of a config even where LyCORIS does not, so its strength would be a guess.
    """
    split = split_slot(key)
    if split is None or split[1].startswith("lokr_"):
        return None
    bare = split[0].removeprefix("base_model.model.")
    if path := unet_path(bare):
        return Place(f"unet.{path}", split[1])
    if path := text_path(bare):
        return Place(f"text_encoder.{path}", split[1])
    return None
