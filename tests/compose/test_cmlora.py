"""CMLoRA: its schedule by hand, its two depths bit by bit, its forwards counted, its caches' ages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter, LoraBank
from compose.cmlora import CMLoRA, CMLoRAOptions, Turn, refresh_steps, turns, weights
from compose.composite import Composite
from compose.run import Method, Run, Step
from compose.separate import BASE
from compose.shallow import captured, skipping, usable_cut
from studio.base import Base, load_base
from studio.errors import RequestError
from studio.lora.model import Lora
from tests.compose.test_methods import unchanging
from tests.compose.test_start import NOISE, ODD, PICTURE

Sample = Callable[..., Tensor]


@pytest.fixture(scope="module")
def three(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [Adapter(name, make_lora(seed, "attn1 attn2 conv1", size=0.2)) for seed, name in enumerate(("one", "two", "three"))]


def test_refresh_steps_of_the_paper() -> None:
    for steps, count in ((100, 43), (200, 85), (220, 92)):
        found = refresh_steps(steps)
        assert len(found) == count
        assert max(b - a for a, b in itertools.pairwise(found)) <= 3
    assert refresh_steps(16) == [0, 2, 4, 6, 9, 12, 14]
    assert refresh_steps(1) == [0]
    assert refresh_steps(7, (1, 1)) == list(range(7))


def test_weights_sum_to_their_number() -> None:
    for count in range(1, 7):
        for q in (1.0, 1.5, 4.5, 100.0):
            found = weights(count, 0, q)
            assert sum(found) == pytest.approx(count)
            if count > 1:
                assert found[0] / found[1] == pytest.approx(q)
    assert weights(3, 1, 2.5) == pytest.approx([2 / 3, 5 / 3, 2 / 3])
    assert weights(2, 0, 1.5) == pytest.approx([1.2, 0.8])


def test_the_course_of_a_run() -> None:
    course = turns(200, high=[0, 2], low=[1], options=CMLoRAOptions())
    fresh = refresh_steps(200)
    assert sum(len(turn.whole) for turn in course) == 3 + len(fresh) - 1 == 87
    rotations = [course[step] for step in fresh]
    assert [turn.dominant for turn in rotations[:4]] == [0, 2, 0, 2]
    assert {course[step].dominant for step in range(120)} == {0, 2}
    assert {course[step].dominant for step in fresh if step >= 120} == {1}
    assert [turn.q for turn in rotations[:4]] == pytest.approx([2.5, 2.0, 1.75, 1.625])
    assert all(b.q <= a.q for a, b in itertools.pairwise(course))
    assert min(turn.q for turn in course) >= 1
    assert len({turn.q for turn in course}) > 4
    last: dict[int, int] = {}
    for index, turn in enumerate(course):
        for concept in turn.whole:
            last[concept] = index
        assert index - last[turn.dominant] <= (0 if index in fresh else 2)
    for before, after in itertools.pairwise(course):
        assert before.dominant == after.dominant or course.index(after) in fresh or after.whole


def test_dominance_of_two_is_clamped() -> None:
    course = turns(40, high=[0, 1], low=[], options=CMLoRAOptions())
    assert [course[step].q for step in refresh_steps(40)[:4]] == [1.5, 1.0, 1.0, 1.0]
    kept = turns(40, high=[0, 1], low=[], options=CMLoRAOptions(decay=0))
    assert {turn.q for turn in kept} == {1.5}
    told = turns(40, high=[0, 1], low=[], options=CMLoRAOptions(dominance=4, decay=0.5))
    assert [told[step].q for step in refresh_steps(40)[:3]] == [4, 3.75, 3.625]


def test_orders_to_compare_with() -> None:
    steps = 50
    reverse = turns(steps, [0, 2], [1], CMLoRAOptions(order="reversed"))
    assert {turn.dominant for turn in reverse[:30]} == {1}
    assert {turn.dominant for turn in reverse[32:]} == {0, 2}
    rotation = turns(steps, [0, 2], [1], CMLoRAOptions(order="rotation"))
    assert [rotation[step].dominant for step in refresh_steps(50)[:4]] == [0, 1, 2, 0]
    first, again, other = (turns(steps, [0, 2], [1], CMLoRAOptions(order="random", seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert {turn.dominant for turn in first} == {0, 1, 2}
    assert {turn.dominant for turn in turns(steps, [], [0, 1], CMLoRAOptions())[:20]} == {0, 1}


def test_a_largest_age_renews_what_does_not_dominate() -> None:
    course = turns(40, [0], [1, 2], CMLoRAOptions(max_age=4))
    age = dict.fromkeys(range(3), 0)
    for turn in course:
        age = {k: 0 if k in turn.whole else a + 1 for k, a in age.items()}
        assert max(age.values()) <= 4
    stale = turns(40, [0], [1, 2], CMLoRAOptions())
    assert [turn.whole for turn in stale if set(turn.whole) & {1, 2}][:3] == [(0, 1, 2), (2,), (1,)]
    assert [turn.whole == (2,) for turn in stale].index(True) == 24


def forward(base: Base, x: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        added = None
        if base.text_encoder_2 is not None:
            added = {"text_embeds": torch.ones(len(x), 24), "time_ids": torch.ones(len(x), 6)}
        return base.unet(x, torch.tensor(321), encoder_hidden_states=text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("size", [(8, 16), (9, 13), (4, 4)])
@pytest.mark.parametrize("cut", [1, 2])
def test_a_shallow_forward_on_its_own_feature_gives_the_same_bits(base: Base, size: tuple[int, int], cut: int) -> None:
    x, text = torch.randn(2, 8, *size), torch.randn(2, 16, 32)
    calls: list[str] = []
    handles = [
        base.unet.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: calls.append(name))
        for name in ("down_blocks.2.resnets.0", "mid_block.resnets.0", "up_blocks.0.resnets.0", "up_blocks.2.resnets.0")
    ]
    try:
        with captured(base.unet, cut) as found:
            whole = forward(base, x, text)
        assert len(calls) == 4
        calls.clear()
        with skipping(base.unet, cut, found[0]):
            assert torch.equal(forward(base, x, text), whole)
            assert calls == ["up_blocks.2.resnets.0"]
            assert not torch.equal(forward(base, x * 1.01, text), whole)
        with skipping(base.unet, cut, found[0] * 1.1):
            assert not torch.equal(forward(base, x, text), whole)
        assert torch.equal(forward(base, x, text), whole)
    finally:
        for handle in handles:
            handle.remove()


def test_the_cut_of_sdxl_reaches_its_attention(base: Base, tiny_sdxl: Any) -> None:
    xl = load_base(tiny_sdxl, device="cpu")
    assert usable_cut(base.unet) == 1
    assert usable_cut(xl.unet) == 1  # two blocks only: a deeper cut would leave nothing out
    x, text = torch.randn(1, 8, 8, 8), torch.randn(1, 16, 80)
    with captured(xl.unet, 1) as found:
        whole = forward(xl, x, text)
    with skipping(xl.unet, 1, found[0]):
        assert torch.equal(forward(xl, x, text), whole)

    class Block(torch.nn.Module):
        def __init__(self, attention: bool) -> None:
            super().__init__()
            self.has_cross_attention = attention

    unet = torch.nn.Module()
    unet.down_blocks = torch.nn.ModuleList()
    unet.up_blocks = torch.nn.ModuleList([Block(True), Block(True), Block(False)])
    assert usable_cut(unet) == 2
    for cut in (0, 3):
        with pytest.raises(RequestError, match=f"cut {cut} is out of range: the base has 3 up blocks, so choose 1 to 2"):
            usable_cut(unet, cut)
    with pytest.raises(RequestError, match="keeps the deep part of a UNet"):
        usable_cut(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_without_dominance_and_cache_it_is_composite(sample: Sample, three: list[Adapter], guidance: float) -> None:
    expected = sample(Composite(), three, guidance=guidance)
    plain = {"order": "rotation", "dominance": 1, "cache": False}
    torch.testing.assert_close(sample(CMLoRA.of(**plain), three, guidance=guidance), expected, atol=1e-4, rtol=1e-4)
    dominated = sample(CMLoRA.of(**{**plain, "dominance": None}), three, guidance=guidance)
    cached = sample(CMLoRA.of(**{**plain, "cache": True}), three, guidance=guidance)
    assert (dominated - expected).abs().max() > 1e-3
    assert (cached - expected).abs().max() > 1e-3


class Oracle(CMLoRA):
    """The slow exact way: one forward per LoRA, nothing batched, the feature taken and put back block by block."""

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        turn = self.course[step.index]
        total: list[Tensor] = [torch.zeros_like(x), torch.zeros_like(x)]
        count, amplify = len(self.concepts), self.options.amplify
        shares = [amplify * w / count for w in weights(count, turn.dominant, turn.q)] + [1 - amplify]
        for position, (concept, weight) in enumerate(zip((*self.concepts, BASE), shares, strict=True)):
            assert run.bank is not None
            route = torch.zeros(len(run.bank.adapters))
            if concept != BASE:
                route[concept] = 1
            run.bank.route = route.view(1, 1, 1, 1, 1, -1)
            for half, text in enumerate((run.negative, run.positive)):
                if position in turn.whole or (concept == BASE and turn.whole):
                    with captured(run.base.unet, self.cut) as found:
                        out = run.forward(x, step.timestep, text)
                    self.features[concept, half] = found[0]
                else:
                    with skipping(run.base.unet, self.cut, self.features[concept, half]):
                        out = run.forward(x, step.timestep, text)
                total[half] += weight * out
        return total[0], total[1]

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.features: dict[tuple[int, int], Tensor] = {}


@pytest.mark.parametrize(
    ("options", "begin", "chunks"),
    [
        ({}, NOISE, (None, 1, 2)),
        ({"max_age": 2, "order": "reversed"}, NOISE, (None, 1, 2)),
        ({"amplify": 2}, NOISE, (None, 1, 2)),
        ({}, {**PICTURE, "steps": 6}, (None,)),
        ({"max_age": 2}, {**ODD, "steps": 6}, (2,)),
    ],
)
def test_batched_and_chunked_forwards_equal_one_by_one(
    sample: Sample, three: list[Adapter], options: dict[str, Any], begin: dict[str, Any], chunks: tuple[int | None, ...]
) -> None:
    told, settings = {"high": "one,three", **options}, {"seeds": [0, 5], "steps": 9, **begin}
    expected = sample(Oracle.of(**told), three, **settings)
    for chunk in chunks:
        got = sample(CMLoRA.of(chunk=chunk, **told), three, **settings)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


class EveryOne(CMLoRA):
    """Every LoRA makes a whole forward at every step, though features are kept."""

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.course = [replace(turn, whole=tuple(range(len(self.concepts)))) for turn in self.course]


@pytest.mark.parametrize("dominance", [1, 1.5, 4])
def test_keeping_features_changes_no_bit_where_all_are_whole(sample: Sample, three: list[Adapter], dominance: float) -> None:
    told = {"order": "rotation", "dominance": dominance}
    method = EveryOne.of(**told)
    got = sample(method, three, steps=4)
    assert (method.whole, method.shallow, len(method.kept)) == (12, 0, 3)
    assert torch.equal(got, sample(CMLoRA.of(**told, cache=False), three, steps=4))
    assert not torch.equal(got, sample(CMLoRA.of(**told), three, steps=4))


def test_one_lora_refreshed_at_every_step_is_plain_inference_with_it(sample: Sample, three: list[Adapter]) -> None:
    method = CMLoRA.of(intervals="1,1")
    got = sample(method, three[:1])
    assert (method.whole, method.shallow, len(method.kept)) == (5, 0, 1)
    torch.testing.assert_close(got, sample(None, three[:1]), atol=1e-5, rtol=1e-5)


class Kept(Method):
    """The stock model, its deep features kept from one of CMLoRA's refresh steps to the next."""

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if step.index in refresh_steps(step.count):
            with captured(run.base.unet, 1) as found:
                out = run.forward_guided(x, step.timestep)
            self.feature = found[0]
            return out
        with skipping(run.base.unet, 1, self.feature):
            return run.forward_guided(x, step.timestep)


