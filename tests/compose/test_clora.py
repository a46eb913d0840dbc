"""CLoRA: contrast, masks and fusion as formulas; prompt variants and token groups; gradients, memory, costs; oracles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compose.bank import Adapter
from compose.clora import BASE, CLoRA, CLoRAOptions
from compose.clora_masks import above
from compose.denoise import guide
from compose.maps import Seen
from compose.run import Method, Run, Step
from compose.text import Wording
from studio.base import Base
from studio.errors import CancelledError, RequestError
from studio.lora.model import Lora
from tests.bench.guided_cost import kept_for_backward

Sample = Callable[..., Tensor]
Make = Callable[..., Lora]
PROMPT = "a red cat on the green dog"


def concept(make_lora: Make, seed: int, trigger: str, noun: str, wanted: str = "attn1 attn2", **more: str) -> Adapter:
    told = {"trigger": trigger, "class_word": noun, **more}
    return Adapter(f"lora {seed}", make_lora(seed, wanted, size=0.25, **told))


def likeness(maps: Tensor, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean cosine within classes and across them, ``[n]`` each: what the loss raises and lowers."""
    unit = torch.nn.functional.normalize(maps, dim=-1, eps=1e-8)
    alike = unit @ unit.transpose(-1, -2)
    label = torch.tensor(list(classes), device=maps.device)
    same = label[:, None] == label[None, :]
    pairs = same & ~torch.eye(len(label), dtype=torch.bool, device=maps.device)
    return alike[..., pairs].mean(-1), alike[..., ~same].mean(-1)


@pytest.fixture(scope="module")
def two(make_lora: Make) -> list[Adapter]:
    return [concept(make_lora, 1, "red", "cat"), concept(make_lora, 2, "green", "dog", "attn2 conv1")]


@pytest.fixture(scope="module")
def four(make_lora: Make) -> list[Adapter]:
    named = [("red", "cat"), ("green", "dog"), ("sks", "apple"), ("photo", "grass")]
    return [concept(make_lora, i, *both) for i, both in enumerate(named, 1)]


MANY = {2: PROMPT, 3: "a red cat, a green dog, a sks apple", 4: "red cat, green dog, sks apple, photo grass"}


class Kept(CLoRA):
    """Keeps the run of its sampling."""

    run: Run

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.run = run


# The method against what it is made of


class Oracle(Method):
    """CLoRA without updates, written out: a forward of one row at a time, and the mean of what they predict."""

    def __init__(self, clora: CLoRA) -> None:
        super().__init__()
        self.inner = clora

    def prepare(self, run: Run) -> None:
        self.inner.prepare(run)

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        parts = []
        for which in (BASE, 0, 1):
            assert run.bank is not None
            with run.bank.acting(self.inner.only(run, which)):
                parts.append([run.forward(x, step.timestep, text) for text in self.inner.prompts[which]])
        uncond, cond = (torch.stack(each).mean(0) for each in zip(*parts, strict=True))
        return uncond, cond


def test_without_updates_and_masks_it_is_the_mean_of_all_passes(sample: Sample, two: list[Adapter]) -> None:
    expected = sample(Oracle(CLoRA()), two, prompt=PROMPT, seeds=[0, 3])
    for chunk in (None, 1, 2):
        got = sample(CLoRA.of(step=0, mask_after=1, chunk=chunk), two, prompt=PROMPT, seeds=[0, 3])
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    tiny = sample(CLoRA.of(step=1e-30, mask_after=1), two, prompt=PROMPT, seeds=[0, 3])
    assert torch.equal(tiny, sample(CLoRA.of(step=0, mask_after=1), two, prompt=PROMPT, seeds=[0, 3]))


def test_loras_that_do_nothing_leave_the_stock_picture(sample: Sample, make_lora: Make) -> None:
    """Masks then join equal predictions; the LoRAs have no triggers, so all prompts are the same."""
    lora = make_lora(1)
    still = replace(lora, layers={name: replace(delta, up=delta.up * 0) for name, delta in lora.layers.items()})
    nothing = [Adapter(name, still) for name in ("one", "two")]
    method = CLoRA.of(step=0, nouns={"one": "cat", "two": "dog"})
    plain = sample(None, prompt=PROMPT, seeds=[0, 3])
    torch.testing.assert_close(sample(method, nothing, prompt=PROMPT, seeds=[0, 3]), plain, atol=1e-4, rtol=1e-4)
    assert method.masks is not None and method.masks.shape[0] == 3


def test_one_concept_is_plain_inference_with_it(sample: Sample, two: list[Adapter], make_lora: Make) -> None:
    style = Adapter("look", make_lora(7, "attn1", kind="style", trigger="night", class_word="style"))
    got = sample(CLoRA(), [two[0], style], prompt=PROMPT)
    torch.testing.assert_close(got, sample(None, [two[0], style], prompt=PROMPT), atol=1e-4, rtol=1e-4)


