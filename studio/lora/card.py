"""What goes with a LoRA that is given to others: a card for people, and the notes A1111 shows beside it.

A LoRA's metadata is text of a stranger: in the card it stands in code spans and quoted YAML only, so it can be no markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from studio.lora.identity import LoraHeader

BASE_MODELS = {
    "sd15": ("Stable Diffusion 1.x", "stable-diffusion-v1-5/stable-diffusion-v1-5", "SD1"),
    "sdxl": ("Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0", "SDXL"),
    "sd2": ("Stable Diffusion 2", "", "SD2"),
}
"""By family: its name for people, a repository with its base, and A1111's word."""


def card(header: LoraHeader, *, name: str, sha256: str, autov3: str, picture: str, made: Sequence[tuple[str, str]] = ()) -> str:
    """A ``README.md`` as model hubs read it.

    Args:
        header: of the file. name: its title and file name. sha256, autov3: by which programs know it.
        picture: file name of the preview. made: (what, value) of how the preview was made.
    """
    title, repository, _ = BASE_MODELS.get(header.family, (header.family, "", ""))
    facts = [
        ("for", title),
        ("trigger", ", ".join(header.triggers)),
        ("kind", f"{' and '.join(header.kinds)}, rank {', '.join(map(str, header.ranks))}, alpha {header.alpha:g}"),
        ("layers", f"{len(header.layers)} ({', '.join(header.components)})"),
        ("written by", header.trainer),
        ("SHA-256", sha256),
        ("AutoV3", autov3),
    ]
    front = {
        "tags": ["lora", "text-to-image", "diffusers", "template:sd-lora"],
        **({"base_model": repository} if repository else {}),
        **({"instance_prompt": header.triggers[0]} if header.triggers else {}),
        "library_name": "diffusers",
    }
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    lines += [f"# {_words(name)}", "", f"![preview]({picture})", "", *_table(facts)]
    if made:
        lines += ["", "The preview:", "", *_table(made)]
    return "\n".join([*lines, *_use(_plain(name), header.triggers[0] if header.triggers else "your prompt")])


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {_code(value)} |" for key, value in rows if value)]


def _use(name: str, words: str) -> list[str]:
    ways = (
        ("In this studio:", f"studio generate {_shell(words)} --lora {_shell(f'{name}.safetensors')}"),
        ("In A1111, Forge and SD.Next, beside your other LoRAs:", f"{_plain(words)} <lora:{name}:1>"),
        ("In diffusers:", f'pipeline.load_lora_weights(".", weight_name={json.dumps(f"{name}.safetensors")})'),
    )
    return ["", "## Use", *(line for title, code in ways for line in ("", title, "", f"    {code}")), ""]


def a1111_notes(header: LoraHeader, name: str) -> dict[str, object]:
    """What A1111 keeps in ``NAME.json`` beside a LoRA: its family, the words that call it, a weight to begin with."""
    return {
        "description": _plain(name),
        "sd version": BASE_MODELS.get(header.family, ("", "", "Unknown"))[2],
        "activation text": ", ".join(header.triggers),
        "preferred weight": 1.0,
        "notes": "",
    }


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _words(text: str) -> str:
    """Plain words for a heading: letters, digits, and the little that names need."""
    return "".join(c if c.isalnum() or c in " -_.,+" else " " for c in _plain(text))


def _code(text: str) -> str:
    """A code span, in which nothing is markup; a table's column mark is none either."""
    return "`" + _plain(text).replace("`", "'").replace("|", "/") + "`"


def _shell(text: str) -> str:
    return "'" + _plain(text).replace("'", "'\\''") + "'"