def test_loras_that_change_nothing_give_the_stock_picture_cached_too(sample: Sample, three: list[Adapter]) -> None:
    """To rounding where no feature gets old, else what the stock model gives with its own features kept as long."""
    none = [unchanging(adapter) for adapter in three]
    plain, told = sample(None), {"order": "rotation"}
    for method in (CMLoRA.of(**told, cache=False), EveryOne.of(**told)):
        torch.testing.assert_close(sample(method, none), plain, atol=1e-5, rtol=1e-5)
    kept = sample(Kept())
    torch.testing.assert_close(sample(CMLoRA.of(**told), none[:1]), kept, atol=1e-5, rtol=1e-5)
    assert (kept - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("steps", "amplify"), [(1, 1), (4, 1), (20, 1), (20, 2)])
def test_forwards_are_counted(base: Base, sample: Sample, three: list[Adapter], steps: int, amplify: float) -> None:
    """By the rows that the deepest and the outermost layers really see, not by what the method says of itself."""
    deep: list[int] = []
    outer: list[int] = []
    hooks = [
        base.unet.mid_block.resnets[0].register_forward_hook(lambda module, args, out: deep.append(len(out))),
        base.unet.conv_out.register_forward_hook(lambda module, args, out: outer.append(len(out))),
    ]
    method = CMLoRA.of(high="one,three", amplify=amplify)
    try:
        sample(method, three, steps=steps)
    finally:
        for hook in hooks:
            hook.remove()
    passes = 3 if amplify == 1 else 4
    expected = 3 + len(refresh_steps(steps)) - 1 + (passes - 3) * len(refresh_steps(steps))
    assert sum(deep) == 2 * expected
    assert sum(outer) == 2 * passes * steps
    assert (method.whole, method.shallow) == (expected, passes * steps - expected)
    assert len(outer) <= 2 * steps


