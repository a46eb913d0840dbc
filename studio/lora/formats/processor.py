"""diffusers before PEFT: ``[unet.]<attention>.processor.to_q_lora.down.weight``, ``text_encoder...to_q_lora.up.weight``."""

from __future__ import annotations

import re

from studio.lora.formats.slots import Place
from studio.lora.names import text_path, unet_path

_KEY = re.compile(r"(?:unet\.)?(?:module\.)?(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.(weight|alpha)")
_TEXT_COMPONENT = re.compile(r"(text_encoder|text_encoder_2)\.(.+)")


def place(key: str) -> Place | None:
    """The module and slot of one old attention-processor tensor; None when it is not one."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    home, which, side, ending = match.groups()
    slot = side if ending == "weight" else "alpha"
    if text := _TEXT_COMPONENT.fullmatch(home):
        path = text_path(f"{text.group(2)}.{which}_proj")
        return Place(f"{text.group(1)}.{path}", slot) if path else None
    path = unet_path(f"{home}.to_{which}" + (".0" if which == "out" else ""))
    return Place(f"unet.{path}", slot) if path else None
