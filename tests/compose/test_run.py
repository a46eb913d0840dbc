"""Probe runs, restarts, starts from a picture, inversion, states side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter
from compose.denoise import Start, denoise, generators_of, initial_noise, invert, skipped_by
from compose.plan import AttentionPlan, Isolation, Regions, Role, Tap, Where, columns
from compose.run import Method, Run, Step
from compose.schedulers import SAMPLERS, make_scheduler
from compose.text import encode_pair
from studio.base import Base
from studio.errors import CancelledError, RequestError
from studio.lora.model import Lora

Sample = Callable[..., Tensor]
SIZE = (64, 32)


@pytest.fixture(scope="module")
def picture(base: Base) -> Tensor:
    return torch.randn(1, 8, 8, 16, generator=torch.Generator().manual_seed(5)) * 0.8


@pytest.mark.parametrize("name", ["ddim", "deis", "dpmpp_2m", "euler", "heun", "unipc"])
def test_a_start_from_a_picture_is_the_stock_image_to_image(base: Base, tiny_base: Path, name: str) -> None:
    """The stock pipeline draws from one generator: first the latents of the picture, then its noise."""
    from diffusers import StableDiffusionImg2ImgPipeline

    stock = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_base)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = make_scheduler(name, base.scheduler)
    pixels = torch.rand(1, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = stock(
        "a red apple", image=pixels, strength=0.6, num_inference_steps=5, guidance_scale=4.0, negative_prompt="night",
        generator=generators_of([3]), output_type="latent",
    ).images  # fmt: skip
    (generator,) = generators_of([3])
    latents = base.vae.encode(pixels).latent_dist.sample(generator) * base.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    negative, positive = encode_pair(base, ["a red apple"], ["night"])
    got = denoise(
        base, negative, positive, seeds=[3], size=SIZE, steps=5, guidance=4.0, scheduler=name, start=Start(latents=latents),
        noise=noise,
    )  # fmt: skip
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_starts_from_a_picture(base: Base, sample: Sample, picture: Tensor, name: str) -> None:
    seen: list[float] = []
    got = sample(
        None,
        scheduler=name,
        steps=4,
        start=Start(latents=picture, strength=0.5),
        on_step=lambda e: seen.append(e.step.fraction),
    )
    assert got.isfinite().all()
    assert seen[0] == pytest.approx(0.5, abs=0.1)


def test_strength_out_of_range_is_one_sentence(base: Base) -> None:
    sampler = make_scheduler("ddim", base.scheduler)
    assert skipped_by(sampler, 20, 1.0) == 0
    assert skipped_by(sampler, 20, 0.25) == 15
    for strength, why in ((0.0, "out of range"), (1.5, "out of range"), (0.01, "leaves none of 20 steps")):
        with pytest.raises(RequestError, match=why):
            skipped_by(sampler, 20, strength)


def test_a_weak_start_stays_near_its_picture(base: Base, sample: Sample, picture: Tensor) -> None:
    far = [
        float((sample(None, steps=20, guidance=1.0, start=Start(latents=picture, strength=s)) - picture).abs().mean())
        for s in (0.05, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]


class Ideal(Method):
    """Nearly the exact prediction for pictures of unit noise, ``eps = sqrt(1 - a) x``: a path without kinks."""

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, (1 - run.scheduler.alphas_cumprod[int(step.timestep)]).sqrt() * x * 0.7


def test_inversion_leads_back(base: Base, picture: Tensor) -> None:
    _, positive = encode_pair(base, ["a red apple"], [""])
    states: list[Tensor] = []
    errors = []
    for steps in (10, 40):
        states.clear()
        noise = invert(
            base, picture, positive, size=SIZE, steps=steps, method=Ideal(), on_step=lambda event: states.append(event.latents)
        )
        assert len(states) == steps
        assert torch.equal(states[-1], noise)
        back = denoise(
            base, positive, positive, seeds=[0], size=SIZE, steps=steps, guidance=1.0, scheduler="ddim", noise=noise,
            method=Ideal(),
        )  # fmt: skip
        errors.append(float((back - picture).abs().mean()))
    assert (noise - picture).abs().mean() > 0.1
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.08 * float(picture.abs().mean())


def test_states_side_by_side_are_runs_of_their_own(base: Base, sample: Sample) -> None:
    negative, positive = encode_pair(base, ["a red apple", "a green dog"], ["night", ""])
    for scheduler in ("ddim", "euler_a"):
        settings: dict[str, Any] = {"size": SIZE, "steps": 4, "scheduler": scheduler}
        both = denoise(
            base, negative.rows([0, 0, 1, 1]), positive.rows([0, 0, 1, 1]), seeds=[1, 2], states=2, guidance=[1.0, 5.0],
            **settings,
        )  # fmt: skip
        for state, guidance in ((0, 1.0), (1, 5.0)):
            alone = denoise(
                base, negative.rows([state] * 2), positive.rows([state] * 2), seeds=[1, 2], guidance=guidance, **settings
            )
            torch.testing.assert_close(both[2 * state : 2 * state + 2], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="2 rows of prompts for 2 seeds and 2 states"):
        denoise(base, negative, positive, seeds=[1, 2], states=2, guidance=1.0, **settings)


class Curious(Method):
    """Probes three steps with maps, then begins again from noise turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.probed: Tensor | None = None
        self.maps = 0

    def prepare(self, run: Run) -> None:
        before = run.latents.clone()
        states = [generator.get_state() for generator in run.generators]
        probe = run.probe(Looking(self), 3)
        self.probed = probe.latents
        assert torch.equal(run.latents, before)
        assert all(torch.equal(a, b.get_state()) for a, b in zip(states, run.generators, strict=True))

    def after_step(self, run: Run, step: Step) -> None:
        self.steps.append(step.index)
        if self.steps == [0, 1]:
            run.restart(run.noise.flip(-1))


