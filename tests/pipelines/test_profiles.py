"""Fourier profiles from the outside: measured once, kept beside the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compose.profile import SUFFIX
from pipelines.profiles import profile
from studio.errors import UnknownNameError
from studio.lora.model import Lora
from studio.lora.write import save_lora
from ui import cli, console
from ui.lora_cli import bars

MakeLora = Callable[..., Lora]


@pytest.fixture
def lora(make_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("compose.profile.TEMPLATES", ("{}",))
    return save_lora(tmp_path / "cat.safetensors", make_lora(1, trigger="sks", class_word="cat"))


def test_measured_once_and_kept_beside_the_file(
    lora: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["lora", "profile", str(lora), "--base", str(tiny_base), "--json"]
    assert console.run(cli.app, command) == 0
    (told,) = json.loads(capsys.readouterr().out)["profiles"]
    kept = lora.with_name(lora.stem + SUFFIX)
    assert (told["measured"], told["path"], told["high"]) == (True, str(kept), told["score"] >= 0)
    assert json.loads(kept.read_text())["score"] == told["score"]
    monkeypatch.setattr("pipelines.profiles.measure", lambda *_, **__: pytest.fail("measured again"))
    assert console.run(cli.app, [*command[:-1]]) == 0
    printed = capsys.readouterr()
    assert "cat" in printed.out
    assert ("high" if told["high"] else "low") in printed.out
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        list(profile([lora], base=str(tiny_base), again=True))


def test_all_names_are_looked_up_first(lora: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.profiles.measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UnknownNameError, match="unknown LoRA 'nowhere'"):
        list(profile([lora, "nowhere"], base=str(tiny_base)))


def test_bars_stand_on_zero() -> None:
    assert bars([0.0, 1.0, 0.5]) == "▁█▅"
    assert bars([-1.0, 0.0]) == "▁█"
    assert bars([0.0, 0.0]) == "▁▁"