def test_a_style_acts_in_every_pass_and_stays_in_every_prompt(sample: Sample, two: list[Adapter], make_lora: Make) -> None:
    style = Adapter("look", make_lora(7, "attn1", kind="style", trigger="night", class_word="style"))
    plain = Adapter("look", make_lora(7, "attn1"))
    seen: list[Any] = []

    class Watched(Kept):
        def read(self, run: Run, step: Step, latents: Tensor, some: Any) -> Any:
            seen.append([self.weights(run, concept) for concept in some])
            return super().read(run, step, latents, some)

    method = Watched.of(until=0.1)
    prompt = PROMPT + " in night style"
    got = sample(method, [two[0], style, two[1]], prompt=prompt)
    assert all(p.endswith("in night style") for p in method.variants.prompts)  # type: ignore[union-attr]
    assert seen[:3] == [[[0.0, 1.0, 0.0]], [[1.0, 1.0, 0.0]], [[0.0, 1.0, 1.0]]]
    told = sample(CLoRA.of(until=0.1, always="look"), [two[0], plain, two[1]], prompt=prompt)
    assert torch.equal(got, told)
    with pytest.raises(RequestError, match="'look' does not say what it draws"):
        sample(CLoRA(), [two[0], plain, two[1]], prompt=prompt)


def test_masks_come_from_each_pass_of_its_own_words(sample: Sample, two: list[Adapter]) -> None:
    """Put together by hand from the maps of the last forward."""

    class Watched(Kept):
        def weigh(self, step: Step, seen: Seen, like: Tensor) -> Tensor:
            weights = super().weigh(step, seen, like)
            if step.index == 4:
                one = above(seen.words[1][:, [0, 2]], 0.98)
                other = above(seen.words[2][:, [1, 2]], 0.98)
                masks = torch.stack([~(one | other), one, other]).float()
                wide = masks.repeat_interleave(2, -1).repeat_interleave(2, -2)
                torch.testing.assert_close(weights[:, :, 0], wide / wide.sum(0))
                self.filled = (one.float().mean(), other.float().mean())
            return weights

    method = Watched.of(step=0, threshold=0.98)
    sample(method, two, prompt=PROMPT, seeds=[0, 1])
    assert all(0 < share <= 1 for share in method.filled) and min(method.filled) < 1
    wide, narrow = (CLoRA.of(step=0, threshold=t) for t in (0.0, 0.95))
    for each in (wide, narrow):
        sample(each, two, prompt=PROMPT)
    assert wide.masks is not None and narrow.masks is not None
    assert wide.masks[1:].sum() > narrow.masks[1:].sum() and narrow.masks[0].sum() > 0


# Gradients


@pytest.fixture
def ready(sample: Sample, four: list[Adapter]) -> Callable[..., tuple[Kept, Run, Step]]:
    """A method that has finished a run of ``K`` concepts; its bank is attached again for whatever a test asks of it."""
    from compose.bank import LoraBank

    def make(base: Base, count: int, stack: Any, **options: Any) -> tuple[Kept, Run, Step]:
        method = Kept.of(until=0, **options)
        sample(method, four[:count], prompt=MANY[count], steps=2, seeds=[0, 1])
        run = method.run
        run.bank = stack.enter_context(LoraBank.on(base, four[:count]))
        run._attention = None
        stack.enter_context(run.resources)
        return method, run, Step(index=0, count=2, timestep=run.timesteps[0])

    return make


@pytest.fixture
def stack() -> Iterator[Any]:
    from contextlib import ExitStack

    with ExitStack() as opened:
        yield opened


@pytest.mark.parametrize("count", [2, 3])
def test_the_gradient_of_two_passes_is_the_joint_one(base: Base, ready: Any, stack: Any, count: int) -> None:
    method, run, step = ready(base, count, stack, gradient="joint")
    z = torch.randn(run.latents.shape, generator=torch.Generator().manual_seed(2))
    value, expected = method.descent(run, step, z)
    assert value.shape == (2,) and expected.abs().amax((1, 2, 3)).min() > 1e-6
    for chunk in (None, 2):
        method.options = CLoRAOptions(until=0, chunk=chunk)
        again, got = method.descent(run, step, z)
        torch.testing.assert_close(again, value, atol=1e-5, rtol=1e-5)
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_a_row_whose_gradient_is_not_finite_in_one_pass_stays(base: Base, ready: Any, stack: Any) -> None:
    method, run, step = ready(base, 2, stack)
    _, whole = method.descent(run, step, run.latents)
    spoilt = torch.zeros(6, 1, 1)
    spoilt[3] = float("nan")  # the second row of the second pass
    plain = method.loss
    method.loss = lambda maps: plain(maps) + sum((m.values * spoilt).sum() * torch.tensor([0.0, 1.0]) for m in maps["words"])
    _, gradient = method.descent(run, step, run.latents)
    assert torch.equal(gradient[0], whole[0]) and not gradient[1].any() and whole[1].any()
    assert any("left out 1 gradients" in note for note in run.notes)


