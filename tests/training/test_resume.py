"""Killed, launched on two processes, repeated: the same LoRA comes out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from studio.errors import CancelledError
from studio.lora.files import load_lora
from tests.training.conftest import Configure
from training import ConceptConfig, accelerators, train_concept
from training.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pipelines import previewer
from training import load_config, train_concept
def say(progress):
    print(progress.step, flush=True)
config = load_config(sys.argv[1])
train_concept(config, say, previewer(config) if config.preview_every else None)
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(SCRIPT)
    return tmp_path / "job.py"


def command(job: Path, config: ConceptConfig, *launcher: str) -> list[str]:
    """A process that trains ``config``; its output lies in a folder of the same name each time."""
    path = job.parent / f"{config.output.parent.name}.yaml"
    values = config.model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(values))
    return [sys.executable, *launcher, str(job), str(path)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


def test_killed_runs_end_with_the_same_bits(job: Path, configure: Configure, tmp_path: Path) -> None:
    """Killed with SIGKILL twice, at unforeseen moments, then finished: file and previews are those of an untouched run."""
    changes = {
        "steps": 24,
        "prior": "consistency",
        "train_text": "embedding+lora",
        "checkpoint_every": 3,
        "preview_every": 5,
        "preview_steps": 1,
    }
    whole = configure(output=tmp_path / "whole" / "zqx.safetensors", **changes)
    run(command(job, whole))
    killed = configure(output=tmp_path / "killed" / "zqx.safetensors", **changes)
    for after in (4, 13):
        process = subprocess.Popen(command(job, killed), env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout
        for line in process.stdout:
            if int(line) >= after:
                time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert not killed.output.exists()
        assert list(killed.work.glob("checkpoint-*"))
    run(command(job, killed))
    assert killed.output.read_bytes() == whole.output.read_bytes()
    previews = [sorted(c.output.with_suffix(".previews").glob("*.png")) for c in (whole, killed)]
    assert [path.name for path in previews[0]] == [path.name for path in previews[1]]
    assert len(previews[0]) == 5
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*previews, strict=True))


def test_half_precision_goes_on_with_its_scale(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler of a card, here on the CPU: it doubles after every second step, and would start again at 4."""
    real, scales = accelerators.accelerator_for, []

    @contextmanager
    def scaled(config: ConceptConfig) -> Iterator[Any]:
        with real(config) as accelerator:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
            yield accelerator
            scales.append(accelerator.scaler.state_dict())

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise CancelledError("enough")

    monkeypatch.setattr("training.concept.accelerator_for", scaled)
    config = configure(steps=6, clip=0)
    train_concept(config, lambda progress: None)
    wanted = config.output.read_bytes()
    config.output.unlink()
    with pytest.raises(CancelledError):
        train_concept(config, stop)
    train_concept(config, lambda progress: None)
    assert scales[0]["scale"] == 32.0
    assert scales[-1] == scales[0]
    assert config.output.read_bytes() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("text", ["none", "embedding+lora"])
def test_two_processes_learn_what_one_does_with_the_same_rows(configure: Configure, tmp_path: Path, text: str) -> None:
    """The command of docs/training.md, for real: 2 processes x 2 rows against 1 process x 2 rows x 2 accumulated."""
    changes = {"steps": 3, "batch": 2, "save_precision": "fp32", "train_text": text}
    one = configure(output=tmp_path / "one" / "zqx.safetensors", accumulation=2, **changes)
    device = "cpu" if torch.cuda.is_available() else "auto"  # where there is nothing else, nobody need say so
    two = configure(output=tmp_path / "two" / "zqx.safetensors", device=device, **changes)
    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no")
    for config, launcher in ((one, ()), (two, (*launch, "--main_process_port", "0", "-m"))):
        path = tmp_path / f"{config.output.parent.name}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        run([sys.executable, "-m", *launcher, "ui.cli", "train", "concept", "--config", str(path)])
    left, right = load_lora(one.output), load_lora(two.output)
    assert left.layers.keys() == right.layers.keys()
    for key, delta in left.layers.items():
        torch.testing.assert_close(delta.up, right.layers[key].up, atol=2e-5, rtol=1e-3)  # type: ignore[union-attr]
    assert (text == "none") == (not left.tokens)
    for word, vectors in left.tokens.items():
        torch.testing.assert_close(vectors["text_encoder"], right.tokens[word]["text_encoder"], atol=2e-4, rtol=1e-3)
