"""diffusers before PEFT, and AnimateDiff's trainers: ``<home>.processor.to_q_lora.down.weight``, also of text encoders.

The layer is the home and the word before ``_lora`` together, so MotionDirector's ``to_out.processor.0_lora`` is ``to_out.0``
and its ``ff.net.0.proj_lora`` is ``ff.net.0.proj``.
"""

from __future__ import annotations

import re

from studio.lora.formats.slots import Place
from studio.lora.names import text_path, unet_path

_KEY = re.compile(r"(?:unet\.)?(?:module\.)?(.+?)(?:\.processor)?\.(\w+)_lora\.(down|up)\.(weight|alpha)")
_TEXT_COMPONENT = re.compile(r"(text_encoder|text_encoder_2)\.(.+)")


def place(key: str) -> Place | None:
    """The module and slot of one old attention-processor tensor; None when it is not one."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    home, leaf, side, ending = match.groups()
    slot = side if ending == "weight" else "alpha"
    if text := _TEXT_COMPONENT.fullmatch(home):
        path = text_path(f"{text.group(2)}.{leaf.removeprefix('to_')}_proj") if leaf.startswith("to_") else None
        return Place(f"{text.group(1)}.{path}", slot) if path else None
    path = unet_path(f"{home}.{leaf}" + (".0" if leaf == "to_out" else ""))
    return Place(f"unet.{path}", slot) if path else None
