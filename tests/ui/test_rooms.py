"""Another installed package under one of our names is noticed at start-up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ui.rooms import HOME, ROOMS, shadowed, shared_with


def foreign(folder: Path, room: str) -> Path:
    (folder / room).mkdir(parents=True)
    (folder / room / "__init__.py").write_text("")
    return folder


def test_nothing_shadows_us_here() -> None:
    assert shadowed() == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_in_front_of_ours_is_named(tmp_path: Path, room: str) -> None:
    (line,) = shadowed(HOME, [str(foreign(tmp_path, room)), str(HOME)])
    assert f"'{room}'" in line
    assert str(tmp_path / room) in line


def test_a_package_behind_ours_does_no_harm(tmp_path: Path) -> None:
    assert shadowed(HOME, [str(HOME), str(foreign(tmp_path, "studio"))]) == []


def test_a_plain_module_shadows_too(tmp_path: Path) -> None:
    (tmp_path / "compose.py").write_text("")
    (line,) = shadowed(HOME, [str(tmp_path), str(HOME)])
    assert "compose.py" in line


def test_the_command_says_so_and_stops(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HOME)!r}); import ui.cli; "
        f"sys.path.insert(0, {str(foreign(tmp_path, 'studio'))!r}); ui.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 9
    assert result.stderr.startswith("error: package 'studio' is imported from")
    assert result.stderr.count("\n") == 1


def test_a_second_owner_of_a_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"studio": ["diffusion-customization-studio", "other-studio"], "ui": ["diffusion-customization-studio"]}
    monkeypatch.setattr("ui.rooms.packages_distributions", lambda: owners)
    assert shared_with() == {"studio": ["other-studio"]}
