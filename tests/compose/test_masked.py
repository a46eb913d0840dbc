"""Masked outputs: what each layer gets, what the whole equals in corner cases, and the masks that are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose.attention import attention_layers
from compose.bank import Adapter, LoraBank
from compose.maps import found_masks
from compose.masked import Masked
from compose.routes import Grid, Placed, constant, spatial
from compose.run import Run, Step
from studio.base import Base
from studio.errors import RequestError, UnknownNameError
from studio.lora.model import Lora
from studio.requests import Region

Sample = Callable[..., Tensor]
MakeLora = Callable[..., Lora]
PROMPT = "a sks cat on the left of a red dog"
BOTH = tuple(Region.parse(text) for text in ("cat@0,0,0.5,1", "dog@0.25,0.25,1,1"))


@pytest.fixture(scope="module")
def pair(make_lora: MakeLora) -> list[Adapter]:
    return [
        Adapter("cat", make_lora(1, "attn1 attn2 text_encoder", size=0.2, trigger="sks", class_word="cat"), 0.8),
        Adapter("dog", make_lora(2, "attn2 conv1 ff.net text_encoder", size=0.2, trigger="red", class_word="dog")),
    ]


def close(one: Tensor, other: Tensor, within: float = 1e-4) -> bool:
    return float((one - other).abs().max()) <= within


def test_a_placed_route_acts_by_place_on_images_and_as_told_on_text(base: Base, pair: list[Adapter]) -> None:
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :6], masks[1, 4:, 6:] = 1, 0.5
    block: Any = base.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    conv: Any = base.unet.down_blocks[0].resnets[0].conv1
    x = torch.randn(1, 96, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
    picture = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(2))

    def outputs(route: Any) -> list[Tensor]:
        with LoraBank.on(base, pair) as bank, torch.no_grad():
            bank.at(Grid(rows=1, height=8, width=12))
            bank.route = route
            return [block.attn2.to_q(x), block.attn2.to_k(text), conv(picture)]

    none, cat, dog = (outputs(constant(weights)) for weights in ([0, 0], [1, 0], [0, 1]))
    got = outputs(Placed(spatial(masks), constant([0.0, 1.0])))
    flat, maps = masks.flatten(1)[:, None, :, None], masks[:, None, None]
    assert close(got[0], none[0] + flat[0] * (cat[0] - none[0]) + flat[1] * (dog[0] - none[0]), 1e-5)
    assert close(got[1], dog[1], 1e-6)
    assert close(got[2], none[2] + maps[0] * (cat[2] - none[2]) + maps[1] * (dog[2] - none[2]), 1e-5)
    with pytest.raises(ValueError, match="axes"):
        outputs(Placed(spatial(masks), torch.zeros(2)))


def test_one_region_over_everything_is_its_lora_alone(sample: Sample, pair: list[Adapter]) -> None:
    for adapter in pair:
        whole = (Region.parse(f"{adapter.name}@0,0,1,1"),)
        expected = sample(None, [adapter], prompt=PROMPT, seeds=[0, 7])
        assert close(
            sample(Masked.of(isolation=True, prompt="whole"), [adapter], prompt=PROMPT, regions=whole, seeds=[0, 7]), expected
        )
    local = sample(Masked.of(), pair[1:], prompt=PROMPT, regions=(Region.parse("dog@0,0,1,1"),))
    assert close(local, sample(None, pair[1:], prompt="a red dog"))


def test_without_strength_it_is_the_base(sample: Sample, pair: list[Adapter]) -> None:
    off = [replace(adapter, weight=0.0) for adapter in pair]
    assert close(sample(Masked.of(prompt="whole"), off, prompt=PROMPT, regions=BOTH), sample(None, prompt=PROMPT))


def test_the_order_of_regions_does_not_matter_and_equal_ones_are_one(sample: Sample, pair: list[Adapter]) -> None:
    expected = sample(Masked.of(), pair, prompt=PROMPT, regions=BOTH)
    assert close(sample(Masked.of(), pair[::-1], prompt=PROMPT, regions=BOTH[::-1]), expected)
    left = (BOTH[0], Region.parse("dog@0.5,0,1,1"))
    twice = sample(Masked.of(), pair, prompt=PROMPT, regions=(left[0], *left))
    assert close(twice, sample(Masked.of(), pair, prompt=PROMPT, regions=left))


def test_a_lora_leaves_what_is_far_from_its_region_nearly_alone(sample: Sample, pair: list[Adapter]) -> None:
    """After one step only convolutions and self-attention have carried anything across."""
    small = (Region.parse("dog@0,0,0.25,0.5"),)
    plain = sample(None, prompt=PROMPT, steps=1)
    changed = (sample(Masked.of(), pair[1:], prompt=PROMPT, regions=small, steps=1) - plain).abs().mean(1)[0]
    assert float(changed[:4, :4].mean()) > 3 * float(changed[:, 8:].mean())


# Masks that are found.


def seen(*subjects: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps of an 8 x 8 picture with a subject of 3 x 3 cells at each place: words ``[K, 8, 8]`` and who looks at whom."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.zeros(8, 8, dtype=torch.long)
    for index, (top, left) in enumerate(subjects, 1):
        owner[top : top + 3, left : left + 3] = index
    same = owner.flatten()[:, None] == owner.flatten()[None, :]
    selves = (same.float() + 0.05 * torch.rand(64, 64, generator=generator)).softmax(-1)
    words = torch.stack([(owner == index).float() for index in range(1, len(subjects) + 1)])
    # Every word is heard a little at the other subjects too, and loudest in the middle of its own.
    return 0.4 * (owner > 0).float() + words + 0.1 * torch.rand(words.shape, generator=generator), selves


def test_masks_are_found_where_the_subjects_are() -> None:
    places = ((1, 0), (4, 5))
    masks = found_masks(*seen(*places), seeds=0.1, threshold=0.6)
    for mask, (top, left) in zip(masks, places, strict=True):
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[top : top + 3, left : left + 3] = True
        assert int((mask & inside).sum()) >= 8 and int((mask & ~inside).sum()) <= 6
    assert not bool((masks[0] & masks[1]).any())
    assert bool(found_masks(*seen(*places), seeds=0.1, threshold=0).any(0).all())
    alone = found_masks(*seen((2, 2)), seeds=0.1, threshold=0.6)
    assert int(alone[0, 2:5, 2:5].sum()) == 9


def test_no_lora_is_left_without_a_cell() -> None:
    words, selves = torch.rand(1, 4, 4).expand(3, -1, -1), torch.ones(16, 16) / 16
    masks = found_masks(words, selves, seeds=0.1, threshold=0.99)
    assert bool(masks.flatten(1).any(1).all()) and int(masks.sum(0).max()) == 1


def test_found_masks_act_as_the_same_masks_given(
    base: Base, sample: Sample, pair: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = torch.zeros(2, 4, 8, dtype=torch.bool)
    left[0, :, :4], left[1, :, 4:] = True, True
    asked: list[tuple[Tensor, Tensor]] = []

    def told(words: Tensor, selves: Tensor, seeds: float, threshold: float) -> Tensor:
        asked.append((words, selves))
        return left

    monkeypatch.setattr("compose.masked.found_masks", told)
    halves = (Region.parse("cat@0,0,0.5,1"), Region.parse("dog@0.5,0,1,1"))
    for prompt in ("whole", "placed"):
        asked.clear()
        expected = sample(Masked.of(prompt=prompt), pair, prompt=PROMPT, regions=halves, seeds=[0, 7])
        assert close(sample(Masked.of(prompt=prompt), pair, prompt=PROMPT, seeds=[0, 7]), expected)
    assert [words.shape for words, _ in asked] == [(2, 4, 8)] * 2 and asked[0][1].shape == (32, 32)
    assert not torch.equal(asked[0][0], asked[1][0])  # each picture is looked at by itself
    assert torch.allclose(asked[0][1].sum(-1), torch.ones(32))


def test_a_picture_does_not_depend_on_its_batch_and_nothing_stays(base: Base, sample: Sample, pair: list[Adapter]) -> None:
    before = {name: layer.processor for name, layer in attention_layers(base.unet)}
    plain = sample(None, prompt=PROMPT)
    method = Masked.of()
    both = sample(method, pair, prompt=PROMPT, seeds=[3, 4])
    masks = [layout.regions.places for layout in method.layouts]
    assert close(both[1:], sample(Masked.of(), pair, prompt=PROMPT, seeds=[4]), 1e-3)
    assert len(masks) == 2 and not close(both, sample(None, pair, prompt=PROMPT, seeds=[3, 4]), 1e-2)
    assert all(layer.processor is before[name] for name, layer in attention_layers(base.unet))
    assert not any("forward" in layer.__dict__ for layer in base.unet.modules() if isinstance(layer, nn.Module))
    assert torch.equal(sample(None, prompt=PROMPT), plain)


def test_what_finding_costs(sample: Sample, pair: list[Adapter]) -> None:
    rows: list[int] = []

    class Counted(Masked):
        def after_step(self, run: Run, step: Step) -> None:
            rows.append(run.passes.whole)

    sample(Counted.of(find=0.3), pair, prompt=PROMPT, steps=10, seeds=[0, 7])
    assert rows[-1] == 2 * 2 * (10 + 3)
    rows.clear()
    sample(Counted.of(), pair, prompt=PROMPT, steps=10, seeds=[0, 7], regions=BOTH)
    assert rows[-1] == 2 * 2 * 10


def test_styles_act_everywhere_and_are_not_looked_for(sample: Sample, pair: list[Adapter], make_lora: MakeLora) -> None:
    style = Adapter("look", make_lora(3, "attn1", size=0.2, trigger="style", kind="style"))
    method = Masked.of()
    sample(method, [*pair, style], prompt=PROMPT, steps=2)
    assert method.layouts[0].everywhere == (0, 0, 1) and method.layouts[0].names == ["cat", "dog"]
    # With nothing to look for, it is the style alone.
    assert torch.equal(sample(Masked.of(), [style], prompt=PROMPT), sample(None, [style], prompt=PROMPT))
    plain = Adapter("look", make_lora(3, "attn1", size=0.2))
    named = Masked.of(always="look")
    sample(named, [*pair, plain], prompt=PROMPT, steps=2)
    assert named.layouts[0].everywhere == (0, 0, 1)


def test_what_cannot_be_found_is_refused(sample: Sample, pair: list[Adapter], make_lora: MakeLora) -> None:
    def refused(adapters: list[Adapter], error: type[Exception], says: str, prompt: str = PROMPT, **options: Any) -> None:
        with pytest.raises(error, match=says):
            sample(Masked.of(**options), adapters, prompt=prompt)

    refused(pair, RequestError, "write 'red dog'", prompt="a sks cat")
    refused([Adapter("plain", make_lora(5, "attn2"))], RequestError, "draw regions")
    with pytest.raises(UnknownNameError):
        sample(Masked.of(), pair, prompt=PROMPT, regions=(Region.parse("bird@0,0,1,1"),))
    with pytest.raises(RequestError, match="none of the request's LoRAs"):
        Masked.of(always="bird").check(pair)


def test_what_it_explains(sample: Sample, pair: list[Adapter]) -> None:
    figures: list[Any] = []
    sample(Masked.of(), pair, prompt=PROMPT, steps=2, figures=figures)
    boxes, masks = figures
    assert list(boxes.boxes) == list(masks.rows) == ["cat", "dog"]
    assert masks.rows["cat"][0].shape == (8, 16)
    assert not bool(((masks.rows["cat"][0] > 0) & (masks.rows["dog"][0] > 0)).any())


def test_a_run_of_one_step_finds_masks_too(sample: Sample, pair: list[Adapter]) -> None:
    assert sample(Masked.of(), pair, prompt=PROMPT, steps=1).isfinite().all()
