"""The speed bench on a tiny base: what it compares computes the same, and its numbers mean what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from studio.base import load_base
from studio.errors import UnknownNameError
from tests.bench.speed import (
    Course,
    Line,
    Ratio,
    composite_peak,
    lines_of,
    memory_lines,
    peak_bytes,
    ratio,
    section,
    shallow_share,
    take_turns,
    verdict,
)
from tests.bench.speed_models import Shape, Stage, agree, shape_named, touched


@pytest.fixture(scope="module")
def stage(tiny_base: Path) -> Stage:
    return Stage(Shape(load_base(tiny_base), 2), count=3, steps=2)


def test_peft_in_each_way_computes_what_composite_does(stage: Stage) -> None:
    composite, _ = stage.composed("composite")
    mine = composite()
    peft = stage.peft()
    for choose in (peft.set_active, peft.set_adapters):
        agree(mine, peft.composite(choose), ("composite", choose.__name__))
    peft.keep_all_active()
    agree(mine, peft.composite(peft.set_scale), ("composite", "set_scale"))
    peft.set_active("lora0")
    with pytest.raises(ArithmeticError, match="nothing was timed"):
        agree(mine, peft.composite(lambda name: None), ("composite", "one LoRA throughout"))


def test_the_merged_model_computes_the_sum_and_leaves_the_base_alone(stage: Stage) -> None:
    before = {path: module.weight.clone() for path, module in touched(stage.shape.base.unet).items()}
    summed, _ = stage.composed("merge")
    agree(summed(), stage.merged()(), ("sum", "merged"))
    assert all(torch.equal(before[path], module.weight) for path, module in touched(stage.shape.base.unet).items())


def test_copies_share_the_weights(stage: Stage) -> None:
    base, copied = stage.shape.base.unet, stage.peft().unet
    assert copied.conv_in.weight is base.conv_in.weight
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_the_share_of_a_shallow_forward(stage: Stage) -> None:
    assert 0.05 < shallow_share(stage) < 0.95


def test_turns_are_taken_in_turn() -> None:
    log: list[str] = []
    ticks = iter(range(100))
    seconds = take_turns({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, 3, lambda: float(next(ticks)))
    assert log == ["a", "b"] * 3
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_ratios_are_formed_within_a_turn() -> None:
    slow_minute = {"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 2.0]}
    assert ratio(slow_minute, "a", "b") == Ratio(2.0, 1.0, 2.0)
    assert ratio(slow_minute, "a", "b", factor=2.0).middle == 1.0


def test_bars() -> None:
    times = {"composite": 1.0, "set_scale": 1.2, "set_active": 1.1, "set_adapters": 2.0, "cmlora": 0.5, "alone": 0.5}
    seconds = {name: [value] for name, value in {**times, "sum": 1.5, "merged": 1.0}.items()}
    course = Course(((4, 0), (0, 4)), 4, 0.1)  # 0.55 s, since composite's steps take 0.5
    missed = [line.what.split(",")[0] for line in lines_of("sd15", seconds, course) if not line.holds]
    assert missed == ["sequential passes", "routed sum of 4 / truly merged model"]
    slower = {**seconds, "cmlora": [0.7]}
    assert [line.what for line in lines_of("embedded", slower, course) if not line.holds][1].startswith("cmlora")
    assert verdict(Line("x", "1", "<= 2", holds=False)) == "**missed**"
    assert verdict(Line("x", "1")) == ""


def test_what_a_course_should_take(stage: Stage) -> None:
    course = Course(((3, 0), (1, 2), (0, 3)), 3, 0.5)
    # Steps of one LoRA take 1 s and those of three 2 s, so two side by side take 1.5.
    assert course.seconds(3.0, 6.0) == pytest.approx(2 + (1 + 0.5 * 1.5) + 0.5 * 2)
    assert course.told == "4 whole and 5 shallow passes (0.500 of a whole one each)"
    run, method = stage.composed("cmlora", high=stage.names)
    run()
    found = Course.of(method, stage.count, 0.5)
    assert found.forwards[0] == (3, 0)
    assert sum(whole for whole, _ in found.forwards) == method.whole  # type: ignore[attr-defined]
    assert sum(shallow for _, shallow in found.forwards) == method.shallow  # type: ignore[attr-defined]


def test_peak_memory_sees_what_lives_at_once() -> None:
    def two_then_one() -> None:
        one, two = torch.zeros(1 << 20), torch.zeros(1 << 20)
        del one, two
        torch.zeros(1 << 20)

    assert peak_bytes(two_then_one) == pytest.approx(2 * 4 * 2**20, rel=0.01)


def test_composite_needs_no_more_memory_for_more_loras_one_at_a_time(stage: Stage) -> None:
    few, many = (composite_peak(Stage(stage.shape, count, 2)) for count in (2, 5))
    assert many <= 1.05 * few


def test_memory_that_grows_is_missed() -> None:
    assert not memory_lines("embedded", 16, lambda shape, count, side: count * 1000)[0].holds
    assert memory_lines("embedded", 16, lambda shape, count, side: 1000)[0].holds


def test_the_section_names_machine_and_setting() -> None:
    text = section({"sd15": [Line("x / y", "1.50 [1.40, 1.60]", ">= 1.3")]}, 5, {"sd15": 4}, 16)
    assert "| x / y | 1.50 [1.40, 1.60] | >= 1.3 | holds |" in text
    assert "torch" in text
    assert "16 x 16 latents" in text
    assert "feed-forward, 4 steps" in text


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="sd51"):
        shape_named("sd51")
