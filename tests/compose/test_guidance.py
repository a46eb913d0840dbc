"""Gradients of losses on maps: finite differences, early exit, what a graph holds, cancelling, values that are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.attention import Maps
from compose.bank import Adapter, LoraBank
from compose.guidance import (
    as_leaf,
    last_tap,
    latents_gradient,
    maps_of,
    noise_level,
    on_maps,
    pulled_back,
    reaches,
    scaled,
    tokens_of,
    updated,
    word_maps,
)
from compose.plan import AttentionPlan, Isolation, Regional, Regions, RegionText, Role, Tap, Where, columns
from compose.routes import Grid, constant, per_row
from compose.run import Method, Run, Step
from compose.text import encode
from studio.base import Base
from studio.errors import CancelledError, RequestError
from studio.lora.model import Lora

Sample = Callable[..., Tensor]
WORDS = columns(16, [2], [3])
ALL = Where(role=Role.CROSS)


@pytest.fixture(scope="module")
def two(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [
        Adapter("one", make_lora(1, "attn1 attn2 conv1 ff", size=0.2)),
        Adapter("two", make_lora(2, "attn2", size=0.2), 0.7),
    ]


def words(maps: Maps) -> Tensor:
    """A loss with other numbers in every row: first word here, second there."""
    return sum((m.pictures()[:, 0, :1].mean((1, 2)) - m.pictures()[:, 1, 1:].square().sum((1, 2)) for m in maps["words"]),
               start=torch.zeros(()))  # fmt: skip


@pytest.fixture
def run(base: Base, two: list[Adapter]) -> Iterator[Run]:
    """A run that stands before its third timestep, with two rows and LoRAs attached."""
    yield from made(base, two)


def made(base: Base, adapters: list[Adapter]) -> Iterator[Run]:
    from compose.schedulers import make_scheduler, set_steps

    scheduler = make_scheduler("euler", base.scheduler)
    set_steps(scheduler, 5, base.device)
    noise = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(0)).to(base.unet.dtype)
    text = encode(base, ["a red apple", "night"])
    with LoraBank.on(base, adapters) as bank:
        given = Run(
            base=base, positive=text, negative=text, size=(64, 32), guidance=4.0, generators=[], scheduler=scheduler,
            latents=noise * 3, noise=noise, first=lambda x: x, fresh=lambda: scheduler, bank=bank,
            timesteps=scheduler.timesteps,
        )  # fmt: skip
        with given.resources:
            yield given


def step_of(run: Run, index: int = 2) -> Step:
    return Step(index=index, count=len(run.timesteps), timestep=run.timesteps[index])


def test_gradient_agrees_with_finite_differences_in_double_precision(base: Base, two: list[Adapter]) -> None:
    """With LoRAs by row, isolation and regional text acting, and a sampler that scales its input."""
    twice = copy.copy(base)
    object.__setattr__(twice, "unet", copy.deepcopy(base.unet).double())
    regions = Regions(((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)))
    for run in made(twice, two):
        run.positive = replace(run.positive, states=run.positive.states.double())
        text = RegionText(run.positive.states.flip(0), constant([0.5, 1.0]))
        plan = AttentionPlan(
            taps=(Tap(name="words", where=ALL, sets=WORDS), Tap(name="own", where=ALL, sets=WORDS, region=1)),
            isolation=Isolation(regions=regions), regional=Regional(regions=regions, texts=(text, text)),
        )  # fmt: skip

        def loss(maps: Maps) -> Tensor:
            return words(maps) + 2 * words({"words": maps["own"]})

        run.bank.route = per_row(torch.tensor([[1.0, 0.0], [0.3, 1.0]]))  # type: ignore[union-attr]
        value, gradient = latents_gradient(run, step_of(run), run.latents, plan, loss, encoded=run.positive)
        assert gradient.dtype == torch.float64 and value.shape == (2,)
        assert gradient.abs().amax((1, 2, 3)).min() > 1e-6
        for seed in range(3):
            way = torch.randn(run.latents.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            h = 1e-5
            up, down = (
                loss(maps_of(run, step_of(run), run.latents + sign * h * way, plan, encoded=run.positive)) for sign in (1, -1)
            )
            measured, told = (up - down) / (2 * h), (gradient * way).sum((1, 2, 3))
            torch.testing.assert_close(told, measured, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("names", [("down_blocks.1.*", "up_blocks.1.*"), ("down_blocks.*",), ("mid_block.*",)])
def test_early_exit_gives_the_bits_of_a_whole_forward(run: Run, names: tuple[str, ...]) -> None:
    taps = (Tap(name="words", where=Where(role=Role.CROSS, names=names), sets=WORDS),)
    got, whole = (
        maps_of(run, step_of(run), run.latents, taps, encoded=run.positive, exit_after=after)["words"] for after in (None, "")
    )
    assert [m.layer for m in got] == [m.layer for m in whole] and len(got) >= 1
    assert all(torch.equal(a.values, b.values) for a, b in zip(got, whole, strict=True))
    early, late = (
        latents_gradient(run, step_of(run), run.latents, taps, words, encoded=run.positive, exit_after=after)
        for after in (None, "")
    )
    assert torch.equal(early[0], late[0]) and torch.equal(early[1], late[1])


def test_an_early_forward_runs_nothing_after_the_last_map(run: Run) -> None:
    ran: list[str] = []
    unet = run.base.unet
    parts = {"down_blocks.1": unet.down_blocks[1], "mid_block": unet.mid_block, "up_blocks.0": unet.up_blocks[0]}
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in parts.items()]
    try:
        taps = (Tap(name="words", where=Where(role=Role.CROSS, names=("down_blocks.*",)), sets=WORDS),)
        maps_of(run, step_of(run), run.latents, taps, encoded=run.positive)
        assert ran == []
        maps_of(run, step_of(run), run.latents, taps, encoded=run.positive, exit_after="mid_block")
        assert ran == ["down_blocks.1", "mid_block"]
    finally:
        for handle in handles:
            handle.remove()
    assert (run.passes.whole, run.passes.early, run.passes.backward) == (0, 4, 0)
    assert run.forward(run.latents, run.timesteps[0], run.positive).shape == run.latents.shape
    assert run.passes.whole == 2


def test_the_family_says_which_layers_are_read(base: Base, run: Run) -> None:
    """8 x 8 cells of a square picture; here half as high."""
    maps = maps_of(run, step_of(run), run.latents, [word_maps(run, "words", WORDS)], encoded=run.positive)["words"]
    assert {m.cells for m in maps} == {(4, 8)}
    assert maps[-1].layer.startswith("up_blocks.1.") and maps[-1].layer.endswith("attn2")
    with pytest.raises(RequestError, match="none of the layers"):
        maps_of(
            run,
            step_of(run),
            run.latents,
            [Tap(name="x", where=Where(role=Role.CROSS, names=("else.*",)))],
            encoded=run.positive,
        )


def test_layers_have_the_cells_that_their_names_say(base: Base, run: Run) -> None:
    grid = Grid(rows=2, height=8, width=16)
    maps = maps_of(run, step_of(run), run.latents, [Tap(name="w", where=ALL, sets=WORDS)], encoded=run.positive, exit_after="")[
        "w"
    ]
    for m in maps:
        assert tokens_of(m.layer, 3, grid) == m.cells[0] * m.cells[1]
    plan = AttentionPlan(taps=(Tap(name="w", where=Where(role=Role.CROSS, scale=4), sets=WORDS),))
    with run.planned(plan) as attention:
        assert last_tap(attention, plan, grid).startswith("mid_block.")


def test_a_graph_reaches_the_latents_and_no_weight(run: Run) -> None:
    with torch.enable_grad():
        leaf = as_leaf(run.latents)
        maps = maps_of(run, step_of(run), leaf, [word_maps(run, "words", WORDS)], encoded=run.positive)
        leaves, seen, front = [], set(), [m.values.grad_fn for m in maps["words"]]
        while front:
            node = front.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            front += [each for each, _ in node.next_functions]
    assert len(leaves) == 1 and leaves[0] is leaf
    assert all(weight.grad is None and not weight.requires_grad for weight in run.base.unet.parameters())


def test_passes_one_by_one_are_the_pass_together(run: Run) -> None:
    """The loss of two passes with other LoRAs each: its gradient from one graph is the sum of products made one at a time."""
    taps = [word_maps(run, "words", WORDS)]
    routes = [constant([1.0, 0.0]), constant([0.0, 1.0])]
    bank = run.bank
    assert bank is not None

    def joint(maps: Maps) -> Tensor:
        one, other = (torch.stack([m.values for m in maps[name]]) for name in ("0", "1"))
        return ((one * other).sum((0, 2, 3)) - one.square().sum((0, 2, 3))) / (other.square().sum((0, 2, 3)) + 0.1)

    def passes(leaf: Tensor) -> Maps:
        maps: Maps = {}
        for index, route in enumerate(routes):
            with bank.acting(route):
                maps[str(index)] = maps_of(run, step_of(run), leaf, taps, encoded=run.positive)["words"]
        return maps

    with torch.enable_grad():
        leaf = as_leaf(run.latents)
        maps = passes(leaf)
        (expected,) = torch.autograd.grad(joint(maps).sum(), leaf)
    value, cotangents = on_maps(joint, passes(run.latents))
    got = torch.zeros_like(leaf)
    for index, route in enumerate(routes):
        with torch.enable_grad(), bank.acting(route):
            leaf = as_leaf(run.latents)
            own = maps_of(run, step_of(run), leaf, taps, encoded=run.positive)["words"]
            name = str(index)
            got += pulled_back(run, leaf, {name: own}, {name: cotangents[name]})
    assert value.shape == (2,) and expected.abs().max() > 1e-4
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-5)


def test_what_is_not_finite_is_left_out_by_row_and_counted(run: Run) -> None:
    def broken(maps: Maps) -> Tensor:
        return words(maps) * torch.tensor([1.0, float("nan")])

    taps = [word_maps(run, "words", WORDS)]
    _, whole = latents_gradient(run, step_of(run), run.latents, taps, words, encoded=run.positive)
    for _ in range(2):
        _, gradient = latents_gradient(run, step_of(run), run.latents, taps, broken, encoded=run.positive)
        assert torch.equal(gradient[0], whole[0]) and not gradient[1].any()
    (note,) = run.notes
    assert "left out 2 gradients" in note
    _, flat = latents_gradient(run, step_of(run), run.latents, taps, lambda maps: torch.zeros(2), encoded=run.positive)
    assert not flat.any()


def test_half_precision_keeps_small_gradients(base: Base, two: list[Adapter]) -> None:
    """Weighted so low that most would be lost on their way through sixteen bits."""
    half = copy.copy(base)
    object.__setattr__(half, "unet", copy.deepcopy(base.unet).to(torch.float16))
    found = []
    for each in (base, half):
        for run in made(each, two):
            run.latents, run.positive = (
                run.latents.float(),
                replace(run.positive, states=run.positive.states.to(each.unet.dtype)),
            )
            taps = [word_maps(run, "words", WORDS)]
            _, gradient = latents_gradient(
                run, step_of(run), run.latents, taps, lambda maps: words(maps) * 1e-8, encoded=run.positive
            )
            found.append(gradient)
    exact, rough = found
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.02 * exact.norm()


def test_cancelling_and_plans_around_a_pass(run: Run) -> None:
    taps = [word_maps(run, "words", WORDS)]
    standing = AttentionPlan(isolation=Isolation(regions=Regions(((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)))))
    attention = run.attend(standing)
    latents_gradient(run, step_of(run), run.latents, taps, words, encoded=run.positive)
    assert attention.plan is standing
    run.cancelled = lambda: True
    with pytest.raises(CancelledError):
        latents_gradient(run, step_of(run), run.latents, taps, words, encoded=run.positive)
    assert attention.plan is standing


def test_a_step_may_be_measured_in_noise(run: Run) -> None:
    """The latents of this sampler hold noise of its sigma; a gradient of nothing stays nothing."""
    step = step_of(run)
    level = noise_level(run, step)
    assert level == pytest.approx(float(run.scheduler.sigmas[2]), rel=1e-3) and level > 1
    gradient = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-7, 3.0]).view(2, 1, 1, 1)
    got = scaled(run, step, gradient, "noise")
    torch.testing.assert_close(got.square().mean((1, 2, 3)).sqrt(), torch.full((2,), level))
    shapes = [each / each.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for each in (got, gradient)]
    torch.testing.assert_close(*shapes)
    assert scaled(run, step, gradient, "gradient") is gradient
    assert not scaled(run, step, torch.zeros_like(gradient), "noise").any()


@pytest.mark.parametrize("count", [7, 10, 20, 50])
def test_a_share_of_the_schedule_is_reached_once(count: int) -> None:
    for share in (0.0, 0.2, 0.3, 0.4, 0.95):
        steps = [Step(index=index, count=count, timestep=torch.tensor(0)) for index in range(count)]
        (only,) = (
            [step.index for step in steps if reaches(step, share, step.index - 1)] if share * count <= count - 1 else (-1,)
        )
        assert only in (-1, math.ceil(share * count - 1e-9))
    for share in (0.0, 0.2, 0.3, 0.4, 0.8):  # a sampler that visits each level twice, after the first: states are at even steps
        states = [Step(index=index, count=2 * count, timestep=torch.tensor(0)) for index in range(0, 2 * count, 2)]
        assert sum(reaches(step, share, step.index - 2) for step in states) == 1
    late = [Step(index=index, count=count, skipped=count, timestep=torch.tensor(0)) for index in range(count)]
    assert not any(reaches(step, 0.2, count + step.index - 1) for step in late)
    assert reaches(late[0], 0.5, count - 1)


def test_guidance_of_size_zero_changes_no_bit_and_a_small_one_lowers_the_loss(sample: Sample, two: list[Adapter]) -> None:
    class Guided(Method):
        size = 0.0
        losses: list[tuple[Any, Any]]

        def before_step(self, run: Run, step: Step) -> None:
            taps = [word_maps(run, "words", WORDS)]
            value, gradient = latents_gradient(run, step, run.latents, taps, words, encoded=run.positive)
            run.latents = updated(run.latents, gradient, self.size)
            after = words(maps_of(run, step, run.latents, taps, encoded=run.positive))
            self.losses = [*getattr(self, "losses", []), (value, after)]

    plain = sample(None, two)
    guided = Guided()
    assert torch.equal(sample(guided, two), plain)
    guided.size, guided.losses = 1.0, []
    assert (sample(guided, two) - plain).abs().max() > 1e-3
    assert all((after < before).all() for before, after in guided.losses) and len(guided.losses) == 5
