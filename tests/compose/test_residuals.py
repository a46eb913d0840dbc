"""Image conditions: residuals of a random ControlNet and of a T2I-Adapter's shape, everywhere and by region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter
from compose.lora_composer import LoraComposer
from compose.plan import Regions
from compose.residuals import by_region, weighted
from compose.text import Encoded
from studio.base import Base
from studio.lora.model import Lora
from studio.requests import Region

BOTH = (Region.parse("cat@0,0,0.5,1"), Region.parse("dog@0.5,0,1,1"))


@pytest.fixture(scope="module")
def pair(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [Adapter("cat", make_lora(1, size=0.2, trigger="sks")), Adapter("dog", make_lora(2, size=0.2, trigger="red"))]


def close(one: Tensor, other: Tensor, within: float = 1e-4) -> bool:
    return float((one - other).abs().max()) <= within


def test_a_controlnet_and_an_adapter_are_asked_for_each_forwards_own_rows(
    base: Base, sample: Callable[..., Tensor], pair: list[Adapter]
) -> None:
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 8), load_weights_from_unet=False)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    sketch = torch.rand(1, 3, 32, 64)
    rows: list[int] = []

    def control(x: Tensor, timestep: Tensor, encoded: Encoded) -> dict[str, Any]:
        rows.append(len(x))
        with torch.no_grad():
            down, mid = net(x.detach(), timestep, encoded.states, sketch.expand(len(x), -1, -1, -1), return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def adapter(x: Tensor, timestep: Tensor, encoded: Encoded) -> dict[str, Any]:
        shapes = [(16, 8, 16), (32, 4, 8), (48, 2, 4)]
        return {"down_intrablock_additional_residuals": [torch.ones(len(x), *shape) for shape in shapes]}

    def of(residuals: Any) -> Tensor:
        return sample(LoraComposer.of(step=1), pair, regions=BOTH, seeds=[0, 1], steps=3, residuals=residuals)

    plain, controlled = of(None), of(control)
    assert not close(plain, controlled, 1e-2)
    assert set(rows) == {2, 4}  # the noise and guidance passes have conditional rows only
    assert close(of(weighted(control, torch.zeros(8, 16))), plain)
    assert not close(of(adapter), plain, 1e-2)
    assert close(of(weighted(adapter, torch.zeros(8, 16))), plain)


def test_residuals_weigh_by_region() -> None:
    places = Regions(((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)))
    weights = by_region(places, 0.0, [1.0, 0.5], 2, 8)
    assert weights[0].tolist() == [1, 1, 0.75, 0.75, 0.5, 0.5, 0, 0]
    whole = {"mid_block_additional_residual": torch.ones(1, 3, 1, 4), "down": [torch.ones(1, 2, 2, 8)]}
    got = weighted(lambda x, t, e: whole, weights)(torch.zeros(1), torch.zeros(1), None)  # type: ignore[arg-type]
    assert got["mid_block_additional_residual"][0, 0, 0].tolist() == [1, 0.75, 0.5, 0]
    assert torch.equal(got["down"][0][0, 1], weights)