class Looking(Method):
    """What a probe does: reads maps in every step."""

    def __init__(self, owner: Curious) -> None:
        super().__init__()
        self.owner = owner

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        tap = Tap(name="word", where=Where(role=Role.CROSS), sets=columns(16, [2]))
        with run.attend(AttentionPlan(taps=(tap,))).collecting() as maps:
            out = super().predict(run, step, x)
        self.owner.maps += len(maps["word"])
        return out


def test_a_probe_leaves_no_trace_and_a_restart_begins_anew(base: Base, sample: Sample) -> None:
    processors = [module.processor for module in base.unet.modules() if hasattr(module, "processor")]
    ends: list[Tensor] = []
    plain: list[Tensor] = []
    for scheduler in ("euler_a", "dpmpp_2m"):
        curious = Curious()
        ends.clear()
        got = sample(curious, scheduler=scheduler, on_step=lambda event: ends.append(event.latents))
        assert curious.steps == [0, 1, 0, 1, 2, 3, 4]
        assert curious.maps == 7 * 3
        assert [module.processor for module in base.unet.modules() if hasattr(module, "processor")] == processors
    noise = initial_noise(base, generators_of([0]), SIZE).flip(-1)
    torch.testing.assert_close(got, sample(None, scheduler="dpmpp_2m", noise=noise))
    sample(None, scheduler="dpmpp_2m", on_step=lambda event: plain.append(event.latents))
    assert curious.probed is not None
    torch.testing.assert_close(curious.probed, plain[2])
    assert torch.equal(ends[1], plain[1])


def test_endless_restarts_are_a_programming_error(sample: Sample) -> None:
    class Lost(Method):
        def after_step(self, run: Run, step: Step) -> None:
            run.restart()

    with pytest.raises(RuntimeError, match="Lost asked for more than 20 restarts"):
        sample(Lost(), size=(16, 16))


class Planned(Method):
    def prepare(self, run: Run) -> None:
        run.attend(AttentionPlan(isolation=Isolation(regions=Regions(((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))))))


def test_a_plan_acts_for_one_run_only(base: Base, sample: Sample) -> None:
    plain = sample(None)
    assert (sample(Planned()) - plain).abs().max() > 1e-3
    assert torch.equal(sample(None), plain)
    with pytest.raises(ZeroDivisionError):
        sample(Planned(), on_step=lambda event: 1 // 0)
    with pytest.raises(CancelledError):
        sample(Planned(), cancelled=lambda: True)
    assert torch.equal(sample(None), plain)


def test_loras_act_while_inverting(base: Base, make_lora: Callable[..., Lora], picture: Tensor) -> None:
    from compose.bank import LoraBank

    _, positive = encode_pair(base, ["a red apple"], [""])
    plain = invert(base, picture, positive, size=SIZE, steps=4)
    with LoraBank.on(base, [Adapter("one", make_lora(1))]) as bank:
        assert (invert(base, picture, positive, size=SIZE, steps=4, bank=bank) - plain).abs().max() > 0.01
