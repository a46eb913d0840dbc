"""Ctrl-C: between two steps everything is kept, and no checkpoint is ever of half a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.errors import CancelledError
from tests.training.conftest import Configure
from training import train_concept
from training.interrupt import interruptible
from training.many import train_many
from training.objective import Objective
from training.progress import Progress
from training.state import find, step_of


def quiet(progress: Progress) -> None:
    pass


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C as in a terminal: a job of a shell's background is started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def wanted(configure: Configure, tmp_path: Path) -> bytes:
    """The file of a run of six steps that nobody touched."""
    return train_concept(configure(steps=6, output=tmp_path / "whole" / "zqx.safetensors"), quiet).path.read_bytes()


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """``act`` in the middle of step number ``step``, from 1."""
    forward, calls = Objective.forward, []

    def disturbed(self: Objective, *args: Any, **kwargs: Any) -> Any:
        calls.append(step)
        if len(calls) == step:
            act()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "forward", disturbed)


def kept(folder: Path) -> int | None:
    found = find(folder)
    return None if found is None else step_of(found)


def test_ctrl_c_inside_a_step_ends_after_it_and_loses_nothing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, wanted: bytes
) -> None:
    config, before = configure(steps=6), signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(CancelledError, match="stopped at step 3 of 6: run it again to go on from step 3"):
        train_concept(config, quiet)
    monkeypatch.undo()
    assert kept(config.work) == 3
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train_concept(config, quiet)
    assert "resumed at step 3" in resumed.notes
    assert resumed.path.read_bytes() == wanted


def test_a_second_ctrl_c_ends_at_once_from_the_last_checkpoint(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, wanted: bytes
) -> None:
    config = configure(steps=6, checkpoint_every=2)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 4, twice)
    with pytest.raises(CancelledError, match="stopped at step 3 of 6: run it again to go on from step 2"):
        train_concept(config, quiet)
    monkeypatch.undo()
    assert kept(config.work) == 2
    assert train_concept(config, quiet).path.read_bytes() == wanted


def test_ctrl_c_in_the_last_step_ends_the_run_well_and_begins_no_other(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: bytes
) -> None:
    configs = {name: configure(steps=6, output=tmp_path / name / "zqx.safetensors") for name in ("one", "other")}
    at_step(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGINT))
    one, other = train_many(configs, quiet)
    assert (one.state, one.stopped, other.state) == ("done", True, "not started")
    assert configs["one"].output.read_bytes() == wanted and not configs["other"].output.exists()


@pytest.mark.parametrize("every", [2, 0])
def test_an_interrupt_inside_the_optimiser_writes_no_checkpoint(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, wanted: bytes, every: int
) -> None:
    config = configure(steps=6, checkpoint_every=every)
    step, calls = torch.optim.AdamW.step, []

    def torn(self: torch.optim.AdamW, *args: Any) -> None:
        step(self, *args)  # the weights are those of the next step
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    said = "run it again to go on from step 2" if every else "nothing was kept"
    with pytest.raises(CancelledError, match=f"stopped at step 3 of 6: {said}"):
        train_concept(config, quiet)
    monkeypatch.undo()
    assert kept(config.work) == (2 if every else None)
    assert train_concept(config, quiet).path.read_bytes() == wanted


def test_ctrl_c_in_the_last_step_ends_with_the_file(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT))
    assert train_concept(configure(), quiet).path.exists()


def test_the_handler_is_taken_only_where_it_can_be_and_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        with interruptible() as stop:
            for heard in (False, True):
                assert stop.asked is heard
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is before
    seen: list[object] = []

    def elsewhere() -> None:
        with interruptible() as stop:
            seen.extend([stop.asked, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False, before]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background
    try:
        with interruptible() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)
