"""Several LoRAs in one run: what is trained, skipped, resumed, and what a failure leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from studio.base import _LOADED
from studio.errors import CancelledError, FileError, RequestError
from studio.lora.files import read_header
from tests.training.conftest import draw
from training.config import ConceptConfig
from training.many import Outcome, configs_of, summary, train_many
from training.progress import Progress

Shared = dict[str, Any]


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """``many/`` with three subfolders of pictures, ``abc`` with options of its own."""
    many = tmp_path / "many"
    for name in ("abc", "qrs", "xyz"):
        shutil.copytree(pictures, many / name)
    (many / "abc" / "train.yaml").write_text("trigger: kvk\nsteps: 3\n")
    (many / ".hidden").mkdir()
    return many


@pytest.fixture
def shared(tiny_base: Path) -> Shared:
    return {
        "base": str(tiny_base),
        "class_word": "apple",
        "rank": 2,
        "steps": 2,
        "batch": 2,
        "device": "cpu",
        "targets": "attn",
    }


def quiet(progress: Progress) -> None:
    pass


def test_one_lora_for_each_subfolder_with_options_of_its_own(folder: Path, shared: Shared, tmp_path: Path) -> None:
    known = len(_LOADED)
    heard: list[Outcome] = []
    outcomes = train_many(configs_of(folder, tmp_path / "loras", **shared), quiet, told=heard.append)
    assert outcomes == heard
    assert [(o.name, o.state, o.steps) for o in outcomes] == [("abc", "done", 3), ("qrs", "done", 2), ("xyz", "done", 2)]
    assert len(_LOADED) <= known + 1
    triggers = {path.stem: read_header(path).metadata["studio.trigger"] for path in (tmp_path / "loras").glob("*.safetensors")}
    assert triggers == {"abc": "kvk", "qrs": "qrs", "xyz": "xyz"}
    assert summary(outcomes) == "3 done"


def test_one_failure_stops_nothing_else_and_finished_ones_are_skipped(
    folder: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (folder / "qrs").glob("*.png"):
        path.unlink()
    for path in (folder / "qrs").glob("*.txt"):
        path.unlink()
    (folder / "abc" / "train.yaml").write_text("stepz: 3\n")
    first = train_many(configs_of(folder, **shared), quiet)
    assert [o.state for o in first] == ["failed", "failed", "done"]
    assert "did you mean 'steps'" in first[0].error
    assert "no pictures in" in first[1].error
    draw(folder / "qrs" / "0.png"), draw(folder / "qrs" / "1.png", 1)
    (folder / "abc" / "train.yaml").unlink()
    before = (folder / "xyz.safetensors").stat().st_mtime_ns
    second = train_many(configs_of(folder, **shared), quiet)
    assert [o.state for o in second] == ["done", "done", "skipped"]
    assert (folder / "xyz.safetensors").stat().st_mtime_ns == before
    changed = train_many(configs_of(folder, **{**shared, "rank": 1}), quiet)
    assert {o.state for o in changed} == {"failed"}
    assert "rank: 2 -> 1" in changed[0].error and "restart" in changed[0].error


@pytest.mark.parametrize("told", ["", "{", "[]"])
def test_a_file_that_says_nothing_of_its_training_is_left_alone(folder: Path, shared: Shared, told: str) -> None:
    shutil.rmtree(folder / "abc"), shutil.rmtree(folder / "qrs")
    layer = "unet.mid_block.attentions.0.proj_in"
    parts = {f"{layer}.lora_A.weight": torch.zeros(1, 4), f"{layer}.lora_B.weight": torch.zeros(4, 1)}
    save_file(parts, folder / "xyz.safetensors", {"studio.config": told})
    before = (folder / "xyz.safetensors").read_bytes()
    (outcome,) = train_many(configs_of(folder, **shared), quiet)
    assert outcome.state == "failed" and "does not say how it was trained" in outcome.error
    assert (folder / "xyz.safetensors").read_bytes() == before


def test_an_unforeseen_failure_is_noted_too(folder: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: ConceptConfig, *rest: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("training.concept.train_concept", broken)
    outcomes = train_many(configs_of(folder, **shared), quiet)
    assert [o.error for o in outcomes] == ["ZeroDivisionError: oops"] * 3


def test_a_cancelled_run_goes_on_where_it_was(folder: Path, shared: Shared) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 2 and progress.steps == 3:
            raise CancelledError("enough")

    outcomes = train_many(configs_of(folder, **shared), stop)
    assert [o.state for o in outcomes] == ["cancelled", "not started", "not started"]
    again = train_many(configs_of(folder, **shared), quiet)
    assert [o.state for o in again] == ["done"] * 3
    assert "resumed at step 2" in again[0].notes


def test_what_cannot_be_shared_and_no_subfolders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'output' cannot be the same for several"):
        configs_of(folder, output=Path("a.safetensors"))
    with pytest.raises(FileError, match="does not exist"):
        configs_of(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="has no subfolders"):
        configs_of(tmp_path / "empty")
    (folder / "abc" / "train.yaml").write_text("data: elsewhere\n")
    assert "follows from its folder" in str(configs_of(folder)["abc"])
