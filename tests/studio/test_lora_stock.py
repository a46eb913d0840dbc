"""What we write, and what others write, acts in stock diffusers as dense ``dW`` added to the weights does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from studio.lora.dense import dense
from studio.lora.files import check_against, load_lora, module_shapes, read_header
from studio.lora.model import Delta, Lora, LoraDelta
from studio.lora.names import module_key
from studio.lora.write import Layout, save_lora
from tests.studio.original_layout import narrow_configs, random_models

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def make_pipeline(context: int = 12) -> Any:
    """A tiny ``StableDiffusionPipeline`` with SD1.5's block structure; no tokenizer, prompts come as embeddings."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=context,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=context,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=DDIMScheduler(),  # type: ignore[arg-type]
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip


def random_lora(pipeline: Any, *, dora: bool = False, alpha: float = 3.0, text: bool = True, convolutions: bool = True) -> Lora:
    """A LoRA of mixed ranks on every layer that trainers act on."""
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, Delta] = {}
    wanted = {"unet": TARGETS + (CONVOLUTIONS if convolutions else ())} | ({"text_encoder": TEXT_TARGETS} if text else {})
    if text and getattr(pipeline, "text_encoder_2", None) is not None:
        wanted["text_encoder_2"] = TEXT_TARGETS
    for component, endings in wanted.items():
        for name, module in getattr(pipeline, component).named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d) or not name.endswith(endings):
                continue
            out, into, *kernel = module.weight.shape
            rank = 2 if name.endswith(("to_q", "q_proj")) else 4
            layers[module_key(component, name)] = LoraDelta(
                torch.randn(rank, into, *kernel, generator=generator) * 0.3,
                torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.3,
                alpha,
                torch.rand(out, generator=generator) + 0.5 if dora else None,
            )
    return Lora(layers)


