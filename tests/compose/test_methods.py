"""Switch and Composite against single LoRAs and separate forwards, and what holds for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compose import METHODS, method_named
from compose.bank import Adapter, LoraBank
from compose.cmlora import CMLoRA
from compose.composite import Composite
from compose.denoise import guide
from compose.merge import Merge
from compose.run import Method, Run, Step
from compose.separate import chunks
from compose.switch import Switch, active, turn_length
from compose.text import Wording, encode_pair
from studio.base import Base
from studio.errors import RequestError, UnknownNameError
from studio.lora.model import Lora, LoraDelta
from tests.compose.test_start import NOISE, ODD, PICTURE

Sample = Callable[..., Tensor]


@pytest.fixture(scope="module")
def three(make_lora: Callable[..., Lora]) -> list[Adapter]:
    """Two of them also change the text encoder, each otherwise."""
    return [
        Adapter("one", make_lora(1, "attn1 attn2 text_encoder", size=0.25), 0.8),
        Adapter("two", make_lora(2, "attn2 conv1 ff.net", size=0.2), 1.0),
        Adapter("three", make_lora(3, "attn2 text_encoder", size=0.25), -0.7),
    ]


class Alone(Method):
    """The oracle of methods that let LoRAs act one by one: a bank of its own for every LoRA and every forward."""

    def __init__(self, base: Base, adapters: list[Adapter], share: Callable[[int], list[float]]) -> None:
        super().__init__()
        self.base, self.alone, self.share = base, adapters, share

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        uncond, cond = torch.zeros_like(x), torch.zeros_like(x)
        for adapter, share in zip(self.alone, self.share(step.index), strict=True):
            if share == 0:
                continue
            with LoraBank.on(self.base, [adapter]):
                texts = encode_pair(self.base, ["a red apple"], ["night"])
                rows = [each.states.expand(len(x), -1, -1) for each in texts]
                u, v = (self.base.unet(x, step.timestep, encoder_hidden_states=text).sample for text in rows)
            uncond, cond = uncond + share * u, cond + share * v
        return (uncond if run.guided else None), cond


@pytest.mark.parametrize(
    ("begin", "sizes"), [(NOISE, (None, 1, 2)), (PICTURE, (None,)), (ODD, (2,))], ids=["noise", "picture", "odd"]
)
def test_composite_is_the_mean_of_separate_forwards(
    base: Base, three: list[Adapter], sample: Sample, begin: dict[str, Any], sizes: tuple[int | None, ...]
) -> None:
    expected = sample(Alone(base, three, lambda step: [1 / 3] * 3), seeds=[0, 7], **begin)
    for chunk in sizes:
        got = sample(Composite.of(chunk=chunk), three, seeds=[0, 7], **begin)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (sample(None, three, seeds=[0, 7], **begin) - expected).abs().max() > 0.05


def test_a_gain_multiplies_the_weights(three: list[Adapter], sample: Sample) -> None:
    weaker = [Adapter(a.name, a.lora, a.weight * 0.5) for a in three if a.name == "two"]
    stronger = [Adapter(a.name, a.lora, a.weight) for a in three if a.name == "two"]
    torch.testing.assert_close(sample(Composite.of(gain="0.5"), stronger), sample(Composite(), weaker), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_mean_stays_nearer_to_the_base_than_a_sum(make_lora: Callable[..., Lora], sample: Sample, guidance: float) -> None:
    """By their first predictions: what one step makes of the same noise is linear in them."""
    equal = [Adapter(f"lora {seed}", make_lora(seed, size=0.2)) for seed in range(3)]
    settings: dict[str, Any] = {"seeds": [0, 7], "steps": 1, "guidance": guidance}
    plain = sample(None, **settings)
    mean, total = (float((sample(method, equal, **settings) - plain).norm()) for method in (Composite(), Merge()))
    assert 0.1 * total < mean < 0.7 * total


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0])
def test_an_amplified_mean_goes_on_from_the_base(base: Base, three: list[Adapter], sample: Sample, factor: float) -> None:
    """At 3, for three LoRAs, it adds up what each changes; the base speaks without any of them, in its text encoder too."""
    nothing = Adapter("nothing", three[0].lora, 0.0)
    expected = sample(Alone(base, [*three, nothing], lambda step: [factor / 3] * 3 + [1 - factor]), seeds=[0, 7])
    for chunk in (None, 1):
        got = sample(Composite.of(chunk=chunk, amplify=factor), three, seeds=[0, 7])
        torch.testing.assert_close(got, expected, atol=3e-4, rtol=1e-3)
    uncached = sample(CMLoRA.of(order="rotation", dominance=1, cache=False, amplify=factor), three, seeds=[0, 7])
    torch.testing.assert_close(uncached, expected, atol=3e-4, rtol=1e-3)
    if factor == 0:
        torch.testing.assert_close(expected, sample(None, seeds=[0, 7]), atol=1e-4, rtol=1e-4)


def test_composite_makes_one_forward_per_chunk(base: Base, three: list[Adapter], sample: Sample) -> None:
    rows: list[int] = []
    handle = base.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        for options, guidance, expected in (
            ({}, 4.0, [6]),
            ({"chunk": 2}, 4.0, [4, 2]),
            ({"amplify": 2, "chunk": 2}, 4.0, [4, 4]),
            ({"chunk": 1}, 1.0, [1, 1, 1]),
        ):
            rows.clear()
            sample(Composite.of(**options), three, steps=2, guidance=guidance)
            assert rows == expected * 2
    finally:
        handle.remove()


def test_equal_prompts_are_held_once(make_lora: Callable[..., Lora], sample: Sample) -> None:
    """Otherwise memory would grow with the number of LoRAs also where they are computed one by one."""
    composite = Composite.of(chunk=1)
    sample(composite, [Adapter(f"lora {seed}", make_lora(seed, "attn2")) for seed in range(4)], steps=1)
    assert len(composite.prompts) == 4
    held = {id(encoded) for pair in composite.prompts.values() for encoded in pair}
    assert len(held) == 2
    assert not [name for name, value in vars(composite).items() if isinstance(value, dict) and name != "prompts"]


@pytest.mark.parametrize(("begin", "turns"), [(NOISE, [0, 0, 1, 1, 2, 2]), (PICTURE, [0, 0, 1, 1, 2]), (ODD, [0, 0, 1, 1, 2])])
def test_switch_is_one_lora_at_a_time(
    base: Base, three: list[Adapter], sample: Sample, begin: dict[str, Any], turns: list[int]
) -> None:
    def share(step: int) -> list[float]:
        return [1.0 if k == active(step, 3, 2) else 0.0 for k in range(3)]

    switch = Switch.of(tau="2")
    got = sample(switch, three, seeds=[0, 7], steps=6, **begin)
    assert switch.turns == turns
    expected = sample(Alone(base, three, share), seeds=[0, 7], steps=6, **begin)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    only_first = sample(Switch.of(tau=6), three, steps=6, **begin)
    torch.testing.assert_close(only_first, sample(None, three[:1], steps=6, **begin), atol=1e-4, rtol=1e-4)


def test_turns_of_switch() -> None:
    order = [active(step, 3, 5) for step in range(200)]
    assert order[:16] == [0] * 5 + [1] * 5 + [2] * 5 + [0]
    assert [order.count(k) for k in range(3)] == [70, 65, 65]
    assert [turn_length(steps, 5) for steps in (200, 50, 49, 20, 4)] == [5, 5, 4, 2, 1]
    assert turn_length(20, 0) == 5


def test_switch_keeps_its_lora_where_a_sampler_visits_a_level_twice(three: list[Adapter], sample: Sample) -> None:
    switch = Switch.of(tau=1)
    sample(switch, three, scheduler="heun", steps=3)
    assert switch.turns == [0, 1, 1, 2, 2]


def test_switch_says_which_lora_it_never_reaches(base: Base, three: list[Adapter], sample: Sample) -> None:
    notes: list[str] = []
    sample(Switch(), three, steps=2, notes=notes)
    assert notes == ["2 steps with turns of 1 never reach LoRA 'three': take more steps"]


EVERYWHERE = sorted(name for name in METHODS if method_named(name).regions != "required")
"""Methods that need no regions."""
NEEDED: dict[str, dict[str, Any]] = {
    "clora": {"nouns": {"one": "red", "two": "apple"}}, "cmlora": {"order": "rotation"},
    "attend": {"words": "apple", "thresholds": {}},
}  # fmt: skip
"""What some cannot know of these LoRAs and this prompt."""


@pytest.mark.parametrize("name", EVERYWHERE)
def test_no_lora_is_the_stock_model(sample: Sample, three: list[Adapter], name: str) -> None:
    plain = sample(None)
    assert torch.equal(sample(method_named(name)), plain)
    off = [Adapter(a.name, a.lora, 0.0) for a in three]
    assert torch.equal(sample(method_named(name), off), plain)


EXACT: dict[str, dict[str, Any]] = {"cmlora": {"cache": "no"}, "attend": {"step": 0}}


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if name != "masked"])
def test_one_lora_is_plain_inference_with_it(sample: Sample, three: list[Adapter], name: str) -> None:
    for guidance in (4.0, 1.0):
        got = sample(method_named(name, **EXACT.get(name, {})), three[:1], guidance=guidance)
        torch.testing.assert_close(got, sample(None, three[:1], guidance=guidance), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["switch", "composite", "cmlora"])
def test_equal_loras_are_one(sample: Sample, three: list[Adapter], name: str) -> None:
    options = {**EXACT.get(name, {}), **({"order": "rotation"} if name == "cmlora" else {})}
    same = [Adapter(f"copy {i}", three[1].lora, 1.0) for i in range(3)]
    torch.testing.assert_close(sample(method_named(name, **options), same), sample(None, same[:1]), atol=1e-4, rtol=1e-4)


def unchanging(adapter: Adapter) -> Adapter:
    """Attached as any other, but its change is exactly zero, as when training begins."""
    layers = {k: replace(delta, up=delta.up * 0) for k, delta in adapter.lora.layers.items() if isinstance(delta, LoraDelta)}
    return Adapter(adapter.name, Lora(layers), adapter.weight)


@pytest.mark.parametrize("name", ["merge", "switch", "composite"])
def test_loras_that_change_nothing_give_the_stock_picture(sample: Sample, three: list[Adapter], name: str) -> None:
    """To rounding; CMLoRA's features get old, see its own test."""
    none = [unchanging(adapter) for adapter in three]
    torch.testing.assert_close(sample(method_named(name), none), sample(None), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if name != "masked"])
