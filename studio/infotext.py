"""A1111's text about a picture, which Forge, reForge, SD.Next and the sharing sites read and write too.

a prompt, over as many lines as it has <lora:name:0.8>
Negative prompt: what to keep away from
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689, ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEGATIVE = "Negative prompt:"
# Names are bounded, so that a long text without any takes no long time.
_SETTING = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_HASH = re.compile(r"([^,:]{1,200}):\s*([0-9a-fA-F]{8,64})\b")
_FEWEST = 3
"""A last line with fewer settings is prompt, as A1111 decides too."""


@dataclass(frozen=True)
class Infotext:
    """The text taken apart; ``settings`` as written, quotes undone."""

    prompt: str
    negative: str
    settings: Mapping[str, str]


def write(
    prompt: str,
    negative: str,
    loras: Sequence[tuple[str, float, str]],
    settings: Mapping[str, object],
    embeddings: Sequence[tuple[str, str]] = (),
) -> str:
    """The text. ``loras`` are (name, weight, AutoV3 hash), ``embeddings`` (name, hash); ``settings`` come in their order."""
    tags = "".join(f" <lora:{name}:{weight:g}>" for name, weight, _ in loras)
    lines = [prompt + tags] + ([f"{NEGATIVE} {negative}"] if negative else [])
    shown = {**settings}
    if loras:
        shown["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, _, digest in loras)
    if embeddings:
        shown["TI hashes"] = ", ".join(f"{name}: {digest}" for name, digest in embeddings)
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in shown.items()))
    return "\n".join(lines)


def parse(text: str) -> Infotext:
    """Take a text apart; one without settings is all prompt."""
    lines = text.strip().splitlines()
    found = _SETTING.findall(lines[-1]) if lines else []
    if len(found) >= _FEWEST:
        lines.pop()
    else:
        found = []
    at = next((index for index, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[at:]).strip().removeprefix(NEGATIVE).strip()
    return Infotext("\n".join(lines[:at]).strip(), negative, {key.strip(): _unquoted(value) for key, value in found})


def hashes(value: str) -> dict[str, str]:
    """``name: hash, other: hash`` as a table."""
    return {name.strip(): digest.lower() for name, digest in _HASH.findall(value)}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",\n:") else value


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value[1:-1]
    return value
