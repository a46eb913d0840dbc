"""What a header says about a LoRA: family, trainer, rank, alpha, targets, trigger words. Nothing here reads a tensor."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from studio.lora.shapes import LayerInfo

MOTION = "-motion"
_CONTEXT_FAMILY = {192: "embedded", 768: "sd15", 1024: "sd2", 2048: "sdxl"}
_FIRST_BLOCK_FAMILY = {64: "embedded", 320: "sd15"}
_VERSION_FAMILY = (("sdxl", "sdxl"), ("sd_v1", "sd15"), ("sd_1", "sd15"), ("sd_v2", "sd2"), ("sd_2", "sd2"))
_ARCHITECTURE_FAMILY = (("stable-diffusion-xl", "sdxl"), ("stable-diffusion-v1", "sd15"), ("stable-diffusion-v2", "sd2"))
_FORMAT_TRAINER = {
    "kohya": "sd-scripts",
    "lycoris": "LyCORIS",
    "comfy": "ComfyUI",
    "processor": "diffusers before PEFT",
    "diffusers": "diffusers",
    "motion": "AnimateDiff",
    "peft": "PEFT",
}
_FAMILY_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
_TRIGGER_LENGTH = 80
_TRIGGERS = 3

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class LoraHeader:
    """A LoRA file as its header tells it.

    Args:
        path: the file.
        file_bytes: its size.
        format: the reader its keys went through (``kohya``, ``diffusers``, ``peft``, ...).
        family: ``embedded``, ``sd15``, ``sdxl``, ``sd2``, ``animatediff-motion``, ``embedded-motion``, ``transformer`` or
            ``unknown``.
        trainer: the program that wrote it, as far as it says so.
        layers: by module path, ``unet.<path>`` and so on.
        alphas: of every layer; None means the rank.
        metadata: as stored. Text of a stranger: escape it before showing it as HTML or Markdown.
        tensors: how many the file holds.
        tokens: words that stand for learnt vectors in the file.
    """

    path: Path
    file_bytes: int
    format: str
    family: str
    trainer: str
    layers: Mapping[str, LayerInfo]
    alphas: Mapping[str, float | None]
    metadata: Mapping[str, str]
    tensors: int
    tokens: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """``lora``, ``dora``, ``loha``, ``lokr``; several when a file mixes them."""
        return tuple(sorted({info.kind for info in self.layers.values()}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({info.rank for info in self.layers.values()}))

    @property
    def rank(self) -> int:
        """The commonest rank; 0 where nothing but words was learnt."""
        return commonest(info.rank for info in self.layers.values()) if self.layers else 0

    @property
    def alpha(self) -> float:
        """The commonest alpha; a layer without one counts its rank. 0 where nothing but words was learnt."""
        if not self.layers:
            return 0.0
        return commonest(float(self.layers[name].rank if alpha is None else alpha) for name, alpha in self.alphas.items())

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of layer it acts on: ``attn1.to_q``, ``ff.net.2``, ``conv1``, ..."""
        return tuple(sorted({target(module) for module in self.layers}))

    @property
    def components(self) -> tuple[str, ...]:
        """``unet``, ``text_encoder``, ..., as far as it acts on them."""
        return tuple(sorted({module.partition(".")[0] for module in self.layers}))

    @property
    def has_text_encoder(self) -> bool:
        return any(component.startswith("text_encoder") for component in self.components)

    @property
    def triggers(self) -> tuple[str, ...]:
        """Words that call it, likeliest first; empty when the file names none."""
        return trigger_words(self.metadata)


def commonest(numbers: Iterable[Number]) -> Number:
    """The number that occurs most; the larger of two that occur alike."""
    return max(Counter(numbers).items(), key=lambda item: (item[1], item[0]))[0]


def target(module: str) -> str:
    """The role of a layer without its place: ``attn1.to_q`` for ``unet.down_blocks.0...transformer_blocks.0.attn1.to_q``."""
    path = re.sub(
        r"^.*\.(transformer_blocks|resnets|downsamplers|upsamplers|temp_convs|layers)\.\d+\.", "", module.partition(".")[2]
    )
    return re.sub(r"^.*\.(?=proj_(?:in|out)$)", "", path)