def test_a_lora_of_weight_zero_is_as_if_it_were_not_named(sample: Sample, three: list[Adapter], name: str) -> None:
    more = [three[0], Adapter("off", three[2].lora, 0.0), three[1]]
    options = NEEDED.get(name, {})
    torch.testing.assert_close(
        sample(method_named(name, **options), more), sample(method_named(name, **options), three[:2]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["switch", "composite", "cmlora"])
def test_an_acceleration_lora_stays_on_in_every_pass(
    base: Base, make_lora: Callable[..., Lora], sample: Sample, three: list[Adapter], name: str
) -> None:
    """With the others at strength next to nothing every pass is the accelerated base; 4 steps, no unconditional pass."""
    fast = Adapter("fast", make_lora(9, "attn1 conv2", size=0.25))
    faint = [Adapter(a.name, a.lora, 1e-7) for a in three]
    options = {"always": "fast", **({"order": "rotation", "cache": "no"} if name == "cmlora" else {})}
    settings = {"scheduler": "lcm", "steps": 4, "guidance": 1.0}
    got = sample(method_named(name, **options), [*faint, fast], **settings)
    torch.testing.assert_close(got, sample(None, [fast], **settings), atol=1e-3, rtol=1e-3)
    if name != "switch":  # the base of an amplified mean is the accelerated one, too
        nothing = sample(method_named(name, **options, amplify=0), [*three, fast], **settings)
        torch.testing.assert_close(nothing, sample(None, [fast], **settings), atol=1e-4, rtol=1e-4)
    both = sample(method_named(name, **options), [*three, fast], **settings)
    assert (both - got).abs().max() > 0.01
    lone = sample(method_named(name, **options), [fast], **settings)
    torch.testing.assert_close(lone, sample(None, [fast], **settings), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if name != "masked"])