def test_updates_part_the_subjects(base: Base, ready: Any, stack: Any) -> None:
    """They raise the likeness within classes and lower it across, and a small step lowers the loss."""
    from compose.guidance import scaled, updated
    from compose.maps import mean_map, min_max

    method, run, step = ready(base, 2, stack)
    z = torch.randn(run.latents.shape, generator=torch.Generator().manual_seed(4))

    def alike(latents: Tensor) -> tuple[Tensor, Tensor]:
        assert method.variants is not None
        maps = mean_map(method.read(run, step, latents, method.passes)["words"]).unflatten(0, (3, -1)).flatten(3)
        chosen = torch.stack([maps[number, :, index] for number, index in method.variants.maps], dim=1)
        return likeness(min_max(chosen), method.variants.classes)

    within, across = alike(z)
    first, _ = method.descent(run, step, z)
    for _ in range(8):
        _, gradient = method.descent(run, step, z)
        z = updated(z, scaled(run, step, gradient, "noise"), 0.05)
    after_within, after_across = alike(z)
    last, _ = method.descent(run, step, z)
    assert (last < first).all()
    assert (after_across < across).all() and (after_within - after_across > within - across).all()


def test_memory_is_flat_in_the_number_of_loras(base: Base, ready: Any, stack: Any) -> None:
    needed = {}
    for how in ("two-pass", "joint"):
        for count in (2, 4):
            method, run, step = ready(base, count, stack, gradient=how)
            needed[how, count] = kept_for_backward(base, lambda: method.descent(run, step, run.latents))  # noqa: B023 (called at once)
            stack.pop_all().close()
    assert needed["two-pass", 4] <= 1.05 * needed["two-pass", 2]
    assert needed["joint", 2] >= 2.5 * needed["two-pass", 2]
    assert needed["joint", 4] >= 1.6 * needed["joint", 2]


# Schedule and costs


