"""``studio bench`` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.lora.model import Lora
from studio.lora.write import save_lora
from ui import cli, console

MakeLora = Callable[..., Lora]


@pytest.fixture
def typed(tiny_base: Path, tmp_path: Path, make_lora: MakeLora) -> list[str]:
    """A small comparison of two LoRAs."""
    files = []
    for seed, (trigger, noun) in enumerate((("red", "cat"), ("green", "dog"))):
        told = {"trigger": trigger, "class_word": noun, "family": "embedded"}
        files.append(str(save_lora(tmp_path / f"{noun}.safetensors", make_lora(seed, "attn2", **told))))
    return ["--base", str(tiny_base), "--lora", files[0], "--lora", f"{files[1]}:0.5", "--methods", "merge,masked",
            "--combinations", "1", "--seeds", "1", "--references", "2", "--steps", "1", "--size", "32x32",
            "--out", str(tmp_path / "out")]  # fmt: skip


def studio(*arguments: str) -> int:
    return console.run(cli.app, ["bench", *arguments])


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    found: dict[str, Any] = json.loads(told[0])
    return found


def test_a_dry_run_makes_nothing(typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studio(*typed, "--dry-run", "--json") == 0
    told = answer(capsys)
    assert (told["pictures"], told["seconds"]) == (4 + 1 + 2 + 2, None)
    (pair,) = told["combinations"]
    assert pair["prompt"].endswith(", white background")
    assert sorted(pair["loras"]) == ["cat", "dog"]
    assert studio(*typed, "--suffix", "", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        ("cat + dog: on the left a red cat and on the right a green dog", "dog + cat: on the left a green")
    )
    assert lines[0].endswith(("dog", "cat"))
    assert lines[1] == "9 pictures: 4 reference, 1 floor, 2 single, 1 merge, 1 masked"
    assert not (tmp_path / "out").exists()


def test_a_comparison_leaves_page_lines_and_sheet(typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studio(*typed, "--json") == 0
    told = answer(capsys)
    assert told["made"] == 9
    assert set(told["numbers"]["2"]) == {"floor", "single", "merge", "masked"}
    assert len((tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()) == 9
    with Image.open(told["sheets"][0]) as sheet:
        assert sheet.width > 3 * 192, "floor, merge and masked side by side"
    assert "white background" in Path(told["report"]).read_text("utf-8")
    # The same again makes nothing and speaks in words; what it took is known now.
    assert studio(*typed) == 0
    words = capsys.readouterr().out
    assert "2 LoRAs in a picture" in words and str(tmp_path / "out" / "report.md") in words.replace("\n", "")
    assert studio(*typed, "--dry-run", "--json") == 0
    assert answer(capsys)["seconds"] > 0


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--methods", "swich"], 3, "did you mean 'switch'"),
        (["--sizes", "two"], 2, "--sizes 'two' is no list of whole numbers"),
        (["--sizes", ""], 2, "--sizes '' is no list of whole numbers"),
        (["--sizes", "3"], 2, "combinations of 3 need as many LoRAs with a subject, and there are 2"),
        (["--words", "cat"], 2, "--words 'cat' is not NAME=WORDS"),
        (["--combinations", "0"], 2, "combinations: input should be greater than or equal to 1"),
        (["--size", "30x32"], 2, "size 30x32 does not fit base 'tiny'"),
        (["--encoder", "nowhere"], 2, "--encoder 'nowhere' is neither"),
        (["--loras", "nowhere"], 4, "--loras nowhere is no folder"),
    ],
)
def test_mistakes_are_one_sentence(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, said: str
) -> None:
    assert studio(*typed, *more) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not list(tmp_path.rglob("*.png"))
