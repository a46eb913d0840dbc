"""Losses and previews for TensorBoard, previews as files, and that none of it can end a run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.lora.model import Lora
from tests.training.conftest import Configure
from training import train_concept
from training.journal import Journal
from training.progress import Progress


def quiet(progress: Progress) -> None:
    pass


def picture(step: int, lora: Lora) -> list[Image.Image]:
    return [Image.new("RGB", (8, 6), (step, 0, 0))]


needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


@needs_tensorboard
def test_events_that_tensorboard_reads(configure: Configure) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure(tensorboard=True, preview_every=2, prior="consistency", schedule="constant")
    result = train_concept(config, quiet, picture)
    events = EventAccumulator(str(config.work / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "prior", "rate"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (index + 1, pytest.approx(loss)) for index, loss in enumerate(result.losses)
    ]
    assert events.Scalars("rate")[0].value == pytest.approx(config.learning_rate)
    assert [(event.step, event.width, event.height) for event in events.Images("preview/0")] == [(2, 8, 6), (4, 8, 6)]
    assert not list(config.work.glob("checkpoint-*"))


def test_previews_are_kept_as_files(configure: Configure) -> None:
    config = configure(preview_every=2)
    train_concept(config, quiet, picture)
    folder = config.output.with_suffix(".previews")
    assert sorted(file.name for file in folder.iterdir()) == ["000002-0.png", "000004-0.png"]
    with Image.open(folder / "000004-0.png") as image:
        assert image.getpixel((0, 0)) == (4, 0, 0)


def test_without_the_package_the_run_says_so_and_goes_on(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.journal.find_spec", lambda name: None)
    result = train_concept(configure(tensorboard=True, steps=1), quiet)
    assert any("pip install tensorboard" in note for note in result.notes)
    assert result.path.exists()


def test_a_log_that_cannot_be_written_is_noted_once(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        add_image = add_scalar

    notes: list[str] = []
    journal = Journal(tmp_path / "previews", Full(), notes.append)
    journal.scalars(1, {"loss": 1.0, "rate": 0.1})
    journal.scalars(2, {"loss": 1.0})
    journal.pictures(2, [Image.new("RGB", (4, 4))])
    assert len(notes) == 1 and "No space left" in notes[0]
    assert (tmp_path / "previews" / "000002-0.png").exists()


@needs_tensorboard
@pytest.mark.parametrize("broken", ["__init__", "close"])
def test_a_log_that_cannot_be_opened_or_closed_costs_nothing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{broken}", full)
    result = train_concept(configure(tensorboard=True, steps=2), quiet)
    assert result.path.exists()
    assert sum("TensorBoard's log cannot be written" in note for note in result.notes) == 1


def test_a_log_that_broke_before_is_not_noted_again_at_the_end(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *args: Any) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    notes: list[str] = []
    journal = Journal(tmp_path, Full(), notes.append)
    journal.scalars(1, {"loss": 1.0})
    journal.close()
    assert len(notes) == 1


@needs_tensorboard
def test_every_rate_is_logged(configure: Configure) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure(
        tensorboard=True, train_text="embedding+lora", block_rates={"up_blocks": 0.5}, schedule="constant", steps=1
    )
    train_concept(config, quiet)
    events = EventAccumulator(str(config.work / "tensorboard"))
    events.Reload()
    rates = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if tag.startswith("rate")}
    assert rates.keys() == {"rate", "rate/unet", "rate/unet-0.5-text", "rate/words"}  # half of the rate is the text's default
    assert rates["rate/unet"] == pytest.approx(config.learning_rate)
    assert rates["rate/unet-0.5-text"] == pytest.approx(config.learning_rate / 2)
