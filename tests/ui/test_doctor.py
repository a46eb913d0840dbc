"""The doctor reports what is true: kernels that were run, versions, files that are there."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from ui import cli, console, doctor

ROOT = Path(__file__).resolve().parents[2]


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_it_knows_every_dependency_and_its_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(">")[0] for line in project["dependencies"]}
    assert set(doctor.DEPENDENCIES) == names
    assert names <= set(doctor.tested_versions())
    assert set(doctor.OPTIONAL.values()) <= set(project["optional-dependencies"])


def test_kernels_are_judged_by_running_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: torch.Tensor) -> torch.Tensor:
        raise ModuleNotFoundError("xformers")

    def refusing(*_: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("No operator found\nand a long list")

    real = doctor._attentions()["SDPA math"]
    kernels = {
        "right": real,
        "wrong": lambda q, k, v: v,
        "nan": lambda q, k, v: v * torch.nan,
        "absent": absent,
        "no": refusing,
    }
    monkeypatch.setattr(doctor, "_attentions", lambda: kernels)
    found = by_name(list(doctor.kernels()))
    assert found["right on cpu"].state == "ok"
    assert found["wrong on cpu"].state == found["nan on cpu"].state == "warn"
    assert found["absent on cpu"].detail == "not installed"
    assert found["no on cpu"].detail == "does not run: No operator found"


def test_the_plain_kernels_run_on_this_machine() -> None:
    found = by_name(list(doctor.kernels()))
    assert found["SDPA on cpu"].state == found["SDPA math on cpu"].state == "ok"
    assert "xformers on cpu" in found


def test_other_versions_and_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "tested_versions", lambda: {"rich": "0.0.1", "torch": torch.__version__.partition("+")[0]})
    monkeypatch.setattr(doctor, "DEPENDENCIES", ("rich", "torch", "surely-not-installed"))
    found = by_name(list(doctor.versions()))
    assert found["rich"].state == "warn"
    assert found["rich"].detail.endswith("tested with 0.0.1")
    assert found["torch"].state == "ok"
    assert found["surely-not-installed"].state == "missing"


def test_shipped_files_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("3d.webp", "flat.webp", "concepts.json", "splits.json"):
        (tmp_path / "atlas").mkdir(exist_ok=True)
        (tmp_path / "atlas" / name).touch()
    monkeypatch.setattr("studio.paths.assets", lambda: tmp_path)
    found = by_name(list(doctor.shipped()))
    assert found["atlas"].state == found["embedded base"].state == found["LoRAs"].state == "missing"
    assert "cartoon.webp" in found["atlas"].detail

    (tmp_path / "atlas" / "cartoon.webp").touch()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    (tmp_path / "base" / "studio.json").write_text('{"name": "base-9"}')
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "cat.safetensors").touch()
    found = by_name(list(doctor.shipped()))
    assert found["atlas"].state == "ok"
    assert found["embedded base"].detail.startswith("base-9 in ")
    assert found["LoRAs"].detail == "cat"
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "base" / "studio.json").write_text(damaged)
        assert by_name(list(doctor.shipped()))["embedded base"].detail.startswith("unnamed in ")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    assert next(doctor.writable(tmp_path / "new" / "outputs")).state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert next(doctor.writable(tmp_path / "file")).state == "missing"


@pytest.mark.parametrize("missing", [True, False])
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: bool) -> None:
    findings = [
        doctor.Finding("packages", "torch", "ok", "2.13 [cpu]"),
        doctor.Finding("assets", "LoRAs", "missing" if missing else "ok", "none in assets/loras"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda outputs: findings)
    assert console.run(cli.app, ["doctor", "--json"]) == int(missing)
    answer = json.loads(capsys.readouterr().out)
    assert answer["ready"] is not missing
    assert answer["findings"][0] == {"section": "packages", "name": "torch", "state": "ok", "detail": "2.13 [cpu]"}
    assert console.run(cli.app, ["doctor"]) == int(missing)
    printed = capsys.readouterr()
    assert "2.13 [cpu]" in printed.out
    assert ("missing: LoRAs" in printed.err) is missing
