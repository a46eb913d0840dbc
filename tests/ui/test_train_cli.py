"""``studio train concept``: options, YAML, dry runs; training itself is replaced."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from training.config import ConceptConfig
from ui import cli, console

WORDS = ("--trigger", "zqx", "--class-word", "cat", "--out", "cat.safetensors")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ConceptConfig]:
    seen: list[ConceptConfig] = []
    fake = ModuleType("training.concept")

    def train_concept(config: ConceptConfig, progress: Any = None, preview: Any = None) -> Any:
        seen.append(config)
        return SimpleNamespace(
            path=config.output, steps=config.steps, seconds=2.0, losses=(0.5, 0.25), notes=("few pictures",), stopped=False
        )

    fake.train_concept = train_concept  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training.concept", fake)
    monkeypatch.chdir(tmp_path)
    return seen


def studio(*arguments: str) -> int:
    return console.run(cli.app, ("train", "concept", *arguments))


def test_options_become_the_configuration(trained: list[ConceptConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        studio("pictures", *WORDS, "--rank", "4", "--steps", "9", "--learning-rate", "1e-4", "--set", "min-snr=null", "--json")
        == 0
    )
    (config,) = trained
    assert (config.data, config.output) == (Path("pictures"), Path("cat.safetensors"))
    assert (config.trigger, config.class_word, config.rank, config.steps) == ("zqx", "cat", 4, 9)
    assert (config.learning_rate, config.min_snr) == (1e-4, None)
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"file": "cat.safetensors", "steps": 9, "seconds": 2.0, "loss": 0.25, "notes": ["few pictures"]}


def test_options_win_over_the_file(trained: list[ConceptConfig], tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    job = {"data": "pictures", "output": "cat.safetensors", "trigger": "zqx", "steps": 50}
    (tmp_path / "job" / "job.yaml").write_text(yaml.safe_dump(job))
    assert studio("--config", "job/job.yaml", "--steps", "5") == 0
    assert (trained[0].steps, trained[0].data) == (5, Path("job/pictures"))


@dataclass(frozen=True)
class Described:
    """What a dry run shows."""

    trigger: str
    steps: int

    def __str__(self) -> str:
        return f"{self.trigger} for {self.steps} steps"


def test_dry_run_says_what_would_be_done_and_trains_nothing(
    trained: list[ConceptConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.plan.describe", lambda config: Described(config.trigger, config.steps))
    assert studio("pictures", *WORDS, "--steps", "9", "--dry-run") == 0
    assert capsys.readouterr().out == "zqx for 9 steps\n"
    assert studio("pictures", *WORDS, "--steps", "9", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"trigger": "zqx", "steps": 9}
    assert trained == []


def test_options_of_text_and_previews(trained: list[ConceptConfig]) -> None:
    words = ("--train-text", "embedding+lora", "--text-learning-rate", "1e-5", "--set", "tokens=3")
    shown = (
        "--preview-every",
        "50",
        "--preview-prompt",
        "a {trigger}",
        "--preview-prompt",
        "a dog",
        "--tensorboard",
        "--restart",
    )
    assert studio("pictures", *WORDS, *words, *shown, "--batch", "2", "--precision", "bf16") == 0
    (config,) = trained
    assert (config.train_text, config.text_learning_rate, config.tokens) == ("embedding+lora", 1e-5, 3)
    assert (config.preview_every, config.preview_prompts) == (50, ("a {trigger}", "a dog"))
    assert (config.tensorboard, config.restart, config.batch, config.precision) == (True, True, 2, "bf16")


def test_only_the_first_process_speaks(
    trained: list[ConceptConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert studio("pictures", *WORDS) == 0
    assert len(trained) == 1
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def subfolders(tmp_path: Path) -> Path:
    for name in ("abc", "qrs", "xyz"):
        (tmp_path / "many" / name).mkdir(parents=True)
    (tmp_path / "many" / "xyz" / "train.yaml").write_text("rank: 0\n")
    return tmp_path / "many"


def test_many_train_one_for_each_subfolder_and_end_with_a_table(
    trained: list[ConceptConfig], subfolders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert studio("--many", "many", "--out", "loras", "--steps", "9") == 1  # one has failed
    assert [(c.trigger, c.data, c.output, c.steps) for c in trained] == [
        ("abc", Path("many/abc"), Path("loras/abc.safetensors"), 9),
        ("qrs", Path("many/qrs"), Path("loras/qrs.safetensors"), 9),
    ]
    told = capsys.readouterr()
    rows = [line.split() for line in told.out.splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["abc", "done"], ["qrs", "done"], ["xyz", "failed"]]
    assert "2 done, 1 failed" in told.err
    assert "xyz: training option 'rank' is 0" in told.err


def test_many_as_json_and_dry(
    trained: list[ConceptConfig],
    subfolders: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert studio("--many", "many", "--json") == 1
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["name"], run["state"]) for run in runs] == [("abc", "done"), ("qrs", "done"), ("xyz", "failed")]
    monkeypatch.setattr("training.plan.describe", lambda config: Described(config.trigger, config.steps))
    trained.clear()
    assert studio("--many", "many", "--dry-run", "--json") == 1
    assert [sorted(run) for run in json.loads(capsys.readouterr().out)["runs"]] == [
        ["name", "steps", "trigger"],
        ["name", "steps", "trigger"],
        ["error", "name"],
    ]
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("pictures", "--trigger", "zqx"), 2, "output"),
        (("pictures", *WORDS, "--set", "stepz=4"), 3, "steps"),
        (("pictures", *WORDS, "--set", "lr=4"), 2, "learning_rate"),
        (("pictures", *WORDS, "--rank", "0"), 2, "rank"),
        (("--config", "absent.yaml"), 4, "absent.yaml"),
        (("--many", "absent"), 4, "absent"),
        (("pictures", "--many", "many"), 2, "leave one of them out"),
        (("pictures", *WORDS, "--train-text", "words"), 2, "train_text"),
    ],
)
def test_mistakes_are_one_sentence(
    trained: list[ConceptConfig], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert studio(*arguments) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert said in printed
    assert trained == []
