"""Regional passes against a bank, a prompt and a forward for every region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter, LoraBank
from compose.regional import Regional, blend_weights
from compose.run import Method, Run, Step
from compose.text import encode_pair
from studio.base import Base
from studio.errors import RequestError
from studio.lora.model import Lora
from studio.requests import Region

Sample = Callable[..., Tensor]
PROMPT = "a cat on the left of a dog"
BOTH = tuple(Region.parse(text) for text in ("cat@0,0,0.5,1", "dog@0.25,0.25,1,1=a red dog"))


@pytest.fixture(scope="module")
def pair(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [
        Adapter("cat", make_lora(1, "attn1 attn2 text_encoder", size=0.2, trigger="sks", class_word="cat"), 0.8),
        Adapter("dog", make_lora(2, "attn2 conv1 ff.net text_encoder", size=0.2, trigger="red", class_word="dog")),
    ]


def close(one: Tensor, other: Tensor, within: float = 1e-4) -> bool:
    return float((one - other).abs().max()) <= within


class Slow(Method):
    """One forward per region and half, each with a bank of its own, added cell by cell."""

    def __init__(self, base: Base, passes: list[tuple[list[Adapter], str]], shares: Tensor) -> None:
        super().__init__()
        self.base, self.passes, self.shares = base, passes, shares

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        halves = [torch.zeros_like(x), torch.zeros_like(x)]
        for (adapters, prompt), share in zip(self.passes, self.shares, strict=True):
            with LoraBank.on(self.base, adapters):
                for half, text in zip(halves, encode_pair(self.base, [prompt], ["night"]), strict=True):
                    states = text.states.expand(len(x), -1, -1)
                    half += share * self.base.unet(x, step.timestep, encoder_hidden_states=states).sample
        return halves[0], halves[1]


def test_it_is_a_forward_for_each_region_blended(base: Base, sample: Sample, pair: list[Adapter]) -> None:
    left = torch.zeros(8, 16)
    left[:, :8] = 1
    right = torch.zeros(8, 16)
    right[2:, 4:] = 1
    count = left + right
    shares = torch.stack([(count == 0).float(), left / count.clamp(min=1), right / count.clamp(min=1)])
    slow = Slow(base, [([], PROMPT), ([pair[0]], "sks cat"), ([pair[1]], "a red dog")], shares)
    expected = sample(slow, prompt=PROMPT, seeds=[0, 7])
    for chunk in (None, 1, 2):
        got = sample(Regional.of(feather=0, chunk=chunk, prompt="local"), pair, prompt=PROMPT, regions=BOTH, seeds=[0, 7])
        assert close(got, expected), chunk


def test_one_region_over_everything_is_its_lora_alone(sample: Sample, pair: list[Adapter]) -> None:
    whole = (Region.parse("dog@0,0,1,1"),)
    passes: list[int] = []

    class Counted(Regional):
        def after_step(self, run: Run, step: Step) -> None:
            passes.append(run.passes.whole)

    got = sample(Counted.of(), pair[1:], prompt=PROMPT, regions=whole)
    assert close(got, sample(None, pair[1:], prompt="a red dog"))
    assert passes == [2, 4, 6, 8, 10]  # a background that shows nowhere costs nothing
    told = sample(Regional.of(prompt="whole"), pair[1:], prompt=PROMPT, regions=whole)
    assert close(told, sample(None, pair[1:], prompt=PROMPT))


def test_without_strength_it_is_the_base(sample: Sample, pair: list[Adapter]) -> None:
    off = [Adapter(adapter.name, adapter.lora, 0.0) for adapter in pair]
    regions = tuple(region.with_(prompt=PROMPT) for region in BOTH)
    assert close(sample(Regional.of(), off, prompt=PROMPT, regions=regions), sample(None, prompt=PROMPT))


def test_prompts_of_different_lengths_go_together(sample: Sample, pair: list[Adapter]) -> None:
    long = BOTH[0].with_(prompt=" ".join(["a sks cat on grass"] * 5))
    both = sample(Regional.of(feather=0), pair, prompt=PROMPT, regions=(long, BOTH[1]))
    single = sample(Regional.of(feather=0, chunk=1), pair, prompt=PROMPT, regions=(long, BOTH[1]))
    assert close(both, single)
    assert not close(both, sample(Regional.of(feather=0), pair, prompt=PROMPT, regions=BOTH), 1e-2)


def test_weights_are_a_partition_with_soft_edges() -> None:
    covered = torch.zeros(2, 8, 16, dtype=torch.bool)
    covered[0, :, :6] = True
    covered[1, 2:, 6:14] = True
    hard = blend_weights(covered, 0)
    assert torch.equal(hard[1:], covered.float()) and torch.equal(hard.sum(0), torch.ones(8, 16))
    soft = blend_weights(covered, 4)
    assert torch.allclose(soft.sum(0), torch.ones(8, 16)) and float(soft.min()) >= 0
    assert float(soft[1, 7, 0]) == 1 and float(soft[1, 0, 0]) == 1  # the edge of the picture is none
    assert soft[1, 7, 3:9].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    everything = blend_weights(torch.ones(1, 8, 16, dtype=torch.bool), 4)
    assert torch.equal(everything[0], torch.zeros(8, 16)) and torch.equal(everything[1], torch.ones(8, 16))


def test_regions_are_required(sample: Sample, pair: list[Adapter]) -> None:
    assert Regional.regions == "required"
    with pytest.raises(RequestError, match="needs regions"):
        sample(Regional.of(), pair, prompt=PROMPT)


def test_what_it_explains(sample: Sample, pair: list[Adapter]) -> None:
    figures: list[Any] = []
    sample(Regional.of(), pair, prompt=PROMPT, regions=BOTH, steps=1, figures=figures)
    boxes, shares = figures
    assert list(boxes.boxes) == ["cat", "dog"] and list(shares.rows) == ["background", "cat", "dog"]
    assert torch.allclose(sum(maps[0] for maps in shares.rows.values()), torch.ones(8, 16))