def test_the_route_is_as_before_after_a_run_and_after_an_error(
    base: Base, three: list[Adapter], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compose.denoise import denoise

    method = method_named(name, **NEEDED.get(name, {}))
    blocks = [base.unet, *base.unet.down_blocks, base.unet.mid_block, *base.unet.up_blocks]
    with LoraBank.on(base, three[:2], fuse=method.fuse) as bank:
        bank.route = before = torch.full((1, 1, 1, 1, 1, 2), 0.5)
        negative, positive = encode_pair(base, ["a red apple"], ["night"])
        settings: dict[str, Any] = {"seeds": [0], "size": (32, 32), "steps": 3, "guidance": 3.0, "scheduler": "ddim"}
        settings["wording"] = Wording(prompt="a red apple", negative="night")
        denoise(base, negative, positive, method=method, bank=bank, **settings)
        assert bank.route is before
        with pytest.raises(ZeroDivisionError):
            denoise(base, negative, positive, method=method, bank=bank, on_step=lambda event: 1 // 0, **settings)
        assert bank.route is before
        assert not any("forward" in block.__dict__ or block._forward_pre_hooks for block in blocks)
    monkeypatch.undo()


def test_names_and_options_are_checked(three: list[Adapter]) -> None:
    with pytest.raises(UnknownNameError, match="unknown method 'swich': did you mean 'switch'"):
        method_named("swich")
    with pytest.raises(UnknownNameError, match="unknown option of method 'switch' 'tua': did you mean 'tau'"):
        method_named("switch", tua=3)
    with pytest.raises(RequestError, match="tau: input should be greater than or equal to 1, got '0'"):
        method_named("switch", tau="0")
    with pytest.raises(UnknownNameError, match="unknown option of method 'switch' 'tua'"):
        method_named("attend", method="switch", inner={"tua": 3})
    with pytest.raises(UnknownNameError, match="unknown method 'swich'"):
        method_named("attend", method="swich")
    with pytest.raises(RequestError, match="gain: must be a finite number"):
        method_named("composite", gain="nan")
    with pytest.raises(RequestError, match=r"'always' names 'quick', which is none of the request's LoRAs \(one, two, three\)"):
        method_named("composite", always="quick").check(three)
    with pytest.raises(RequestError, match="'high' names 'quick'"):
        method_named("cmlora", high="one,quick").check(three)


def test_guidance_of_means_is_the_mean_of_guided_scores() -> None:
    u, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    torch.testing.assert_close(guide(u.mean(0), v.mean(0), 5.0), guide(u, v, 5.0).mean(0))
    assert chunks((4, 5, 6), 2) == [(4, 5), (6,)]
    assert chunks((), 2) == []


def test_a_wrong_value_is_told_by_its_own_name_alone() -> None:
    """Not by those that pydantic gives to the sides of a union."""
    with pytest.raises(RequestError, match=r"option weight: must be a finite number, got 'nan'$"):
        method_named("merge", weight="nan")
    with pytest.raises(RequestError, match=r"option intervals\.0: "):
        method_named("cmlora", intervals="0,1")