def make_xl_pipeline(configs: Path) -> Any:
    """A narrow ``StableDiffusionXLPipeline`` with SDXL's own blocks, whose layers have SDXL's own names."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    tokenizers = {"tokenizer": None, "tokenizer_2": None}
    return StableDiffusionXLPipeline(
        **random_models(configs, "sdxl"), **tokenizers, scheduler=DDIMScheduler(), add_watermarker=False,  # type: ignore[arg-type]
    )  # fmt: skip


def xl_outputs(pipeline: Any) -> Tensor:
    """UNet and both text encoders in one row of numbers."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        one = pipeline.text_encoder(torch.arange(77)[None]).last_hidden_state
        two = pipeline.text_encoder_2(torch.arange(77)[None])
        states = torch.cat([one, two.last_hidden_state], dim=-1)
        added = {"text_embeds": two.text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        sample = pipeline.unet(noise, torch.tensor([500]), states, added_cond_kwargs=added).sample
        return torch.cat([sample.flatten(), one.flatten(), two.last_hidden_state.flatten()])


def outputs(pipeline: Any) -> Tensor:
    """UNet and text encoder in one row of numbers."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        states = pipeline.text_encoder(torch.arange(8)[None]).last_hidden_state
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        return torch.cat([pipeline.unet(noise, torch.tensor([500]), states).sample.flatten(), states.flatten()])


def with_dense_changes(lora: Lora) -> Tensor:
    """Outputs of a fresh pipeline whose weights got ``dW`` added."""
    pipeline = make_pipeline()
    with torch.no_grad():
        for module, delta in lora.layers.items():
            component, _, path = module.partition(".")
            weight = getattr(pipeline, component).get_submodule(path).weight
            weight += dense(delta, weight)
    return outputs(pipeline)


@pytest.fixture
def pipeline() -> Any:
    return make_pipeline()


def assert_stock_agrees(pipeline: Any, path: Path, lora: Lora) -> None:
    before = outputs(pipeline)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    expected = with_dense_changes(lora)
    torch.testing.assert_close(outputs(pipeline), expected, atol=1e-4, rtol=1e-4)
    assert (before - expected).abs().max() > 0.05


def test_our_diffusers_layout_in_stock_diffusers(pipeline: Any, tmp_path: Path) -> None:
    lora = random_lora(pipeline)
    assert_stock_agrees(pipeline, save_lora(tmp_path / "a.safetensors", lora, "diffusers"), lora)


def test_our_diffusers_layout_without_its_metadata(pipeline: Any, tmp_path: Path) -> None:
    """Readers that know nothing of ``lora_adapter_metadata`` take the scale for 1."""
    lora = random_lora(pipeline)
    path = save_lora(tmp_path / "a.safetensors", lora, "diffusers")
    pipeline.load_lora_weights(load_file(path))
    torch.testing.assert_close(outputs(pipeline), with_dense_changes(lora), atol=1e-4, rtol=1e-4)


def test_our_kohya_layout_in_stock_diffusers(pipeline: Any, tmp_path: Path) -> None:
    lora = random_lora(pipeline, convolutions=False)
    assert_stock_agrees(pipeline, save_lora(tmp_path / "a.safetensors", lora, "kohya"), lora)


def test_our_kohya_layout_with_convolutions_in_stock_diffusers(pipeline: Any, tmp_path: Path) -> None:
    lora = random_lora(pipeline, text=False)
    known = {
        name: delta for name, delta in lora.layers.items() if not name.endswith(("conv", "time_emb_proj", "conv_shortcut"))
    }
    assert_stock_agrees(pipeline, save_lora(tmp_path / "a.safetensors", Lora(known), "kohya"), Lora(known))


def test_dora_in_our_diffusers_layout_in_stock_diffusers(pipeline: Any, tmp_path: Path) -> None:
    lora = random_lora(pipeline, dora=True, text=False)
    assert_stock_agrees(pipeline, save_lora(tmp_path / "a.safetensors", lora, "diffusers"), lora)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_both_layouts_of_sdxl_in_stock_diffusers(layout: Layout, tmp_path: Path) -> None:
    configs = narrow_configs(tmp_path / "configs")
    pipeline = make_xl_pipeline(configs)
    lora = random_lora(pipeline, convolutions=False)
    path = save_lora(tmp_path / "xl.safetensors", lora, layout)
    assert read_header(path).family == "sdxl"
    starts = {key.split("_0")[0].split("_4_")[0].partition(".")[0] for key in load_file(path)}
    assert ("lora_unet_input_blocks" in starts, "lora_unet_down_blocks" in starts) == (layout == "kohya", False)
    before = xl_outputs(pipeline)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    got = xl_outputs(pipeline)

    dense_one = make_xl_pipeline(configs)
    with torch.no_grad():
        for module, delta in lora.layers.items():
            component, _, inside = module.partition(".")
            model = getattr(dense_one, component)
            weight = (model.text_model if component == "text_encoder_2" else model).get_submodule(inside).weight
            weight += dense(delta, weight)
    expected = xl_outputs(dense_one)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (before - expected).abs().max() > 0.05


def test_a_file_written_by_stock_diffusers_is_read(pipeline: Any, tmp_path: Path) -> None:
    """``save_lora_weights`` with PEFT's configuration in the metadata, alpha unlike the rank, DoRA."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_out.0", "conv1"], use_dora=True))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            nn.init.uniform_(parameter, 0.1, 0.6)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    config = pipeline.unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config)
    lora = load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert {delta.alpha for delta in lora.layers.values()} == {10.0}  # type: ignore[union-attr]
    torch.testing.assert_close(outputs(pipeline), with_dense_changes(lora), atol=1e-4, rtol=1e-4)


def test_a_unet_adapter_saved_on_its_own_is_read(pipeline: Any, tmp_path: Path) -> None:
    """``unet.save_lora_adapter`` writes bare names and a configuration without prefix."""
    from peft import LoraConfig

    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_k", "ff.net.2"], init_lora_weights=False))
    pipeline.unet.save_lora_adapter(tmp_path)
    lora = load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(outputs(pipeline), with_dense_changes(lora), atol=1e-4, rtol=1e-4)


def test_a_folder_saved_by_peft_is_read(pipeline: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    pipeline.text_encoder = get_peft_model(pipeline.text_encoder, config)
    pipeline.text_encoder.save_pretrained(tmp_path)
    lora = load_lora(tmp_path / "adapter_model.safetensors")
    assert {name.partition(".")[0] for name in lora.layers} == {"text_encoder"}
    torch.testing.assert_close(outputs(pipeline), with_dense_changes(lora), atol=1e-4, rtol=1e-4)


def test_module_shapes_are_those_of_the_models(pipeline: Any, tmp_path: Path) -> None:
    lora = random_lora(pipeline)
    match = check_against(lora, module_shapes(unet=pipeline.unet, text_encoder=pipeline.text_encoder, text_encoder_2=None))
    assert match.complete
    assert match.total == len(lora.layers) > 60
