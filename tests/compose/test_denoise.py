from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter, LoraBank
from compose.denoise import Event, denoise, generators_of, initial_noise, original_estimate
from compose.merge import Merge
from compose.run import Method, Run, Step
from compose.schedulers import KNOWN, make_scheduler, sampler_name
from compose.text import encode_pair
from studio.base import Base
from studio.errors import CancelledError, NumericsError, RequestError, UnknownNameError
from studio.lora.model import Lora
from tests.compose.test_schedulers import stand_in

SIZE = (64, 32)
STOCHASTIC = {
    "ddpm", "dpm2_a", "dpm_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "dpmpp_sde", "dpmpp_sde_karras", "euler_a", "lcm",
    "sa_solver", "tcd",
}  # fmt: skip
CLASSES = {sampler.cls: name for name, sampler in KNOWN.items()}
"""A sampler of each class."""
EPSILON_AND_V = {"dpm2", "dpm2_a", "dpm_sde", "euler_a", "pndm"}
"""Those whose classes do not take a model that predicts the picture itself."""


def sample(base: Base, seeds: list[int], prompt: str = "a red apple", **changes: Any) -> Tensor:
    settings = {"size": SIZE, "steps": 4, "guidance": 4.0, "scheduler": "ddim", **changes}
    negative, positive = encode_pair(base, [prompt], ["night"])
    rows = [0] * len(seeds)
    return denoise(base, negative.rows(rows), positive.rows(rows), seeds=seeds, **settings)


@pytest.fixture(scope="module")
def stock(tiny_base: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def expected_of(stock: Any, base: Base, name: str) -> Tensor:
    """What the stock pipeline makes of the seeds 5 and 6."""
    generators = generators_of([5, 6])
    noise = initial_noise(base, generators, SIZE)
    stock.scheduler = make_scheduler(name, base.scheduler)
    latents: Tensor = stock(
        ["a red apple"] * 2, negative_prompt=["night"] * 2, width=SIZE[0], height=SIZE[1], num_inference_steps=4,
        guidance_scale=4.0, latents=noise, generator=generators, output_type="latent", eta=0.3 if name == "tcd" else 0.0,
    ).images  # fmt: skip
    return latents


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_equals_the_stock_pipeline(base: Base, stock: Any, name: str) -> None:
    expected = expected_of(stock, base, name)
    got = sample(base, [5, 6], scheduler=name)
    assert got.std() > 0.1
    assert (got - expected).abs().max() <= 1e-4


def predicting(base: Base, kind: str) -> Base:
    """The base as if its model were trained to predict something else."""
    return dataclasses.replace(base, scheduler=type(base.scheduler).from_config(base.scheduler.config, prediction_type=kind))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "v_prediction") for name in sorted(CLASSES.values())),
        *((name, "sample") for name in sorted({*CLASSES.values()} - EPSILON_AND_V)),
    ],
)
def test_equals_the_stock_pipeline_whatever_the_model_predicts(base: Base, stock: Any, name: str, kind: str) -> None:
    other = predicting(base, kind)
    expected = expected_of(stock, other, name)
    assert stock.scheduler.config.prediction_type == kind
    got = sample(other, [5, 6], scheduler=name)
    assert got.std() > 0.01
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_estimate_is_the_picture_when_the_model_is_right(base: Base, name: str, kind: str) -> None:
    scheduler = make_scheduler(name, predicting(base, kind).scheduler)
    scheduler.set_timesteps(5)
    clean, noise = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep = scheduler.timesteps[2]
    noisy = scheduler.scale_model_input(scheduler.add_noise(clean, noise, timestep[None]), timestep)
    share = scheduler.alphas_cumprod[int(timestep)]
    exact = {"epsilon": noise, "v_prediction": share.sqrt() * noise - (1 - share).sqrt() * clean, "sample": clean}[kind]
    torch.testing.assert_close(original_estimate(scheduler, noisy, exact, timestep), clean, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ["ddim", "euler", *sorted(STOCHASTIC)])
def test_an_item_starts_from_its_own_noise_in_any_batch(base: Base, name: str) -> None:
    together = sample(base, [1, 2, 3], scheduler=name)
    for row, seed in enumerate((1, 2, 3)):
        assert (together[row] - sample(base, [seed], scheduler=name)[0]).abs().max() <= 1e-4
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_work(base: Base, name: str, steps: int) -> None:
    assert sample(base, [0], scheduler=name, steps=steps).isfinite().all()