def test_updates_follow_the_schedule(sample: Sample, two: list[Adapter]) -> None:
    def updates(**options: Any) -> list[int]:
        method = Kept.of(step=0.1, **options)
        sample(method, two, prompt=PROMPT, steps=10)
        assert len(method.losses) == sum(method.updates)
        return method.updates

    assert updates() == [1] * 5 + [0] * 5
    assert updates(refine="0,0.2,0.4", refinements=3) == [3, 1, 3, 1, 3, 0, 0, 0, 0, 0]
    assert updates(refine=(0.0, 0.4), refinements=2, between=False) == [2, 0, 0, 0, 2, 0, 0, 0, 0, 0]
    assert updates(legacy_eps=True, until=0.2, refine="0", refinements=2) == [2, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert updates(until=0) == [0] * 10
    defaults = CLoRAOptions()
    assert (defaults.step, defaults.until, defaults.tau, defaults.threshold, defaults.refinements) == (20, 0.5, 0.5, 0.3, 20)


def test_legacy_predicts_from_before_the_update(sample: Sample, two: list[Adapter]) -> None:
    """One step: the prediction is that without updates, and the sampler starts from the updated latents."""
    seen: dict[str, Any] = {}

    class Watched(CLoRA):
        def predict(self, run: Run, step: Step, x: Tensor) -> Any:
            out = super().predict(run, step, x)
            seen[str(self.options.legacy_eps), self.options.step] = (x, guide(*out, run.guidance), run.latents)  # type: ignore[index]
            return out

    for legacy, size in ((True, 5.0), (False, 0.0), (False, 5.0)):
        sample(Watched.of(legacy_eps=legacy, step=size), two, prompt=PROMPT, steps=1)
    x, eps, latents = seen["True", 5.0]  # type: ignore[index]
    plain_x, plain_eps, plain_latents = seen["False", 0.0]  # type: ignore[index]
    _, new_eps, new_latents = seen["False", 5.0]  # type: ignore[index]
    assert torch.equal(x, plain_x) and torch.equal(eps, plain_eps) and not torch.equal(latents, plain_latents)
    assert torch.equal(latents, new_latents) and not torch.equal(new_eps, eps)


@pytest.mark.parametrize(("gradient", "early"), [("two-pass", 2), ("joint", 1)])
@pytest.mark.parametrize("count", [2, 3])
def test_it_computes_what_it_must_and_no_more(
    base: Base, sample: Sample, four: list[Adapter], gradient: str, early: int, count: int
) -> None:
    """Counted in passes, and in floating-point operations against the same passes one by one."""
    steps, seeds, prompt = 4, [0, 1], MANY[count]
    method = Kept.of(step=0.1, gradient=gradient)
    with FlopCounterMode(display=False) as counter:
        sample(method, four[:count], prompt=prompt, steps=steps, seeds=seeds)
    passes, rows, guided = method.run.passes, len(seeds) * (count + 1), 2
    assert (passes.whole, passes.early, passes.backward) == (2 * rows * steps, early * rows * guided, rows * guided)
    x = torch.randn(1, 8, 8, 16)
    states = torch.randn(1, 16, 32)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        base.unet(x, 5, encoder_hidden_states=states)
    whole = one.get_total_flops()

    class Part(CLoRA):
        """Counts one early forward with its product."""

        def before_step(self, run: Run, step: Step) -> None:
            if step.index == 0:
                self.options = CLoRAOptions(gradient="joint")
                with FlopCounterMode(display=False) as both:
                    self.descent(run, step, run.latents)
                self.together = both.get_total_flops()
                with FlopCounterMode(display=False) as single, torch.no_grad():
                    self.read(run, step, run.latents, [BASE])
                self.early = single.get_total_flops()
            self.updates.append(0)

    part = Part.of(step=0)
    sample(part, four[:count], prompt=prompt, steps=1)
    assert part.early < 0.9 * whole
    forwards = early * part.early * (count + 1)
    backwards = part.together - part.early * (count + 1)
    must = steps * 2 * (count + 1) * whole + guided * (forwards + backwards)
    assert counter.get_total_flops() <= 1.25 * must * len(seeds)


def test_samplers_that_look_twice_are_guided_once_a_step(sample: Sample, two: list[Adapter]) -> None:
    method = Kept.of(step=0.5, until=1)
    assert sample(method, two, prompt=PROMPT, steps=3, scheduler="heun").isfinite().all()
    assert method.updates == [1, 0, 1, 0, 1]
    assert sample(CLoRA(), two, prompt=PROMPT, steps=3, scheduler="euler", guidance=1.0).isfinite().all()


def test_rows_do_not_change_each_other(sample: Sample, two: list[Adapter]) -> None:
    both = sample(CLoRA.of(step=2), two, prompt=PROMPT, seeds=[0, 5])
    for row, seed in enumerate((0, 5)):
        alone = sample(CLoRA.of(step=2), two, prompt=PROMPT, seeds=[seed])
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-4, rtol=1e-3)


def test_cancelling_inside_a_guidance_pass(sample: Sample, two: list[Adapter]) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 6  # the loop, three maps, then the second of three products

    method = Kept.of(step=1)
    with pytest.raises(CancelledError):
        sample(method, two, prompt=PROMPT, cancelled=cancelled)
    assert method.updates == [0] and method.run.passes.early == 4


def test_a_text_encoder_lora_reads_only_its_own_prompt(sample: Sample, two: list[Adapter], make_lora: Make) -> None:
    speaking = concept(make_lora, 8, "green", "dog", "attn2 text_encoder")
    method = Kept.of(step=0)
    sample(method, [two[0], speaking], prompt=PROMPT)
    plain = Kept.of(step=0)
    sample(plain, two, prompt=PROMPT)
    for which, same in ((BASE, True), (0, True), (1, False)):
        assert torch.equal(method.prompts[which][1].states, plain.prompts[which][1].states) is same


def test_masks_and_losses_are_explained(sample: Sample, two: list[Adapter]) -> None:
    class Explained(CLoRA):
        def after_step(self, run: Run, step: Step) -> None:
            run.explaining = True
            self.figures = self.explain(run)

    method = Explained.of(step=0.1)
    sample(method, two, prompt=PROMPT, seeds=[0, 1])
    masks, losses = method.figures
    assert list(masks.rows) == ["base", "lora 1", "lora 2"] and masks.columns == [f"step {i}" for i in (2, 3, 4, 5)]  # type: ignore[attr-defined]
    assert len(losses.lines["picture 2"]) == 3  # type: ignore[attr-defined]


def test_wording_carries_the_negative(sample: Sample, two: list[Adapter]) -> None:
    one = sample(CLoRA.of(step=0), two, prompt=PROMPT, negative="night")
    other = sample(CLoRA.of(step=0), two, prompt=PROMPT, negative="grass")
    assert (one - other).abs().max() > 1e-3
    told = sample(CLoRA.of(step=0), two, prompt=PROMPT, negative="night", wording=Wording(prompt=PROMPT, negative="grass"))
    torch.testing.assert_close(told, other)
