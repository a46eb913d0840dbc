"""What people install: the right files in the wheel, and a studio that works away from its checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("studio", "compose", "training", "pipelines", "ui")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def test_every_module_of_the_rooms_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    modules = {p.relative_to(ROOT).as_posix() for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    assert modules <= set(wheel.namelist())


def test_assets_and_tested_versions_are_package_data(wheel: zipfile.ZipFile) -> None:
    assets = {f"studio/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert len(assets) > 5
    assert assets | {"studio/constraints.txt"} <= set(wheel.namelist())


def test_nothing_else_is_installed(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    (info,) = tops - set(ROOMS)
    assert info.endswith(".dist-info")
    assert not [name for name in wheel.namelist() if "__pycache__" in name or "/tests/" in name]


def test_licences_and_the_command_are_declared(wheel: zipfile.ZipFile) -> None:
    names = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(names["entry_points.txt"]).decode().split() == ["[console_scripts]", "studio", "=", "ui.cli:main"]
    licences = {Path(name).name for name in names if name.startswith("licenses/")}
    assert {"LICENSE", "NOTICE", *(p.name for p in (ROOT / "assets" / "atlas" / "LICENSES").iterdir())} <= licences


def test_the_version_is_the_packages_own(built: Path) -> None:
    from studio import __version__

    assert next(built.glob("*.whl")).name.split("-")[1] == __version__


def test_the_source_archive_can_build_the_wheel(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE", "assets/atlas/splits.json"} <= names
    assert {f"{room}/__init__.py" for room in ROOMS} <= names
    assert not [name for name in names if name.startswith((".venv", "outputs", "work"))]


@pytest.mark.slow
def test_a_clean_installation_away_from_the_checkout_draws_a_picture(built: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(*command: str | Path) -> str:
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    folder = tmp_path / "env"
    run(sys.executable, "-m", "venv", folder)
    python, studio, constraints = folder / "bin" / "python", folder / "bin" / "studio", ROOT / "constraints.txt"
    torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    run(python, "-m", "pip", "install", "--quiet", torch, "-c", constraints)
    run(python, "-m", "pip", "install", "--quiet", next(built.glob("*.whl")), "-c", constraints)

    place = run(python, "-c", "import studio, ui, pipelines; print(studio.__file__, ui.__file__, pipelines.__file__)")
    assert all(Path(path).is_relative_to(folder) for path in place.split())
    findings = json.loads(run(studio, "doctor", "--json"))
    assert findings["ready"]
    answer = json.loads(run(studio, "generate", "a frog, blue background", "--seed", "1", "--out", "frog.png", "--json"))
    assert answer["files"] == ["frog.png"]
    picture = Image.open(tmp_path / "frog.png").convert("RGB")
    assert picture.size == tuple(answer["request"]["size"])
    assert len(picture.getcolors(picture.width * picture.height) or []) > 50
