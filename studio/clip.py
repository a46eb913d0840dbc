"""CLIP as checkpoints hold it: the tokenizer that every Stable Diffusion shares, and text encoders in the original layouts."""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from studio.errors import DamagedFileError
from studio.paths import assets

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONTEXT = 77
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

# OpenCLIP's names, and the parts of its resblocks, in transformers' spelling.
_OPEN_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)(?:\.|_)(weight|bias)")
_SILENT = ("logit_scale", "attn_mask")
"""Tensors of OpenCLIP that the encoding of text does not use."""


def clip_tokenizer(*, pad: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer, from the shipped merges. SDXL's second text encoder was trained with ``!`` as padding."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary(assets() / "configs" / "clip" / "merges.txt.gz")
    return CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), bos_token=BEGIN, eos_token=END, unk_token=END, pad_token=pad,
        model_max_length=CONTEXT,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids follow from the merges: 256 bytes, the same at the end of a word, one per merge, begin and end."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(left + right for left, right in merges), BEGIN, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def byte_symbols() -> list[str]:
    """The stand-ins for bytes that byte-level BPE uses: printable bytes stand for themselves, the rest follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(rest)]


def clip_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder in OpenAI's layout (``text_model.encoder...``) in that of transformers 5."""
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in bare.items() if not name.endswith("position_ids")}


def open_clip_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP text encoder in the layout of ``CLIPTextModelWithProjection``.

    Query, key and value lie in one matrix there, and the projection is stored transposed.

    Raises:
        DamagedFileError: a tensor that has no place.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _OPEN_TOP:
            found[f"text_model.{_OPEN_TOP[name]}"] = tensor
        elif name == "text_projection":
            found["text_projection.weight"] = tensor.T.contiguous()
        elif match := _OPEN_BLOCK.fullmatch(name):
            number, part, kind = match.groups()
            home = f"text_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{home}.self_attn.{letter}_proj.{kind}"] = third.clone()
            elif part in _OPEN_PARTS:
                found[f"{home}.{_OPEN_PARTS[part]}.{kind}"] = tensor
            else:
                raise DamagedFileError(f"a text encoder with the unknown part '{name[:80]}'")
        elif name not in _SILENT:
            raise DamagedFileError(f"a text encoder with the unknown part '{name[:80]}'")
    return found


def build(cls: Any, config: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A text encoder of class ``cls`` with exactly these weights.

    Raises:
        RuntimeError: weights that are missing, superfluous or of another shape.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = cls(cls.config_class.from_pretrained(config))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    return model
