"""Attend-and-Excite: its loss, its schedule, and that it leaves the method it wraps alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compose import method_named
from compose.attend import Attend, AttendOptions, competing, neglect
from compose.bank import Adapter
from compose.run import Run, Step
from studio.errors import CancelledError, RequestError, UnknownNameError
from studio.lora.model import Lora

Sample = Callable[..., Tensor]
PROMPT = "a red cat on the green dog"


@pytest.fixture(scope="module")
def two(make_lora: Callable[..., Lora]) -> list[Adapter]:
    told = [{"trigger": trigger, "class_word": noun} for trigger, noun in (("red", "cat"), ("green", "dog"))]
    return [Adapter(f"lora {i}", make_lora(i, "attn1 attn2", size=0.2, **more)) for i, more in enumerate(told, 1)]


def test_words_compete_without_begin_and_end() -> None:
    maps = torch.rand(2, 12, 3, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    got = competing(maps, 6)
    assert not got[:, [0, 5, 6, 11]].any()
    expected = (100 * maps[:, [1, 2, 3, 4, 7, 8, 9, 10]]).softmax(1)
    torch.testing.assert_close(got[:, [1, 2, 3, 4, 7, 8, 9, 10]], expected)


def test_neglect_is_nothing_for_an_owner_and_one_for_the_unseen() -> None:
    maps = torch.zeros(1, 6, 6, 6)
    maps[0, 2, 1:4, 1:4] = 1.0  # owns all around (2, 2)
    sets = torch.zeros(2, 6)
    sets[0, 2] = sets[1, 3] = 1
    own, other = neglect(maps, sets, 6)[0].tolist()
    assert own == pytest.approx(0, abs=1e-5) and other == pytest.approx(0.75, abs=1e-5)
    together = neglect(maps, sets.sum(0, keepdim=True), 6)
    assert float(together) <= own + 1e-6


@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
def test_a_step_of_zero_is_the_wrapped_method(two: list[Adapter], sample: Sample, method: str) -> None:
    plain = sample(method_named(method), two, prompt=PROMPT)
    assert torch.equal(sample(Attend.of(method=method, step=0), two, prompt=PROMPT), plain)
    tiny = sample(Attend.of(method=method, step=1e-30), two, prompt=PROMPT)
    assert torch.equal(tiny, plain)
    assert (sample(Attend.of(method=method, step=5), two, prompt=PROMPT) - plain).abs().max() > 1e-3


def test_options_of_the_wrapped_method_come_through(two: list[Adapter], sample: Sample) -> None:
    wrapped = Attend.of(method="merge", inner='{"weight": 0.5}', step=0)
    expected = sample(method_named("merge", weight=0.5), two, prompt=PROMPT)
    assert torch.equal(sample(wrapped, two, prompt=PROMPT), expected)
    with pytest.raises(UnknownNameError, match="chunk"):
        Attend.of(method="merge", inner={"chunk": 1})
    with pytest.raises(RequestError, match="attend itself"):
        Attend.of(method="attend")
    with pytest.raises(RequestError, match="no JSON"):
        Attend.of(thresholds="half")


@pytest.mark.parametrize(("method", "expected"), [("merge", (1.0, 1.0)), ("switch", (1.0, 0.0)), ("composite", (1.0, 1.0))])
def test_maps_are_read_with_the_loras_that_act(
    two: list[Adapter], sample: Sample, monkeypatch: pytest.MonkeyPatch, method: str, expected: tuple[float, float]
) -> None:
    """Composite lets none act outside its own forwards: then all do."""
    seen: list[tuple[float, ...]] = []
    before = Attend.loss

    def look(self: Attend, run: Run) -> Any:
        assert run.bank is not None and isinstance(run.bank.route, Tensor)
        seen.append(tuple(run.bank.route.flatten().tolist()))
        return before(self, run)

    monkeypatch.setattr(Attend, "loss", look)
    sample(Attend.of(method=method, thresholds={}), two, prompt=PROMPT)
    assert seen[0] == expected and len(seen) == 3


def test_updates_follow_the_schedule(two: list[Adapter], sample: Sample) -> None:
    attend = Attend.of(step=0.5, thresholds={})
    sample(attend, two, prompt=PROMPT, steps=8)
    assert attend.updates == [1, 1, 1, 1, 0, 0, 0, 0]
    never = Attend.of(step=0.5, thresholds='{"0": 1, "0.25": 1}', refinements=3)
    sample(never, two, prompt=PROMPT, steps=8)
    assert never.updates == [4, 1, 4, 1, 0, 0, 0, 0]
    easy = Attend.of(step=0.5, thresholds={"0": 0})
    sample(easy, two, prompt=PROMPT, steps=8)
    assert easy.updates == [1, 1, 1, 1, 0, 0, 0, 0]
    assert AttendOptions().thresholds == {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}


def test_samplers_that_look_twice_are_guided_once_a_step(two: list[Adapter], sample: Sample) -> None:
    attend = Attend.of(step=0.5, until=1, thresholds={})
    assert sample(attend, two, prompt=PROMPT, steps=3, scheduler="heun").isfinite().all()
    assert attend.updates == [1, 0, 1, 0, 1]


def test_updates_raise_the_weakest_subject(two: list[Adapter], sample: Sample) -> None:
    attend = Attend.of(step=0.05, unit="noise", until=0.2, thresholds={"0": 1}, refinements=6)
    sample(attend, two, prompt=PROMPT, seeds=[0, 1])
    first, last = attend.losses[0], attend.losses[-1]
    assert (last < first).all() and first.shape == (2,)


def test_rows_do_not_change_each_other(two: list[Adapter], sample: Sample) -> None:
    """Also where one has enough and the other goes on."""
    attend = Attend.of(step=2, thresholds={"0": 0.08}, refinements=4)
    both = sample(attend, two, prompt=PROMPT, seeds=[0, 5])
    for row, seed in enumerate((0, 5)):
        alone = sample(Attend.of(step=2, thresholds={"0": 0.08}, refinements=4), two, prompt=PROMPT, seeds=[seed])
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_words_that_are_not_there_are_one_sentence(two: list[Adapter], sample: Sample, make_lora: Callable[..., Lora]) -> None:
    with pytest.raises(RequestError, match="'red cat' does not stand in the prompt"):
        sample(Attend(), two, prompt="a cat on the green dog")
    with pytest.raises(RequestError, match="name the words"):
        sample(Attend(), [Adapter("x", make_lora(5))], prompt=PROMPT)
    with pytest.raises(RequestError, match="as text"):
        sample(Attend(), two, prompt=PROMPT, wording=None)
    found = sample(Attend.of(words="cat,dog"), [Adapter("x", make_lora(5))], prompt=PROMPT)
    assert found.isfinite().all()


def test_cancelling_inside_a_guidance_pass(two: list[Adapter], sample: Sample) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 5

    attend = Attend.of(step=1, thresholds={"0": 1})
    with pytest.raises(CancelledError):
        sample(attend, two, prompt=PROMPT, cancelled=cancelled)
    assert attend.updates == [3]


def test_losses_are_explained(two: list[Adapter], sample: Sample) -> None:
    class Kept(Attend):
        def after_step(self, run: Run, step: Step) -> None:
            super().after_step(run, step)
            self.figures = self.explain(run)

    attend = Kept.of(thresholds={})
    sample(attend, two, prompt=PROMPT, seeds=[0, 1])
    *_, figure = attend.figures
    assert list(figure.lines) == ["picture 1", "picture 2"] and len(figure.lines["picture 1"]) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_chunks_of_the_wrapped_method_do_not_matter(two: list[Adapter], sample: Sample, guidance: float) -> None:
    """The route of its last chunk must be gone when maps are read."""
    whole, parts = (
        sample(Attend.of(method="composite", inner=inner, step=0.5), two, prompt=PROMPT, guidance=guidance)
        for inner in ({}, {"chunk": 1})
    )
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


def test_a_picture_around_found_masks_does_not_depend_on_the_others(two: list[Adapter], sample: Sample) -> None:
    """Each has masks of its own, and those of the last must be gone when maps are read."""
    alone = sample(Attend.of(method="masked", step=0.5), two, prompt=PROMPT, seeds=[0])
    both = sample(Attend.of(method="masked", step=0.5), two, prompt=PROMPT, seeds=[0, 1])
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)


def test_a_sampler_that_takes_updates_back_is_told(two: list[Adapter], sample: Sample) -> None:
    notes: list[str] = []
    sample(Attend.of(step=0.5), two, prompt=PROMPT, scheduler="unipc", notes=notes)
    assert notes == ["the sampler 'unipc' takes back most of what guidance moves: choose another, such as 'dpmpp_2m'"]


def test_pndm_is_guided_where_it_does_not_step_from_a_state_of_its_own(two: list[Adapter], sample: Sample) -> None:
    attend = Attend.of(step=0.5, thresholds={}, until=1.0)
    sample(attend, two, prompt=PROMPT, scheduler="pndm", steps=5)
    assert attend.updates[:3] == [1, 0, 1]


def test_no_threshold_is_lost_where_pndm_stays(two: list[Adapter], sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share 0.2 falls on its second timestep, where no step begins: the next one refines."""
    refined: list[int] = []
    before = Attend.descent

    def counted(self: Attend, run: Run, step: Step) -> tuple[Tensor, Tensor]:
        refined.append(step.index)
        return before(self, run, step)

    monkeypatch.setattr(Attend, "descent", counted)
    attend = Attend.of(step=1e-9, thresholds={0.2: 1.0}, refinements=2, until=1.0)
    sample(attend, two, prompt=PROMPT, scheduler="pndm", steps=4)
    assert refined == [0, 2, 2, 2, 3, 4]
