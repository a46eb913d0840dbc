"""What a header gives away: family, trainer, targets, trigger words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from studio.lora.files import read_header
from studio.lora.identity import guess_family, guess_trainer, target, trigger_words
from studio.lora.shapes import LayerInfo
from tests.studio.lora_dumps import kohya

BLOCK = "attentions.0.transformer_blocks.0"
FAMILIES: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("embedded", {f"unet.down_blocks.0.{BLOCK}.attn2.to_k": (64, 192)}),
    ("embedded", {f"unet.down_blocks.0.{BLOCK}.attn1.to_q": (64, 64)}),
    ("embedded", {f"unet.mid_block.{BLOCK}.attn1.to_q": (192, 192)}),
    ("embedded", {"text_encoder.encoder.layers.0.self_attn.q_proj": (192, 192)}),
    ("sd15", {f"unet.mid_block.{BLOCK}.attn2.to_v": (1280, 768)}),
    ("sd15", {f"unet.down_blocks.0.{BLOCK}.attn1.to_q": (320, 320)}),
    ("sd15", {f"unet.up_blocks.3.{BLOCK}.attn1.to_out.0": (320, 320)}),
    ("sdxl", {f"unet.mid_block.{BLOCK}.attn2.to_k": (1280, 2048)}),
    ("sdxl", {f"unet.up_blocks.0.{BLOCK}.attn1.to_q": (1280, 1280)}),
    ("sdxl", {"unet.mid_block.attentions.0.transformer_blocks.7.attn1.to_q": (1280, 1280)}),
    ("sdxl", {"text_encoder_2.encoder.layers.0.mlp.fc1": (5120, 1280)}),
    ("sd2", {f"unet.mid_block.{BLOCK}.attn2.to_k": (1280, 1024)}),
    ("animatediff-motion", {"unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q": (320, 320)}),
    ("animatediff-motion", {"unet.mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q": (1280, 1280)}),
    ("embedded-motion", {"unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q": (64, 64)}),
    ("embedded-motion", {"unet.mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q": (192, 192)}),
    ("transformer", {"transformer.transformer_blocks.0.attn.to_q": (64, 64)}),
    ("unknown", {f"unet.mid_block.{BLOCK}.attn2.to_k": (1280, 999)}),
    ("unknown", {f"unet.mid_block.{BLOCK}.attn1.to_q": (1280, 1280)}),
    ("unknown", {"text_encoder.encoder.layers.0.self_attn.q_proj": (768, 768)}),
]


@pytest.mark.parametrize(("family", "shapes"), FAMILIES)
def test_family_by_shapes(family: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert guess_family({module: LayerInfo("lora", 4, shape) for module, shape in shapes.items()}, {}) == family


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sd_v1"}, "sd15"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd15"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"studio.family": "embedded"}, "embedded"),
        ({"ss_base_model_version": "sd_1.5"}, "sd15"),
        ({"ss_base_model_version": "sdxl_"}, "sdxl"),
        ({"studio.family": "\x1b[2J nice"}, "unknown"),
    ],
)
def test_where_shapes_do_not_tell_the_metadata_may(metadata: dict[str, str], family: str) -> None:
    layers = {f"unet.mid_block.{BLOCK}.attn1.to_q": LayerInfo("lora", 4, (1280, 1280))}
    assert guess_family(layers, metadata) == family


def test_shapes_win_over_claims() -> None:
    layers = {f"unet.mid_block.{BLOCK}.attn2.to_k": LayerInfo("lora", 4, (1280, 768))}
    assert guess_family(layers, {"ss_base_model_version": "sdxl_base_v1-0"}) == "sd15"


@pytest.mark.parametrize(
    ("format_name", "metadata", "trainer"),
    [
        ("kohya", {}, "sd-scripts"),
        ("kohya", {"ss_network_module": "lycoris.kohya"}, "LyCORIS"),
        ("kohya", {"ot_branch": "master", "ot_revision": "abc", "modelspec.implementation": "sgm"}, "OneTrainer"),
        ("processor", {"model_type": "motion_director", "rank": "32"}, "MotionDirector"),
        ("diffusers", {"software": '{"name": "ai-toolkit"}'}, "ai-toolkit"),
        ("diffusers", {"studio.version": "1"}, "studio"),
        ("peft", {}, "PEFT"),
        ("motion", {}, "AnimateDiff"),
    ],
)
def test_trainer(format_name: str, metadata: dict[str, str], trainer: str) -> None:
    assert guess_trainer(format_name, metadata) == trainer


TAGS = {"10_dog": {"sks dog": 9, "grass": 3}, "reg": {"grass": 2, "sky": 1, "x": 0}}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ()),
        ({"studio.trigger": "sks", "modelspec.trigger_phrase": "other"}, ("sks",)),
        ({"modelspec.trigger_phrase": "ohwx person"}, ("ohwx person",)),
        ({"ss_tag_frequency": json.dumps(TAGS)}, ("sks dog", "grass", "sky")),
        ({"ss_dataset_dirs": json.dumps({"10_sks dog": {}, "1_dog": {}})}, ("sks dog", "dog")),
        ({"ss_tag_frequency": "not json", "ss_dataset_dirs": "[1]"}, ()),
        ({"ss_tag_frequency": "[" * 100_000}, ()),
        ({"studio.trigger": "a\x1b[31m\nb" + "c" * 200}, ("a[31mb" + "c" * 74,)),
    ],
)  # fmt: skip
def test_trigger_words(metadata: dict[str, str], words: tuple[str, ...]) -> None:
    assert trigger_words(metadata) == words


def test_targets_are_roles_not_places() -> None:
    assert target(f"unet.down_blocks.0.{BLOCK}.attn1.to_q") == "attn1.to_q"
    assert target("unet.down_blocks.0.attentions.0.proj_in") == "proj_in"
    assert target("unet.up_blocks.0.upsamplers.0.conv") == "conv"
    assert target("unet.conv_in") == "conv_in"
    assert target("text_encoder.encoder.layers.3.self_attn.q_proj") == "self_attn.q_proj"


def test_the_whole_of_a_header(tmp_path: Path) -> None:
    save_file(kohya(alpha=None).tensors, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert (header.format, header.kinds, header.ranks, header.rank, header.alpha) == ("kohya", ("lora",), (4,), 4, 4.0)
    assert header.components == ("text_encoder", "unet")
    assert header.has_text_encoder
    assert {"attn1.to_q", "attn2.to_k", "conv1", "mlp.fc1", "time_emb_proj"} <= set(header.targets)