@pytest.mark.parametrize(("name", "steps"), [("lcm", 60), ("ddim", 1001)])
def test_more_steps_than_a_sampler_has_are_one_sentence(base: Base, name: str, steps: int) -> None:
    with pytest.raises(RequestError, match=f"cannot sample in {steps} steps"):
        sample(base, [0], scheduler=name, steps=steps)


def test_same_bits_again(base: Base) -> None:
    assert torch.equal(sample(base, [4, 9], scheduler="euler_a"), sample(base, [4, 9], scheduler="euler_a"))


def test_guidance_one_makes_no_unconditional_pass(base: Base) -> None:
    rows: list[int] = []
    handle = base.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        one = sample(base, [1, 2], guidance=1.0)
        assert set(rows) == {2}
        rows.clear()
        sample(base, [1, 2], guidance=2.0)
        assert set(rows) == {4}
    finally:
        handle.remove()
    negative, positive = encode_pair(base, ["a red apple"], ["something else"])
    other = denoise(
        base, negative.rows([0, 0]), positive.rows([0, 0]), seeds=[1, 2], size=SIZE, steps=4, guidance=1.0, scheduler="ddim"
    )
    assert torch.equal(one, other)


class Recorder(Method):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare(self, run: Run) -> None:
        self.calls.append("prepare")

    def before_step(self, run: Run, step: Step) -> None:
        self.calls.append(f"before {step.index} {step.fraction:g}")

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        self.calls.append("predict")
        return torch.zeros_like(x), torch.ones_like(x)

    def after_step(self, run: Run, step: Step) -> None:
        self.calls.append("after")


def test_hooks_in_order_and_guidance_by_the_loop(base: Base) -> None:
    method = Recorder()
    got = sample(base, [0], method=method, steps=2, guidance=3.0)
    once = ["predict", "after"]
    assert method.calls == ["prepare", "before 0 0", *once, "before 1 0.5", *once]
    scheduler = make_scheduler("ddim", base.scheduler)
    scheduler.set_timesteps(2)
    latents = initial_noise(base, generators_of([0]), SIZE)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(torch.full_like(latents, 3.0), timestep, latents).prev_sample
    assert torch.equal(got, latents)


def test_events_estimate_the_clean_latents(base: Base) -> None:
    events: list[Event] = []
    for name in ("ddim", "euler", "dpmpp_2m_karras"):
        events.clear()
        final = sample(base, [3], scheduler=name, steps=5, on_step=events.append)
        assert [event.step.index for event in events] == list(range(5))
        # At the last, almost noiseless step the estimate is the result.
        assert (events[-1].original - final).abs().max() < 0.15 * final.abs().max()
        assert events[-1].preview()[0].size == SIZE


def test_cancelled_between_steps(base: Base) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(CancelledError):
        sample(base, [0], cancelled=cancelled)
    assert len(asked) == 4


def test_nan_is_refused(base: Base, make_lora: Callable[..., Lora]) -> None:
    with (
        LoraBank.on(base, [Adapter("huge", make_lora(1, size=1e18))]) as bank,
        pytest.raises(NumericsError, match="step 1 of 4"),
    ):
        sample(base, [0], bank=bank)


def test_merge_sums_and_nothing_is_the_stock_model(base: Base, make_lora: Callable[..., Lora]) -> None:
    plain = sample(base, [0])
    with LoraBank.on(base, []) as bank:
        assert torch.equal(sample(base, [0], bank=bank, method=Merge()), plain)
    one, two = make_lora(1), make_lora(2)
    with LoraBank.on(base, [Adapter("one", one), Adapter("two", two)]) as bank:
        both = sample(base, [0], bank=bank, method=Merge())
    with LoraBank.on(base, [Adapter("two", two), Adapter("one", one)]) as bank:
        assert (sample(base, [0], bank=bank, method=Merge()) - both).abs().max() <= 1e-4
    assert (both - plain).abs().max() > 0.05
    assert torch.equal(sample(base, [0]), plain)


def test_scheduler_names_of_other_programs() -> None:
    assert sampler_name("DPM++ 2M Karras") == "dpmpp_2m_karras"
    assert sampler_name("DPM++ 2M SDE") == "dpmpp_2m_sde"
    assert sampler_name("Euler a") == sampler_name("euler_ancestral") == "euler_a"
    assert sampler_name("DPM++ SDE") == "dpmpp_sde"
    assert sampler_name("uni_pc") == sampler_name("UniPC") == "unipc"
    with pytest.raises(UnknownNameError, match="unknown scheduler 'eulr': did you mean 'euler'"):
        sampler_name("eulr")
