"""Module names of the real UNets and text encoders survive every spelling. Models are built on the meta device."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from studio.lora.names import diffusers_to_ldm, flatten, is_plain_path, text_path, unet_path, unflatten
from tests.studio.lora_dumps import CONVOLUTIONS, OTHERS, TEXT, UNET, Layer

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
EMBEDDED = {
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (2, 4, 6),
    "cross_attention_dim": 192,
}


@cache
def layer_names(kind: str) -> tuple[str, ...]:
    """Paths of every linear and convolution layer of a model."""
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    with torch.device("meta"):
        if kind == "motion":
            model: nn.Module = UNetMotionModel.from_unet2d(UNet2DConditionModel(cross_attention_dim=768), MotionAdapter())
        else:
            config = {"sd15": {"cross_attention_dim": 768}, "sdxl": SDXL, "embedded": EMBEDDED}[kind]
            model = UNet2DConditionModel(**config)
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "embedded", "motion"])
def test_every_layer_of_a_unet_is_found_again_from_its_flattened_name(kind: str) -> None:
    names = layer_names(kind)
    assert len(names) > 150
    for name in names:
        assert unflatten(flatten(name)) == name
        assert unet_path(name) == name


@pytest.mark.parametrize(("kind", "attention_blocks"), [("sd15", {1, 2, 3}), ("sdxl", {0, 1})])
def test_every_layer_survives_the_original_naming(kind: str, attention_blocks: set[int]) -> None:
    originals = set()
    for name in layer_names(kind):
        original = diffusers_to_ldm(name, attention_blocks=frozenset(attention_blocks))
        assert original is not None, name
        assert unet_path(original) == name
        assert unflatten(flatten(original)) == original
        originals.add(original)
    assert len(originals) == len(layer_names(kind))


@pytest.mark.parametrize(("kind", "count"), [("sd15", 192), ("sdxl", 722)])
def test_the_layers_sd_scripts_trains_are_all_there(kind: str, count: int) -> None:
    """Its log says 192 and 722 modules: linear layers and 1x1 convolutions inside the transformers."""
    assert sum(".attentions." in name for name in layer_names(kind)) == count


@pytest.mark.parametrize("layer", UNET + CONVOLUTIONS + OTHERS, ids=lambda layer: layer.flat)
def test_known_names(layer: Layer) -> None:
    path = layer.module.removeprefix("unet.")
    assert unet_path(layer.ldm) == path
    assert unflatten(layer.flat) == path
    assert diffusers_to_ldm(path, attention_blocks=frozenset({1, 2, 3})) == layer.ldm


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("input_blocks.8.1.transformer_blocks.9.attn2.to_v", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"),
    ],
)
def test_known_names_of_sdxl(original: str, ours: str) -> None:
    assert unet_path(original) == ours
    assert diffusers_to_ldm(ours, attention_blocks=frozenset({0, 1})) == original


@pytest.mark.parametrize("layer", TEXT, ids=lambda layer: layer.flat)
def test_text_encoder_names(layer: Layer) -> None:
    assert text_path(unflatten(layer.flat) or "") == layer.module == text_path(layer.module)


def test_every_layer_of_a_clip_text_encoder_has_a_name() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig())
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == 73
    for name in names:
        assert text_path(unflatten(flatten(name)) or "") == name.removeprefix("text_model.")


@pytest.mark.parametrize(
    "path", ["", "weight", "down_blocks", "down_blocks.0.attentions.0", "a.b", "input_blocks.1", "__class__", "conv_in.x"]
)
def test_what_is_no_layer_has_no_path(path: str) -> None:
    assert unet_path(path) is None
    assert text_path(path) is None


@pytest.mark.parametrize("flat", ["", "down_blocks_x", "downblocks_0", "down_blocks_0_attentions_0_to_qq", "_", "conv_in__"])
def test_a_flattened_name_of_unknown_words_stays_unknown(flat: str) -> None:
    assert unet_path(unflatten(flat) or "") is None


def test_plain_paths_have_no_tricks() -> None:
    assert is_plain_path("transformer_blocks.0.attn.to_q")
    assert not any(is_plain_path(path) for path in ("../x", "a/b", "a..b", "", "a.", "0.a", "a b", "a\n"))
