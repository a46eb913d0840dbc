"""Pictures whose latents do not halve evenly: the UNet rounds up on its way down, and everything here must follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compose import METHODS, method_class, method_named
from compose.attention import Attention
from compose.bank import Adapter
from compose.guidance import tokens_of
from compose.plan import AttentionPlan, Isolation, Regions, Role, Tap, Where
from compose.routes import Grid, spatial
from compose.run import Method, Run
from compose.shallow import captured, skipping
from studio.base import Base
from studio.lora.model import Lora
from studio.requests import Region

Sample = Callable[..., Tensor]
ODD = (40, 24)
"""10 x 6 latent cells, then 5 x 3, then 3 x 2."""
PROMPT = "on the left a red cat a green dog"


@pytest.fixture(scope="module")
def two(make_lora: Callable[..., Lora]) -> list[Adapter]:
    told = [{"trigger": trigger, "class_word": noun} for trigger, noun in (("red", "cat"), ("green", "dog"))]
    return [Adapter(f"lora {i}", make_lora(i, "attn1 attn2 conv1 ff.net", size=0.2, **more)) for i, more in enumerate(told, 1)]


def test_the_stock_pipeline_makes_the_same(tiny_base: Path, base: Base, sample: Sample) -> None:
    from diffusers import StableDiffusionPipeline

    from compose.denoise import generators_of, initial_noise

    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    width, height = ODD
    expected = pipeline(
        "a red apple", negative_prompt="night", width=width, height=height, num_inference_steps=3, guidance_scale=4.0,
        latents=initial_noise(base, generators_of([0]), ODD), output_type="latent",
    ).images  # fmt: skip
    got = sample(None, size=ODD, steps=3)
    assert got.shape[-2:] == (6, 10)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


class Spread(Method):
    """A route that says the same at every place, at a resolution that no layer has."""

    def prepare(self, run: Run) -> None:
        if run.bank is not None:
            run.bank.route = spatial(torch.ones(len(run.bank.adapters), 7, 11))


def test_a_route_over_places_that_is_even_is_a_constant_one(two: list[Adapter], sample: Sample) -> None:
    plain = sample(None, two, size=ODD, steps=2)
    torch.testing.assert_close(sample(Spread(), two, size=ODD, steps=2), plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_plans_and_shallow_forwards_know_the_cells(base: Base) -> None:
    grid = Grid(rows=1, height=6, width=10)
    x, text = torch.randn(1, 8, 6, 10), torch.randn(1, 16, 32)
    plain = base.unet(x, 7, encoder_hidden_states=text).sample
    half = Regions(((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)))
    with Attention(base.unet) as attention:
        attention.at(grid)
        attention.plan = AttentionPlan()
        assert torch.equal(base.unet(x, 7, encoder_hidden_states=text).sample, plain)
        attention.plan = AttentionPlan(
            isolation=Isolation(regions=half), taps=(Tap(name="all", where=Where(role=Role.CROSS, scale=2)),)
        )
        with attention.collecting() as maps:
            base.unet(x, 7, encoder_hidden_states=text)
        assert maps["all"] and all(each.cells == (3, 5) for each in maps["all"])
        assert all(tokens_of(each.layer, len(base.unet.down_blocks), grid) == 15 for each in maps["all"])
    for cut in (1, 2):
        with captured(base.unet, cut) as found:
            base.unet(x, 7, encoder_hidden_states=text)
        with skipping(base.unet, cut, found[0]):
            assert torch.equal(base.unet(x, 7, encoder_hidden_states=text).sample, plain)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_such_a_picture(two: list[Adapter], sample: Sample, name: str) -> None:
    options: dict[str, Any] = {"cmlora": {"order": "rotation"}, "attend": {"refinements": 1}}.get(name, {})
    needed = method_class(name).regions == "required"
    regions = [Region.parse("lora 1@0,0,0.5,1"), Region.parse("lora 2@0.5,0,1,1")] if needed else []
    settings: dict[str, Any] = {"size": ODD, "steps": 3, "prompt": PROMPT, "regions": regions}
    got = sample(method_named(name, **options), two, **settings)
    assert got.shape[-2:] == (6, 10)
    assert (got - sample(None, **settings)).abs().max() > 1e-3
