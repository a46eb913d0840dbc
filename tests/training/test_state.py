"""Checkpoints appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from studio.errors import FileError, RequestError
from training import state
from training.state import Checkpoint, find, load, random_state_kept, save, step_of

OPTIMIZER = {"state": {0: {"step": 1}}, "param_groups": []}
STATE = Checkpoint(3, {"a": torch.arange(4.0)}, OPTIMIZER, (1.0, 0.5, 0.1), 2.5, {"rank": 4})


def test_round_trip_and_older_ones_go(tmp_path: Path) -> None:
    save(tmp_path, replace(STATE, step=2))
    path = save(tmp_path, STATE)
    assert find(tmp_path) == path
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000003"]
    found = load(path, {"rank": 4})
    assert torch.equal(found.weights["a"], STATE.weights["a"])
    assert (found.step, found.losses, found.seconds, found.optimizer) == (3, STATE.losses, 2.5, STATE.optimizer)


def test_another_configuration_is_refused_with_a_diff(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    with pytest.raises(RequestError, match=r"rank: 4 -> 8.*set restart to true"):
        load(path, {"rank": 8})


@pytest.mark.parametrize("writer", ["torch.save", "safetensors"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    path = save(tmp_path, STATE)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save") if writer == "torch.save" else (state, "save_file")), full)
    with pytest.raises(FileError, match="No space left on device"):
        save(tmp_path, replace(STATE, step=4))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load(path, {"rank": 4}).step == 3


@pytest.mark.parametrize("writer", ["torch.save", "safetensors"])
def test_a_disk_that_fills_half_way_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    path = save(tmp_path, STATE)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def half(data: object, target: Path) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save") if writer == "torch.save" else (state, "save_file")), half)
    for step in (3, 4):  # the same step again must not touch the good one either
        with pytest.raises(FileError, match="No space left on device"):
            save(tmp_path, replace(STATE, step=step))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_cut_off_write_is_ignored(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    shutil.copytree(path, tmp_path / "checkpoint-000009")
    (tmp_path / "checkpoint-000009" / "facts.json").unlink()
    (tmp_path / ".checkpoint-000010.part").mkdir()
    assert find(tmp_path) == path
    assert find(tmp_path / "absent") is None


def test_a_kill_while_one_takes_the_place_of_its_equal_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, STATE)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, replace(STATE, seconds=9.0))
    monkeypatch.undo()
    left = find(tmp_path)
    assert left is not None
    assert (step_of(left), load(left, {"rank": 4}).seconds) == (3, 2.5)
    path = save(tmp_path, replace(STATE, seconds=9.0))
    assert load(path, {"rank": 4}).seconds == 9.0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000003"]


def test_the_newest_wins_and_the_whole_one_over_its_predecessor(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    shutil.copytree(path, tmp_path / "checkpoint-000003.old")
    assert find(tmp_path) == path
    shutil.copytree(path, tmp_path / "checkpoint-999999")
    shutil.copytree(path, tmp_path / "checkpoint-1000000")
    newest = find(tmp_path)
    assert newest is not None and step_of(newest) == 1_000_000


def test_flushing_asks_only_for_what_every_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows flushes no handle that was opened for reading, and opens no folder."""
    sync, modes = os.fsync, []

    def written(handle: int) -> None:
        modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        sync(handle)

    def refused(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(state.os, "fsync", written)
    monkeypatch.setattr(state.os, "open", refused)
    assert save(tmp_path, STATE).is_dir()
    assert modes == [os.O_RDWR] * 3


def test_the_scaler_of_half_precision_is_kept_and_older_ones_have_none(tmp_path: Path) -> None:
    told = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}
    assert load(save(tmp_path, STATE), {"rank": 4}).scaler == {}
    assert load(save(tmp_path, replace(STATE, scaler=told)), {"rank": 4}).scaler == told


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    (path / "weights.safetensors").write_bytes(b"oops")
    with pytest.raises(FileError, match="set restart to true"):
        load(path, {"rank": 4})


def test_random_numbers_go_on_as_if_nothing_had_run() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    wanted = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    with random_state_kept():
        draw()
    assert draw() == wanted
