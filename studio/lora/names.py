"""Module paths as each trainer spells them, and the one spelling used here.

Here: diffusers' UNet names (``down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q``) and CLIP names without
``text_model.`` (``encoder.layers.0.self_attn.q_proj``). The others: *flattened* names with every dot an underscore (kohya),
and the *LDM* names of the original code (``input_blocks.1.1...``). A flattened name is undone with the words of the grammar,
so no model is needed; the LDM numbering counts two layers a block, as in every Stable Diffusion UNet (1.x, 2.x, XL).
"""

from __future__ import annotations

import re
from functools import lru_cache

_ATTENTION = r"(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)"
_TRANSFORMER = rf"(proj_in|proj_out|transformer_blocks\.\d+\.({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2))"
_RESNET = r"(conv1|conv2|time_emb_proj|conv_shortcut)"
_BLOCK = r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)"
UNET_PATH = re.compile(
    rf"{_BLOCK}\.(attentions|motion_modules|temp_attentions)\.\d+\.{_TRANSFORMER}"
    rf"|{_BLOCK}\.resnets\.\d+\.{_RESNET}"
    rf"|{_BLOCK}\.temp_convs\.\d+\.conv[1-4]\.\d"
    r"|(down_blocks\.\d+\.downsamplers|up_blocks\.\d+\.upsamplers)\.\d+\.conv"
    rf"|transformer_in\.{_TRANSFORMER}"
    r"|conv_in|conv_out|(time_embedding|add_embedding)\.linear_[12]"
)
TEXT_PATH = re.compile(
    r"encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))|text_projection"
    r"|embeddings\.(token_embedding|position_embedding)"
)

# Every word between dots that itself holds an underscore or stands in a path; longest first, so that proj_in wins over proj.
_WORDS = """
    down_blocks up_blocks mid_block resnets attentions motion_modules temp_attentions temp_convs downsamplers upsamplers
    transformer_in transformer_blocks proj_in proj_out attn1 attn2 to_q to_k to_v to_out ff net proj
    conv conv1 conv2 conv3 conv4 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed label_emb op out
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
    embeddings token_embedding position_embedding temporal_transformer attention_blocks
"""
_WORD = re.compile("(" + "|".join(sorted(_WORDS.split(), key=len, reverse=True)) + r"|\d+)(?:_|$)")

_LAYERS_PER_BLOCK = 2
_RESNET_FROM_LDM = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_RESNET_TO_LDM = {ours: theirs for theirs, ours in _RESNET_FROM_LDM.items()}
_TOP_FROM_LDM = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_TOP_TO_LDM = {ours: theirs for theirs, ours in _TOP_FROM_LDM.items()}
_LDM_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)|(middle_block)\.([012])\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")


def is_plain_path(path: str) -> bool:
    """Whether ``path`` is words joined by dots and nothing else: safe as a module name of a model not known here."""
    return _PLAIN.fullmatch(path) is not None


def flatten(path: str) -> str:
    """``a.b_c.0`` as kohya writes it: ``a_b_c_0``."""
    return path.replace(".", "_")


@lru_cache(maxsize=8192)
def unflatten(flat: str) -> str | None:
    """Undo :func:`flatten` with the words of the grammar; None when a word is unknown."""
    parts, place = [], 0
    while place < len(flat):
        word = _WORD.match(flat, place)
        if word is None:
            return None
        parts.append(word.group(1))
        place = word.end()
    return ".".join(parts) or None


def unet_path(path: str) -> str | None:
    """A dotted UNet path of either spelling in diffusers' spelling; None when it is no layer of a UNet."""
    candidate = path if UNET_PATH.fullmatch(path) else ldm_to_diffusers(path)
    return candidate if candidate is not None and UNET_PATH.fullmatch(candidate) else None


def module_key(component: str, path: str) -> str:
    """How LoRA layers name the module ``path`` of a component: ``text_encoder_2.encoder.layers.0...``.

    Transformers 5 keeps an outer ``text_model.`` in text encoders with a projection and in no others; names here never do.
    """
    return f"{component}.{path.removeprefix('text_model.') if component.startswith('text_encoder') else path}"


def text_path(path: str) -> str | None:
    """A dotted CLIP path with or without ``text_model.``, without it; None when it is no layer of a CLIP text encoder."""
    candidate = path.removeprefix("text_model.")
    return candidate if TEXT_PATH.fullmatch(candidate) else None


def ldm_to_diffusers(path: str) -> str | None:
    """``input_blocks.4.1.proj_in`` is ``down_blocks.1.attentions.0.proj_in``; None when the path is not in LDM spelling.

    Input block ``i >= 1`` is layer ``(i - 1) % 3`` of block ``(i - 1) // 3`` (its third is the downsampler), output block
    ``i`` is layer ``i % 3`` of block ``i // 3``. Within one, 0 is the resnet and 1 the attention; a bare ``conv`` or ``op``
    is the resampler.
    """
    if path in _TOP_FROM_LDM:
        return _TOP_FROM_LDM[path]
    match = _LDM_BLOCK.fullmatch(path)
    if match is None:
        return None
    if match.group(5):
        _, _, _, _, _, part, rest = match.groups()
        return f"mid_block.{_MIDDLE[part]}.{_RESNET_FROM_LDM.get(rest, rest)}"
    side, number, part, rest, *_ = match.groups()
    step = _LAYERS_PER_BLOCK + 1
    block, layer = divmod(int(number) - (side == "input_blocks"), step)
    home = "down_blocks" if side == "input_blocks" else "up_blocks"
    if rest == "op" or (rest == "conv" and home == "up_blocks"):
        sampler = "downsamplers" if home == "down_blocks" else "upsamplers"
        return f"{home}.{block}.{sampler}.0.conv"
    if part == "0":
        return f"{home}.{block}.resnets.{layer}.{_RESNET_FROM_LDM.get(rest, rest)}"
    return f"{home}.{block}.attentions.{layer}.{rest}"


def diffusers_to_ldm(path: str, *, attention_blocks: frozenset[int]) -> str | None:
    """Inverse of :func:`ldm_to_diffusers`; None for layers the LDM UNet does not have (motion, temporal).

    Args:
        path: in diffusers' spelling.
        attention_blocks: the up blocks that hold attention: there the upsampler is part 2 of its output block, elsewhere part
            1.
    """
    if path in _TOP_TO_LDM:
        return _TOP_TO_LDM[path]
    for number, name in _MIDDLE.items():
        if path.startswith(f"mid_block.{name}."):
            rest = path.removeprefix(f"mid_block.{name}.")
            return f"middle_block.{number}.{_RESNET_TO_LDM.get(rest, rest)}"
    match = _DIFFUSERS_BLOCK.fullmatch(path)
    if match is None:
        return None
    side, block, kind, layer, rest = match.groups()
    step = _LAYERS_PER_BLOCK + 1
    if kind == "downsamplers":
        return f"input_blocks.{int(block) * step + step}.0.op"
    if kind == "upsamplers":
        place = 2 if int(block) in attention_blocks else 1
        return f"output_blocks.{int(block) * step + step - 1}.{place}.conv"
    position = int(block) * step + int(layer) + int(side == "down_blocks")
    home = "input_blocks" if side == "down_blocks" else "output_blocks"
    if kind == "resnets":
        return f"{home}.{position}.0.{_RESNET_TO_LDM.get(rest, rest)}"
    return f"{home}.{position}.1.{rest}"
