"""The names of the tensors in a finished file: those that other programs know, with the same deltas behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compose.bank import Adapter, LoraBank
from studio.base import load_base
from studio.lora.files import load_lora
from studio.lora.model import Lora, LoraDelta
from tests.training.conftest import Configure
from training import train_concept
from training.export import layout_of
from training.progress import Progress


def quiet(progress: Progress) -> None:
    pass


def delta(lora: Lora, key: str) -> torch.Tensor:
    found = lora.layers[key]
    assert isinstance(found, LoraDelta)
    return found.scale * (found.up.flatten(1) @ found.down.flatten(1))


@pytest.mark.parametrize(
    ("asked", "family", "layout"),
    [
        ("auto", "sd15", "kohya"),
        ("auto", "sd2", "kohya"),
        ("auto", "sdxl", "kohya"),
        ("auto", "embedded", "diffusers"),
        ("auto", "some transformer", "diffusers"),
        ("diffusers", "sd15", "diffusers"),
        ("kohya", "embedded", "kohya"),
    ],
)
def test_what_is_left_open_follows_the_family(asked: str, family: str, layout: str) -> None:
    assert layout_of(asked, family) == layout  # type: ignore[arg-type]


def test_stable_diffusion_gets_kohya_s_names_and_both_layouts_hold_the_same(
    configure: Configure, tiny_sd15: Path, tmp_path: Path
) -> None:
    changes = {"base": str(tiny_sd15), "train_text": "embedding+lora", "alpha": 1.0, "save_precision": "fp32", "save_every": 2}
    kohya = train_concept(configure(**changes), quiet).path
    other = tmp_path / "other.safetensors"
    train_concept(configure(**changes, layout="diffusers", output=other), quiet)
    tensors = load_file(kohya)
    plain = {key for key in tensors if not key.startswith("lora_tokens.")}
    assert {key.split(".", 1)[1] for key in plain} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {key.split("_", 2)[1] for key in plain} == {"unet", "te"}
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in plain
    assert {float(tensors[key]) for key in plain if key.endswith(".alpha")} == {1.0}
    assert all(".lora_A." in key or ".lora_B." in key or key.startswith("lora_tokens.") for key in load_file(other))
    assert load_file(kohya.with_name("zqx-000002.safetensors")).keys() == tensors.keys()
    one, two = load_lora(kohya), load_lora(other)
    assert one.layers.keys() == two.layers.keys()
    for key in one.layers:
        torch.testing.assert_close(delta(one, key), delta(two, key))
    assert torch.equal(one.tokens["zqx"]["text_encoder"], two.tokens["zqx"]["text_encoder"])


def test_the_layout_is_no_part_of_a_run_s_identity(configure: Configure, tiny_sd15: Path) -> None:
    config = configure(base=str(tiny_sd15), steps=1)
    told = load_lora(train_concept(config, quiet).path).metadata["studio.config"]
    assert "layout" not in json.loads(told)
    again = train_concept(config.model_copy(update={"layout": "diffusers"}), quiet)
    assert again.losses == ()


@pytest.mark.parametrize("targets", ["attn+ff", "image", "all"])
def test_stock_diffusers_reads_kohya_s_names(configure: Configure, tiny_sd15: Path, targets: str) -> None:
    from diffusers import StableDiffusionPipeline

    changes = {"learning_rate": 1e-2, "save_precision": "fp32", "alpha": 1.0, "prior": "none", "targets": targets}
    path = train_concept(configure(base=str(tiny_sd15), **changes), quiet).path
    base = load_base(tiny_sd15, device="cpu")
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None, requires_safety_checker=False)
    stock.load_lora_weights(str(path.parent), weight_name=path.name)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        plain, theirs = base.unet(x, torch.tensor([5]), text).sample, stock.unet(x, torch.tensor([5]), text).sample
        with LoraBank.on(base, [Adapter(name="zqx", lora=load_lora(path))]):
            ours = base.unet(x, torch.tensor([5]), text).sample
    assert not torch.allclose(plain, ours, atol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