def guess_family(layers: Mapping[str, LayerInfo], metadata: Mapping[str, str]) -> str:
    """The family by shapes where they decide, else by what the metadata claims, else ``unknown``."""
    if any(module.startswith("transformer.") for module in layers):
        return "transformer"
    motion = {module: info for module, info in layers.items() if ".motion_modules." in module}
    if motion and all(module in motion or not module.startswith("unet.") for module in layers):
        base = _family_by_width(motion) or (_family_by_claim(metadata) or "").removesuffix(MOTION)
        return {"sd15": "animatediff", "": "animatediff"}.get(base, base) + MOTION
    return _family_by_shape(layers) or _family_by_claim(metadata) or "unknown"


def guess_trainer(format_name: str, metadata: Mapping[str, str]) -> str:
    """The program that wrote the file."""
    module = metadata.get("ss_network_module", "")
    implementation = metadata.get("modelspec.implementation", "") + metadata.get("software", "")
    if "studio.version" in metadata:
        return "studio"
    if module.startswith("lycoris"):
        return "LyCORIS"
    if "ot_revision" in metadata or "ot_branch" in metadata:
        return "OneTrainer"
    for name in ("OneTrainer", "ai-toolkit", "SimpleTuner"):
        if name.lower() in implementation.lower():
            return name
    if metadata.get("model_type") == "motion_director":
        return "MotionDirector"
    return "sd-scripts" if module.startswith("networks.") else _FORMAT_TRAINER[format_name]


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What a prompt should hold: our key, modelspec's, else kohya's commonest tags, else its folder names (``10_sks dog``)."""
    for key in ("studio.trigger", "modelspec.trigger_phrase"):
        if words := _printable(metadata.get(key, "")):
            return (words,)
    tags: Counter[str] = Counter()
    for counts in _json_table(metadata.get("ss_tag_frequency", "")).values():
        if isinstance(counts, dict):
            tags.update({_printable(tag): n for tag, n in counts.items() if type(n) is int})
    if tags:
        return tuple(tag for tag, _ in tags.most_common(_TRIGGERS) if tag)
    folders = (re.sub(r"^\d+_", "", _printable(folder)) for folder in _json_table(metadata.get("ss_dataset_dirs", "")))
    return tuple(folder for folder in folders if folder)[:_TRIGGERS]


def _family_by_shape(layers: Mapping[str, LayerInfo]) -> str | None:
    if any(module.startswith("text_encoder_2.") or ".add_embedding." in module for module in layers):
        return "sdxl"
    for module, info in layers.items():
        if module.startswith("unet.") and module.endswith(("attn2.to_k", "attn2.to_v")) and ".motion_modules." not in module:
            return _CONTEXT_FAMILY.get(info.shape[1], "unknown")
    unet = {module: info for module, info in layers.items() if module.startswith("unet.")}
    if unet:
        return _family_by_width(unet)
    widths = {info.shape[1] for module, info in layers.items() if module.endswith((".q_proj", ".fc1"))}
    families = {_CONTEXT_FAMILY.get(width) for width in widths}
    # SDXL's first text encoder is SD1.5's: a LoRA of it alone does not tell, so the metadata may.
    return families.pop() if len(families) == 1 and families != {"sd15"} else None


def _family_by_width(layers: Mapping[str, LayerInfo]) -> str | None:
    """By the first block's channels, by blocks one family alone has, or by channel counts only the embedded base has."""
    for module, info in layers.items():
        if module.startswith("unet.down_blocks.0.") and module.endswith(("to_q", "to_out.0", "ff.net.2", "proj_out")):
            return _FIRST_BLOCK_FAMILY.get(info.shape[0], "unknown")
        if re.search(r"\.(down_blocks|up_blocks)\.3\.", module):
            return "sd15"
        if re.search(r"\.transformer_blocks\.[1-9]|\.up_blocks\.0\.attentions\.", module) and info.shape[0] % 320 == 0:
            return "sdxl"
    widths = {min(info.shape[:2]) for info in layers.values()}
    return "embedded" if widths and widths <= {8, 64, 128, 192} else None


def _family_by_claim(metadata: Mapping[str, str]) -> str | None:
    family = metadata.get("studio.family", "")
    if _FAMILY_NAME.fullmatch(family):
        return family
    version = metadata.get("ss_base_model_version", "").lower()
    architecture = metadata.get("modelspec.architecture", "").lower()
    for claim, table in ((version, _VERSION_FAMILY), (architecture, _ARCHITECTURE_FAMILY)):
        for start, family in table:
            if claim.startswith(start):
                return family
    return None


def _json_table(text: str) -> dict[str, object]:
    try:
        table = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _printable(text: str) -> str:
    return "".join(character for character in str(text) if character.isprintable())[:_TRIGGER_LENGTH].strip()
