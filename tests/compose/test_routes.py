"""Routes brought to the shape of each kind of layer, against masks that are laid over it by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compose.bank import Adapter, LoraBank
from compose.routes import Grid, Kind, Site, shaped, site_of, spatial
from studio.base import Base
from studio.lora.dense import dense
from studio.lora.model import Lora, LoraDelta


class OneLayer(nn.Module):
    """A model of a single layer, named so that it stands at the wanted site."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        *path, last = name.split(".")
        at: nn.Module = self
        for part in path:
            at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, layer)
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer[0](x)


def low_rank(layer: nn.Linear | nn.Conv2d, seed: int) -> LoraDelta:
    generator = torch.Generator().manual_seed(seed)
    out, *into = layer.weight.shape
    up = torch.randn(out, 2, *(1,) * (len(into) - 1), generator=generator)
    return LoraDelta(down=torch.randn(2, *into, generator=generator), up=up, alpha=1.0)


def masked_oracle(layer: nn.Linear | nn.Conv2d, deltas: list[LoraDelta], weights: list[Tensor], x: Tensor) -> Tensor:
    """``W x + sum_k mask_k * (dW_k x)`` with masks in the shape of the output."""
    out = layer(x)
    for delta, weight in zip(deltas, weights, strict=True):
        bare = copy.deepcopy(layer)
        bare.weight.data = dense(delta, layer.weight.data)
        bare.bias = None
        out = out + weight * bare(x)
    return out


@torch.no_grad()
def check_masked(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, weights: list[Tensor], route: Tensor, grid: Grid) -> None:
    deltas = [low_rank(layer, seed) for seed in range(len(weights))]
    adapters = [Adapter(f"lora {i}", Lora(layers={"unet." + name: delta})) for i, delta in enumerate(deltas)]
    model = OneLayer(name, layer)
    oracle = masked_oracle(layer, deltas, weights, x)
    with LoraBank({"unet": model}, adapters) as bank:
        bank.route = route
        bank.at(grid)
        torch.testing.assert_close(model(x), oracle, atol=1e-5, rtol=1e-4)
        # A route that also has the channel axis goes the wide way and must agree.
        channels = layer.weight.shape[0]
        bank.route = route.expand(*route.shape[:4], channels, route.shape[5])
        torch.testing.assert_close(model(x), oracle, atol=1e-5, rtol=1e-4)


def test_masks_on_image_tokens() -> None:
    masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    grid = Grid(rows=3, height=8, width=12)
    weights = [mask.reshape(1, 24, 1) for mask in masks]
    check_masked("a.attn1.to_q", nn.Linear(5, 7), torch.randn(3, 24, 5), weights, spatial(masks), grid)
    # The mask at latent resolution acts by its area means where the layer is coarser.
    fine = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    check_masked("a.attn1.to_q", nn.Linear(5, 7), torch.randn(3, 24, 5), weights, spatial(fine), grid)


def test_masks_on_convolution_maps() -> None:
    masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    grid = Grid(rows=3, height=8, width=12)
    layer = nn.Conv2d(5, 7, 3, stride=2, padding=1)
    weights = [mask.reshape(1, 1, 4, 6) for mask in masks]
    check_masked("a.downsamplers.0.conv", layer, torch.randn(3, 5, 8, 12), weights, spatial(masks), grid)


def test_text_tokens_and_vectors_take_the_mean_of_a_mask() -> None:
    masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    grid = Grid(rows=3, height=8, width=12)
    means = [mask.mean() for mask in masks]
    check_masked("a.attn2.to_k", nn.Linear(5, 7), torch.randn(3, 9, 5), means, spatial(masks), grid)
    check_masked("a.time_emb_proj", nn.Linear(5, 7), torch.randn(3, 5), means, spatial(masks), grid)


def test_frames_on_temporal_and_on_image_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    route = torch.rand(2, 5, 2, 3, 1, 2, generator=generator)
    grid = Grid(rows=2, height=2, width=3, frames=5)
    temporal = [route[:, :, :, :, 0, k].permute(0, 2, 3, 1).reshape(12, 5, 1) for k in range(2)]
    check_masked("a.motion_modules.0.to_q", nn.Linear(5, 7), torch.randn(12, 5, 5), temporal, route, grid)
    image = [route[:, :, :, :, 0, k].reshape(10, 6, 1) for k in range(2)]
    check_masked("a.attn1.to_q", nn.Linear(5, 7), torch.randn(10, 6, 5), image, route, grid)


def test_sites_of_a_unet(base: Base) -> None:
    kinds = {name: site_of("unet." + name, module).kind for name, module in base.unet.named_modules()}
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    assert kinds[block + "attn1.to_k"] is kinds[block + "attn2.to_q"] is kinds[block + "ff.net.2"] is Kind.IMAGE
    assert kinds[block + "attn2.to_k"] is kinds[block + "attn2.to_v"] is Kind.TEXT
    assert kinds["down_blocks.0.resnets.0.time_emb_proj"] is kinds["time_embedding.linear_1"] is Kind.VECTOR
    assert kinds["down_blocks.0.resnets.0.conv1"] is kinds["conv_in"] is Kind.CONV


def test_odd_sizes_round_up_as_the_unet_does() -> None:
    site = Site("x", Kind.IMAGE)
    route = spatial(torch.rand(1, 9, 5))
    assert shaped(route, site, (1, 15, 4), Grid(rows=1, height=9, width=5)).shape == (1, 15, 1, 1)
    with pytest.raises(ValueError, match="16 tokens are no halving"):
        shaped(route, site, (1, 16, 4), Grid(rows=1, height=9, width=5))
