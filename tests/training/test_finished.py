"""A finished LoRA is never overwritten unasked, and trained twice only when it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from studio.errors import CancelledError, RequestError
from studio.lora.files import read_header
from tests.training.conftest import Configure
from training import ConceptConfig, accelerators, describe, train_concept
from training.many import train_many
from training.progress import Progress
from ui import cli, console


def quiet(progress: Progress) -> None:
    pass


def never(progress: Progress) -> None:
    raise AssertionError("a step was made")


def test_the_same_run_again_does_nothing_and_says_so(configure: Configure) -> None:
    config = configure()
    first = train_concept(config, quiet)
    before = first.path.stat().st_mtime_ns
    again = train_concept(config, never)
    assert (again.path, again.steps, again.losses, again.seconds) == (first.path, 4, (), 0.0)
    assert again.notes == (
        f"'{config.output}' is finished, so there is nothing to train: set restart to true to train it again",
    )
    assert again.notes[0] in describe(config).notes
    assert first.path.stat().st_mtime_ns == before
    assert not config.work.exists()
    assert len(train_concept(configure(restart=True), quiet).losses) == 4


def test_other_values_do_not_overwrite_it(configure: Configure) -> None:
    config = configure()
    train_concept(config, quiet)
    before = config.output.read_bytes()
    for run in (lambda changed: train_concept(changed, never), describe):
        with pytest.raises(RequestError, match=r"was trained with other values \(rank: 2 -> 1\): move it away, or set restart"):
            run(configure(rank=1))
    config.output.write_bytes(b"somebody's notes")
    with pytest.raises(RequestError, match="is there already and does not say how it was trained"):
        train_concept(config, never)
    assert config.output.read_bytes() == b"somebody's notes"
    config.output.write_bytes(before)
    assert len(train_concept(configure(rank=1, restart=True), quiet).losses) == 4


def test_a_restart_that_was_stopped_goes_on_without_a_second_restart(configure: Configure) -> None:
    train_concept(configure(), quiet)

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        train_concept(configure(rank=1, restart=True), stop)
    resumed = train_concept(configure(rank=1), quiet)
    assert "resumed at step 2" in resumed.notes
    assert read_header(resumed.path).rank == 1


def test_options_that_were_not_there_before_do_not_make_it_another_run(configure: Configure) -> None:
    told = read_header(train_concept(configure(steps=1), quiet).path).metadata["studio.config"]
    assert not any(f'"{name}"' in told for name in ("start_from", "clip_skip", "optimizer_args", "layout"))
    changed = configure(steps=1, optimizer_args={"eps": 1e-6}, clip_skip=2)
    with pytest.raises(RequestError, match=r"clip_skip: \(absent\) -> 2; optimizer_args: \(absent\) -> {'eps': 1e-06}"):
        train_concept(changed, never)


def test_with_epochs_the_processes_are_counted(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes need half of the steps; what they have finished is known again."""
    real = accelerators.accelerator_for

    @contextmanager
    def of_two(config: ConceptConfig) -> Iterator[Any]:
        with real(config) as accelerator:
            monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 2))
            yield accelerator

    monkeypatch.setattr("training.concept.accelerator_for", of_two)
    config = configure(epochs=4, batch=2)
    states = [train_many({"zqx": config}, quiet)[0] for _ in range(2)]
    assert [(outcome.state, outcome.error) for outcome in states] == [("done", ""), ("skipped", "")]
    assert states[0].steps == 5
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert describe(config).steps == 5


def arguments(config: ConceptConfig, *more: str) -> tuple[str, ...]:
    said = {key: getattr(config, key) for key in ("base", "targets", "rank", "steps", "batch", "trigger", "class_word")}
    options = [part for key, value in said.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return ("train", "concept", *options, "--set", "device=cpu", "--set", "warmup=0", *more)


def test_notes_are_said_once_before_training(
    configure: Configure, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(pictures.iterdir())[4:]:
        path.unlink()
    config, heard = configure(), []

    def loop(run: Any, show: Any) -> None:
        heard.append(capsys.readouterr().err)
        run.step = run.plan.steps

    monkeypatch.setattr("training.concept._Run._loop", loop)
    level = logging.getLogger("training.concept").level
    assert console.run(cli.app, arguments(config, str(pictures), "--out", str(config.output), "--restart")) == 0
    assert heard[0].count("note: only 2 pictures") == 1
    assert "only 2 pictures" not in capsys.readouterr().err
    assert (logging.getLogger("training.concept").handlers, logging.getLogger("training.concept").level) == ([], level)
    heard.clear()
    (pictures.parent / "many").mkdir()
    pictures.rename(pictures.parent / "many" / "abc")
    assert console.run(cli.app, arguments(config, "--many", str(pictures.parent / "many"))) == 0
    assert heard[0].count("abc: only 2 pictures") == 1
    assert "only 2 pictures" not in capsys.readouterr().err


def test_the_command_ends_well_where_there_is_nothing_to_do(
    configure: Configure, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure()
    command = arguments(config, str(pictures), "--out", str(config.output), "--layout", "kohya")
    assert console.run(cli.app, command) == 0
    assert "4 steps in" in capsys.readouterr().err
    assert read_header(config.output).metadata["modelspec.implementation"].endswith("sd-scripts")
    assert console.run(cli.app, command) == 0
    told = capsys.readouterr()
    assert told.out == f"{config.output}\n"
    assert (
        told.err
        == f"note: '{config.output}' is finished, so there is nothing to train: set restart to true to train it again\n"
    )
    assert console.run(cli.app, [*command[:-1], "diffusers"]) == 0
    assert "'studio lora convert' brings it into the layout diffusers" in " ".join(capsys.readouterr().err.split())
