"""LoRA-Composer as a whole: what it equals in corner cases, its gradient, when it stops, and what it leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compose.lora_composer as module
from compose.attention import attention_layers
from compose.bank import Adapter, LoraBank
from compose.denoise import denoise
from compose.figures import Boxes, Curves, Maps
from compose.guidance import latents_gradient, phi, updated
from compose.layerwise import cross_layers
from compose.lora_composer import LoraComposer
from compose.run import Method, Run, Step
from compose.text import Encoded, Reading, Wording, encode_pair
from studio.base import Base
from studio.embeddings import carried_embeddings
from studio.lora.model import Lora
from studio.requests import Region

Sample = Callable[..., Tensor]
MakeLora = Callable[..., Lora]
PROMPT = "a cat on the left of a dog"
WHOLE = "0,0,1,1"
LEFT, RIGHT = "0,0,0.5,1", "0.5,0,1,1"
BARE: dict[str, Any] = {"isolation": False, "step": 0, "reinit": False}
PAPER: dict[str, Any] = {"injection": "cross_kv_out", "step": 0, "reinit": False}


@pytest.fixture(scope="module")
def pair(make_lora: MakeLora) -> list[Adapter]:
    return [
        Adapter("cat", make_lora(1, "attn1 attn2 text_encoder", size=0.2, trigger="sks", class_word="cat"), 0.8),
        Adapter("dog", make_lora(2, "attn1 attn2 ff.net conv1", size=0.2, trigger="red", class_word="dog")),
    ]


def regions(*texts: str) -> tuple[Region, ...]:
    return tuple(Region.parse(text) for text in texts)


BOTH = regions(f"cat@{LEFT}", f"dog@{RIGHT}")


def cross_only(adapter: Adapter) -> Adapter:
    """What the paper uses of a LoRA: keys, values and output of cross-attention, and the text encoder."""
    kept = {
        name: delta
        for name, delta in adapter.lora.layers.items()
        if name.startswith("text_encoder") or (".attn2." in name and not name.endswith("to_q"))
    }
    assert 0 < len(kept) < len(adapter.lora.layers)
    return Adapter(adapter.name, Lora(layers=kept, metadata=adapter.lora.metadata), adapter.weight)


def close(one: Tensor, other: Tensor, within: float = 1e-4) -> bool:
    return float((one - other).abs().max()) <= within


# What it equals in corner cases.


@pytest.mark.parametrize("index", [0, 1])
def test_one_region_over_everything_is_the_filtered_lora_and_the_local_prompt(
    sample: Sample, pair: list[Adapter], index: int
) -> None:
    adapter, local = pair[index], "a sks cat" if index == 0 else "a red dog"
    expected = sample(None, [cross_only(adapter)], prompt=local)
    # Isolation has nothing to hide from one region.
    got = sample(LoraComposer.of(**PAPER), [adapter], prompt=PROMPT, regions=regions(f"{adapter.name}@{WHOLE}"))
    assert close(got, expected)
    assert not close(got, sample(None, [adapter], prompt=local), 1e-2)


def test_one_masked_region_over_everything_is_the_whole_lora(sample: Sample, pair: list[Adapter]) -> None:
    expected = sample(None, pair[1:], prompt="a red dog")
    got = sample(
        LoraComposer.of(injection="masked_all", step=0, reinit=False), pair[1:], prompt=PROMPT,
        regions=regions(f"dog@{WHOLE}"),
    )  # fmt: skip
    assert close(got, expected)


def test_without_strength_or_replacement_it_is_the_base(sample: Sample, pair: list[Adapter]) -> None:
    plain = sample(None, prompt=PROMPT)
    off = [replace(adapter, weight=0.0) for adapter in pair]
    same = regions(f"cat@{LEFT}={PROMPT}", f"dog@0.3,0.2,1,1={PROMPT}")
    for injection in ("cross_kv_out", "masked_all"):
        assert close(sample(LoraComposer.of(injection=injection, **BARE), off, prompt=PROMPT, regions=same), plain)
    silent = LoraComposer.of(replace=0, isolation=False, **PAPER)
    assert close(sample(silent, pair, prompt=PROMPT, regions=BOTH), plain)
    outside = LoraComposer.of(window="1,1", isolation=False, **PAPER)  # no step lies there
    assert close(sample(outside, pair, prompt=PROMPT, regions=BOTH), plain)
    assert not close(sample(LoraComposer.of(**BARE), pair, prompt=PROMPT, regions=BOTH), plain, 1e-2)


@pytest.mark.parametrize("injection", ["cross_kv_out", "masked_all"])
def test_equal_overlapping_regions_are_one_and_their_order_does_not_matter(
    sample: Sample, pair: list[Adapter], injection: str
) -> None:
    def of(adapters: Sequence[Adapter], *texts: str) -> Tensor:
        method = LoraComposer.of(injection=injection, step=2, reinit=False, fill=0, enhance=0)
        return sample(method, adapters, prompt=PROMPT, regions=regions(*texts), steps=3)

    one = of(pair, f"cat@{LEFT}", f"dog@{RIGHT}")
    assert close(one, of(pair[::-1], f"dog@{RIGHT}", f"cat@{LEFT}"), 1e-3)
    twice = LoraComposer.of(injection=injection, step=0, reinit=False)
    assert close(
        sample(twice, pair, prompt=PROMPT, regions=regions(f"cat@{LEFT}", f"cat@{LEFT}", f"dog@{RIGHT}")),
        sample(twice, pair, prompt=PROMPT, regions=BOTH),
    )


def test_a_lora_that_no_region_names_acts_everywhere(sample: Sample, pair: list[Adapter], make_lora: MakeLora) -> None:
    style = Adapter("night", make_lora(3, "attn1 attn2 ff.net", size=0.2, trigger="style", kind="style"))
    expected = sample(None, [cross_only(pair[1]), style], prompt="a red dog, style")
    got = sample(LoraComposer.of(**PAPER), [pair[1], style], prompt=PROMPT, regions=regions(f"dog@{WHOLE}"))
    assert close(got, expected)


def test_weights_of_a_region_multiply_those_of_the_request(sample: Sample, pair: list[Adapter]) -> None:
    half = [replace(pair[1], weight=0.5)]
    method = LoraComposer.of(**BARE)
    assert close(
        sample(method, half, prompt=PROMPT, regions=regions(f"dog:1.2@{LEFT}")),
        sample(method, [replace(pair[1], weight=0.6)], prompt=PROMPT, regions=regions(f"dog@{LEFT}")),
    )


def test_a_mask_in_the_shape_of_a_box_is_the_box(sample: Sample, pair: list[Adapter], tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.new("L", (64, 32))
    picture.paste(255, (0, 0, 32, 32))
    picture.save(tmp_path / "left.png")
    masked = (Region(loras=("cat",), mask=tmp_path / "left.png"), BOTH[1])
    method = LoraComposer.of(injection="masked_all", step=1)
    assert close(
        sample(method, pair, prompt=PROMPT, regions=masked, steps=3), sample(method, pair, prompt=PROMPT, regions=BOTH, steps=3)
    )


# Guidance.


class Looking(LoraComposer):
    """Calls ``look(run, step)`` before the first step."""

    look: Callable[[Run, Step], None]

    def before_step(self, run: Run, step: Step) -> None:
        if step.index == 0:
            self.guided[:] = False
            super().before_step(run, step)
            self.look(run, step)


def as_precise(base: Base, dtype: torch.dtype) -> Base:
    """The tiny base in another precision."""
    return replace(base, unet=copy.deepcopy(base.unet).to(dtype), text_encoder=copy.deepcopy(base.text_encoder).to(dtype))


def denoised(base: Base, method: Method, adapters: Sequence[Adapter], rows: int = 1, **changes: Any) -> Tensor:
    def encode() -> tuple[Encoded, Encoded]:
        negative, positive = encode_pair(base, [PROMPT], [""])
        return negative.rows([0] * rows), positive.rows([0] * rows)

    settings = {"size": (64, 32), "steps": 3, "guidance": 4.0, "scheduler": "ddim", "regions": BOTH, **changes}
    with LoraBank.on(base, adapters) as bank:
        return denoise(
            base, *encode(), seeds=range(rows), method=method, bank=bank, encode=encode, wording=Wording(prompt=PROMPT),
            **settings,
        )  # fmt: skip


@pytest.mark.parametrize(("injection", "scheduler"), [("cross_kv_out", "ddim"), ("masked_all", "euler")])
def test_the_gradient_is_that_of_finite_differences_and_goes_downhill(
    base: Base, pair: list[Adapter], injection: str, scheduler: str
) -> None:
    method = Looking.of(injection=injection)
    seen = []

    def look(run: Run, step: Step) -> None:
        plan = method.plan(method._looking, step, method.taps(run, selves=True))
        z = run.latents.double()

        def at(latents: Tensor) -> tuple[Tensor, Tensor]:
            return latents_gradient(run, step, latents, plan, method.loss, encoded=run.positive)

        loss, gradient = at(z)
        direction = gradient / gradient.norm() + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)) / 20
        h = 1e-6 * float(run.scheduler.init_noise_sigma)
        slope = float(at(z + h * direction)[0] - at(z - h * direction)[0]) / (2 * h)
        seen.append((slope, float((gradient * direction).sum())))
        assert float(gradient.norm()) > 0
        assert float(at(updated(z, gradient, 1e-4 / float(gradient.norm())))[0]) < float(loss)

    method.look = look
    denoised(as_precise(base, torch.float64), method, pair, steps=1, scheduler=scheduler)
    (found,) = seen
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def scripted(monkeypatch: pytest.MonkeyPatch, script: Callable[[int, list[int]], list[float]]) -> list[tuple[int, int]]:
    """Losses by a script ``(step, rows) -> loss of each``; gradients of 1. Returns the (step, rows) that were guided."""
    calls: list[tuple[int, int]] = []

    def fake(run: Run, step: Step, latents: Tensor, plan: object, loss: object, *, encoded: Encoded) -> tuple[Tensor, Tensor]:
        assert len(latents) == len(encoded.states)
        calls.append((step.index, len(latents)))
        return torch.tensor(script(step.index, list(range(len(latents))))), torch.ones_like(latents)

    monkeypatch.setattr(module, "latents_gradient", fake)
    return calls


class Still(LoraComposer):
    """Predicts no noise and remembers by how much guidance moved the latents."""

    def before_step(self, run: Run, step: Step) -> None:
        before = run.latents
        super().before_step(run, step)
        self.shifts.append((before - run.latents).flatten(1)[:, 0])

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.shifts: list[Tensor] = []

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, torch.zeros_like(x)


def test_guidance_latches_and_lasts_6_to_26_of_50_steps(
    base: Base, pair: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scripted(monkeypatch, lambda step, rows: [30.0 - step] * len(rows))
    method = Still.of(reinit=False, step=20)
    denoised(base, method, pair, steps=50)
    assert [step for step, _ in calls] == list(range(26))
    expected = [20 * (1 - 0.5 * i / 49) ** 0.5 for i in range(26)]
    assert [float(shift) for shift in method.shifts[:26]] == pytest.approx(expected, rel=1e-3)
    assert all(float(shift) == 0 for shift in method.shifts[26:])

    calls[:] = []
    scripted_rise = scripted(monkeypatch, lambda step, rows: [float(step)] * len(rows))
    denoised(base, Still.of(reinit=False, step=20), pair, steps=50)
    assert [step for step, _ in scripted_rise] == list(range(6))

    # A rise at step 9 of one picture alone ends its guidance; a later fall does not bring it back.
    several = scripted(monkeypatch, lambda step, rows: [50.0 - step + 20 * (step == 9 and row == 0) for row in rows])
    method = Still.of(reinit=False, step=20)
    denoised(base, method, pair, rows=2, steps=50)
    assert several == [(step, 2) for step in range(10)] + [(step, 1) for step in range(10, 26)]
    assert not bool(method.losses[9].isnan().any())
    assert bool(method.losses[10][0].isnan()) and float(method.losses[10][1]) == 40
    assert all(float(shift[0]) == 0 and float(shift[1]) > 0 for shift in method.shifts[10:26])


def test_the_embedded_base_takes_smaller_steps(base: Base, pair: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda step, rows: [30.0 - step] * len(rows))
    for family, size in (("embedded", 5), ("sd15", 20)):
        method = Still.of(reinit=False)
        other = replace(base, family=replace(base.family, small=family == "embedded"))
        denoised(other, method, [replace(each, weight=0.0) for each in pair], steps=2)
        assert float(method.shifts[0]) == pytest.approx(size, rel=1e-3)


def test_fewer_steps_scale_the_schedule(base: Base, pair: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scripted(monkeypatch, lambda step, rows: [30.0 - step] * len(rows))
    denoised(base, Still.of(reinit=False, step=20), pair, steps=20)
    assert [step for step, _ in calls] == list(range(11))
    assert phi(0, 20, 20.0) == 20 and phi(19, 20, 20.0) == pytest.approx(20 * 0.5**0.5) and phi(0, 1, 20.0) == 20


@pytest.mark.parametrize(("scheduler", "expected"), [("heun", [0, 2, 4]), ("dpmpp_2s", [0, 2])])
def test_latents_move_only_where_a_step_begins(
    base: Base, pair: list[Adapter], monkeypatch: pytest.MonkeyPatch, scheduler: str, expected: list[int]
) -> None:
    """In between, samplers of second order go back to the state they began with: a move there would be lost."""
    calls = scripted(monkeypatch, lambda step, rows: [30.0 - step] * len(rows))
    denoised(base, Still.of(reinit=False, step=20), pair, steps=6, scheduler=scheduler)
    assert [step for step, _ in calls] == expected


def test_a_picture_does_not_depend_on_its_batch(sample: Sample, pair: list[Adapter]) -> None:
    method = LoraComposer.of(step=1)
    both = sample(method, pair, prompt=PROMPT, regions=BOTH, seeds=[3, 4], steps=4)
    alone = sample(method, pair, prompt=PROMPT, regions=BOTH, seeds=[4], steps=4)
    assert close(both[1:], alone, 1e-3)


def test_each_part_acts_and_costs_what_it_should(sample: Sample, pair: list[Adapter]) -> None:
    counted = []
    apart = regions("cat@0,0,0.375,1", "dog@0.625,0,1,1")  # regions that fill the picture have nowhere to leak to

    class Counted(LoraComposer):
        def after_step(self, run: Run, step: Step) -> None:
            if step.index == step.count - 1:
                counted.append((run.passes.whole, run.passes.early, run.passes.backward))

    def of(**options: Any) -> Tensor:
        return sample(Counted.of(**options), pair, prompt=PROMPT, regions=apart, steps=10, seeds=[0])

    whole = of()
    # Ten guided steps of two rows; guidance at the steps 0 to 5 at most; one pass for the noise.
    assert counted[-1][0] == 20 and 1 + 2 <= counted[-1][1] <= 1 + 6 and counted[-1][2] == counted[-1][1] - 1
    bare = of(**BARE)
    assert counted[-1] == (20, 0, 0)
    for options in ({"isolation": False}, {"step": 0}, {"reinit": False}, {"leak": 50}, {"injection": "cross_kv_out"}):
        assert not close(of(**options), whole, 1e-3), options
    assert torch.equal(of(), whole) and torch.equal(of(**BARE), bare)


# What it needs and what it leaves behind.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("places", [("0,0,1,1", "0,0,1,1"), ("0,0,0.6,1", "0.4,0,1,1")])
def test_overlapping_and_full_regions_are_finite_in_half_precision(
    base: Base, pair: list[Adapter], dtype: torch.dtype, places: tuple[str, str]
) -> None:
    half = as_precise(base, dtype)
    both = regions(f"cat@{places[0]}", f"dog@{places[1]}")
    got = denoised(half, LoraComposer.of(step=1), pair, regions=both, steps=2)
    assert bool(got.isfinite().all())


def test_everything_is_as_before_also_after_an_error(base: Base, sample: Sample, pair: list[Adapter]) -> None:
    before = {name: layer.processor for name, layer in attention_layers(base.unet)}
    plain = sample(None, prompt=PROMPT)

    def fail(event: object) -> None:
        raise ZeroDivisionError

    for on_step in (None, fail):
        try:
            sample(LoraComposer.of(injection="masked_all"), pair, prompt=PROMPT, regions=BOTH, steps=2, on_step=on_step)
        except ZeroDivisionError:
            assert on_step is fail
        assert all(layer.processor is before[name] for name, layer in attention_layers(base.unet))
        assert not any("forward" in layer.__dict__ for layer in base.unet.modules())
        assert not any(layer._forward_hooks for layer in base.unet.modules())
        assert all(weight.grad is None for weight in base.unet.parameters())
    assert torch.equal(sample(None, prompt=PROMPT), plain)


def test_what_it_explains(sample: Sample, pair: list[Adapter]) -> None:
    figures: list[Any] = []
    sample(LoraComposer.of(), pair, prompt=PROMPT, regions=BOTH, steps=4, figures=figures)
    boxes, words, loss = figures
    assert isinstance(boxes, Boxes) and boxes.boxes == {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 1)}
    assert isinstance(words, Maps) and [len(maps) for maps in words.rows.values()] == [len(words.columns)] * 2
    assert words.rows["cat"][0].shape == (4, 8)
    assert isinstance(loss, Curves) and len(loss.lines["loss"]) == len(words.columns)


def test_words_that_a_lora_carries_for_each_layer_speak_in_its_region(base: Base, pair: list[Adapter]) -> None:
    vectors = torch.randn(len(cross_layers(base.unet)), 1, 32, generator=torch.Generator().manual_seed(0))
    own = replace(pair[0], lora=replace(pair[0].lora, tokens={"sks": {"text_encoder": vectors}}))
    reading = Reading(embeddings=tuple(carried_embeddings("cat", own.lora)))

    def of(method: Method | None, adapter: Adapter, prompt: str, reading: Reading = reading, **more: Any) -> Tensor:
        def encode() -> tuple[Encoded, Encoded]:
            return encode_pair(base, [prompt], [""], reading)

        with LoraBank.on(base, [adapter]) as bank:
            return denoise(
                base, *encode(), seeds=[0], size=(64, 32), steps=3, guidance=4.0, scheduler="ddim", method=method, bank=bank,
                encode=encode, wording=Wording(prompt=prompt, reading=reading), **more,
            )  # fmt: skip

    method, whole = LoraComposer.of(**PAPER), regions(f"cat@{WHOLE}")
    filtered = replace(cross_only(own), lora=replace(cross_only(own).lora, tokens=own.lora.tokens))
    got = of(method, own, PROMPT, regions=whole)
    assert close(got, of(None, filtered, "a sks cat"))
    assert not close(got, of(method, pair[0], PROMPT, reading=Reading(), regions=whole), 1e-2)
    guided = of(LoraComposer.of(step=1), own, PROMPT, regions=regions(f"cat@{LEFT}"))
    assert bool(guided.isfinite().all())
