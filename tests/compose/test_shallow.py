"""SDXL's deeper cut, on a UNet of three blocks whose outermost ones have no attention, as SDXL's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter, LoraBank
from compose.cmlora import CMLoRA
from compose.denoise import denoise
from compose.shallow import captured, skipping, usable_cut
from compose.text import encode_pair
from studio.base import Base, load_base
from studio.lora.model import Lora, LoraDelta
from tests.compose.test_cmlora import Oracle, forward
from tests.conftest import layers_of


@pytest.fixture(scope="module")
def xl(tiny_sdxl: Path) -> Base:
    """The tiny SDXL with three blocks a side."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4, 4), norm_num_groups=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    return replace(load_base(tiny_sdxl, device="cpu"), unet=unet.eval().requires_grad_(False))


def attention_lora(base: Base, seed: int) -> Lora:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    found = layers_of({"unet": base.unet}, "attn1 attn2")
    return Lora(
        {name: LoraDelta(some(4, layer.weight.shape[1]), some(layer.weight.shape[0], 4), 2.0) for name, layer in found.items()}
    )


@pytest.mark.parametrize("size", [(8, 16), (9, 13)])
def test_a_deeper_shallow_forward_gives_the_same_bits_and_reaches_attention(xl: Base, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 8, *size, generator=generator), torch.randn(2, 16, 80, generator=generator)
    assert usable_cut(xl.unet) == 2
    with captured(xl.unet, 2) as deep:
        whole = forward(xl, x, text)
    with captured(xl.unet, 1) as near:
        forward(xl, x, text)
    with LoraBank({"unet": xl.unet}, [Adapter("x", attention_lora(xl, 1))]) as bank:
        with skipping(xl.unet, 2, deep[0]):
            assert (forward(xl, x, text) - whole).abs().max() > 0.01
        with skipping(xl.unet, 1, near[0]):  # the outermost blocks alone have nothing that this LoRA could change
            assert torch.equal(forward(xl, x, text), whole)
        bank.route = torch.zeros(1, 1, 1, 1, 1, 1)
        with skipping(xl.unet, 2, deep[0]):
            assert torch.equal(forward(xl, x, text), whole)
    with skipping(xl.unet, 2, deep[0]):
        assert torch.equal(forward(xl, x, text), whole)


def test_cmlora_cuts_deeper_by_itself(xl: Base) -> None:
    adapters = [Adapter(f"lora {seed}", attention_lora(xl, seed)) for seed in range(3)]
    texts = encode_pair(xl, ["a red apple"], ["night"])
    method, oracle = CMLoRA.of(order="rotation"), Oracle.of(order="rotation")
    with LoraBank.on(xl, adapters) as bank:
        got, expected = (
            denoise(xl, *texts, seeds=[0], size=(64, 32), steps=5, guidance=4.0, scheduler="ddim", method=each, bank=bank)
            for each in (method, oracle)
        )
    assert (method.cut, method.whole, method.shallow) == (2, 3 + 2, 10)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