def test_features_are_of_one_lora_one_run_and_one_size(base: Base, sample: Sample, three: list[Adapter]) -> None:
    method = CMLoRA.of(order="rotation")
    first = sample(method, three)
    assert torch.equal(sample(method, three), first)
    sample(method, three, size=(32, 64), seeds=[1, 2])
    sample(method, three, size=(16, 16), guidance=1.0)
    assert torch.equal(sample(method, three), first)
    kept = method.kept
    assert len({tensor.data_ptr() for tensor in kept.values()}) == 3
    assert all(not torch.equal(kept[a], kept[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


class Again(CMLoRA):
    def after_step(self, run: Run, step: Step) -> None:
        if step.index == 2 and self.whole < 100:
            self.whole += 100
            run.restart()


def test_a_restart_begins_with_whole_forwards(sample: Sample, three: list[Adapter]) -> None:
    told = {"order": "rotation"}
    torch.testing.assert_close(sample(Again.of(**told), three), sample(CMLoRA.of(**told), three))


def test_the_phase_is_a_noise_level_when_starting_from_a_picture(sample: Sample, three: list[Adapter]) -> None:
    from compose.denoise import Start

    method = CMLoRA.of(high="one,two")
    sample(method, three, steps=20, start=Start(latents=torch.zeros(1, 8, 8, 16), strength=0.5))
    assert [turn.dominant for turn in method.course[:4]] == [0, 0, 0, 2]  # the refresh of step 13 is the first beyond 0.6


def test_refreshes_keep_their_noise_levels_when_starting_from_a_picture() -> None:
    options = CMLoRAOptions(order="rotation")
    whole = refresh_steps(20)
    course = turns(10, [0, 1, 2], [], options, skipped=10)
    assert [index for index, turn in enumerate(course) if turn.whole] == [0, *(i - 10 for i in whole if i > 10)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"breaks": "0.9,0.1"}, "the first must not be the larger"),
        ({"order": "random", "high": "one"}, "'high' does nothing with order='random'"),
        ({"order": "rotation", "phase": 0.5}, "'phase' does nothing with order='rotation'"),
        ({"seed": 3}, "'seed' does nothing with order='paper'"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        CMLoRA.of(**options)


def test_a_turn_is_data() -> None:
    assert Turn(dominant=0, q=1.0, whole=(0,)) == Turn(dominant=0, q=1.0, whole=(0,))
    assert CMLoRAOptions.of(intervals="1,4", breaks="0.2,0.9", high="a, b").intervals == (1, 4)
    with pytest.raises(RequestError, match="order"):
        CMLoRAOptions.of(order="backwards")


def test_a_bank_without_unet_blocks_is_refused_in_one_sentence(base: Base, three: list[Adapter]) -> None:
    with LoraBank.on(base, three), pytest.raises(RequestError, match="cut 9"):
        usable_cut(base.unet, 9)
