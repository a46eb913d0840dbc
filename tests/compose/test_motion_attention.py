"""Attention in a UNet with motion modules (AnimateDiff): layers that look along frames beside those that look at places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose.attention import Attention, attention_layers, role_of
from compose.kernels import Kernel
from compose.plan import AttentionPlan, KeyFrames, Role, Tap, Where, columns
from compose.routes import Grid
from studio.errors import RequestError
from tests.compose.test_attention import Largest

ROWS, FRAMES = 2, 3
TEMPORAL = Where(role=Role.TEMPORAL)


def inputs(height: int = 8, width: int = 12, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(rows, 4, FRAMES, height, width, generator=generator)
    text = torch.randn(rows, 16, 32, generator=generator).repeat_interleave(FRAMES, 0)  # as the stock pipeline gives it
    return clip, torch.tensor(500), text


def run(unet: nn.Module, *given: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = unet(*given, return_dict=False)[0]
    return out


@pytest.fixture(scope="module")
def motion() -> nn.Module:
    """A tiny random AnimateDiff: two levels, 2 heads of 8 and of 16."""
    from diffusers import UNetMotionModel

    torch.manual_seed(0)
    unet = UNetMotionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip
    return unet.eval().requires_grad_(False)


def layers(unet: nn.Module, role: Role) -> dict[str, Any]:
    return {name: module for name, module in attention_layers(unet) if role_of(name, module) is role}


class Seen:
    """What the layers of a role were given and gave, during a ``with`` block."""

    def __init__(self, unet: nn.Module, role: Role) -> None:
        self.modules = layers(unet, role)
        self.given: dict[str, Tensor] = {}
        self.gave: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> Seen:
        self.handles = [module.register_forward_hook(self._watch(name)) for name, module in self.modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            self.given[name], self.gave[name] = args[0], out

        return hook


def under(unet: nn.Module, plan: AttentionPlan | None, *given: Tensor, kernel: Kernel | None = None) -> Tensor:
    rows, _, frames, height, width = given[0].shape
    with Attention(unet, kernel=kernel) as attention:
        attention.plan = plan
        attention.at(Grid(rows=rows, height=height, width=width, frames=frames))
        return run(unet, *given)


def test_nothing_planned_is_bit_equal_to_the_stock_motion_model(motion: nn.Module) -> None:
    plain = run(motion, *inputs())
    assert torch.equal(under(motion, None, *inputs()), plain)
    assert torch.equal(under(motion, AttentionPlan(), *inputs()), plain)


def test_layers_that_look_along_frames_are_told_from_the_others(motion: nn.Module) -> None:
    along = layers(motion, Role.TEMPORAL)
    with Seen(motion, Role.TEMPORAL) as seen:
        run(motion, *inputs())
    assert seen.given.keys() == along.keys()
    assert {given.shape[:2] for given in seen.given.values()} == {(ROWS * 8 * 12, FRAMES), (ROWS * 4 * 6, FRAMES)}
    assert len(layers(motion, Role.SELF)) == len(layers(motion, Role.CROSS)) == 4
    assert not set(along) & {*layers(motion, Role.SELF), *layers(motion, Role.CROSS)}


def test_a_temporal_tap_reads_what_an_explicit_map_holds_and_changes_no_bit(motion: nn.Module) -> None:
    plain, sets = run(motion, *inputs()), columns(FRAMES, [0], [1, 2])
    taps = (Tap(name="frames", where=TEMPORAL), Tap(name="sets", where=TEMPORAL, sets=sets, rows=(3, 5)))
    with Seen(motion, Role.TEMPORAL) as seen, Attention(motion) as attention:
        attention.plan = AttentionPlan(taps=taps)
        attention.at(Grid(rows=ROWS, height=8, width=12, frames=FRAMES))
        with attention.collecting() as maps:
            assert torch.equal(run(motion, *inputs()), plain)
    assert {each.layer for each in maps["frames"]} == set(seen.modules)
    for whole, some in zip(maps["frames"], maps["sets"], strict=True):
        module, x = seen.modules[whole.layer], seen.given[whole.layer]
        q, k = (split(x).unflatten(-1, (module.heads, -1)).transpose(1, 2) for split in (module.to_q, module.to_k))
        expected = torch.softmax(q @ k.transpose(-1, -2) * module.scale, -1).mean(1)
        torch.testing.assert_close(whole.values, expected)
        torch.testing.assert_close(some.values, expected[[3, 5]] @ sets.T)


@pytest.mark.parametrize("plan", [KeyFrames(), KeyFrames(fixed=(-1,), beside=(-1, 0, 1))])
def test_key_frames_equal_frames_computed_one_by_one(motion: nn.Module, plan: KeyFrames) -> None:
    with Seen(motion, Role.SELF) as seen, Seen(motion, Role.TEMPORAL) as along:
        out = under(motion, AttentionPlan(key_frames=plan), *inputs())
    assert (out - run(motion, *inputs())).abs().max() > 1e-4
    table = plan.table(FRAMES).tolist()
    with torch.no_grad():
        for name, module in seen.modules.items():
            given, gave = (x.unflatten(0, (ROWS, FRAMES)) for x in (seen.given[name], seen.gave[name]))
            for clip in range(ROWS):
                for frame, keys in enumerate(table):
                    context = torch.cat([given[clip, key] for key in keys])[None]
                    expected = module(given[clip, frame][None], encoder_hidden_states=context)[0]
                    torch.testing.assert_close(gave[clip, frame], expected, atol=1e-6, rtol=1e-4)
        for name, module in along.modules.items():
            assert torch.equal(along.gave[name], module(along.given[name]))


def test_key_frames_write_out_no_map_of_a_large_layer(motion: nn.Module) -> None:
    places = 34 * 34
    given = inputs(34, 34, rows=1)
    plan = AttentionPlan(key_frames=KeyFrames())

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v

    with Largest() as fused:
        out = under(motion, plan, *given)
    with Largest() as written:
        torch.testing.assert_close(under(motion, plan, *given, kernel=explicit), out, atol=1e-4, rtol=1e-3)
    assert fused.elements < 2 * places * places <= written.elements


def test_blocks_of_freenoise_are_refused(motion: nn.Module) -> None:
    from diffusers.models.attention import FreeNoiseTransformerBlock

    unet = nn.Module()
    unet.motion_modules = nn.ModuleList([FreeNoiseTransformerBlock(16, 2, 8)])
    with pytest.raises(RequestError, match="FreeNoise is on in this model and replaces its attention blocks: turn it off"):
        Attention(unet).__enter__()
