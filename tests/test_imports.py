"""The rooms import leftwards only, also inside functions, and importing them costs nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("studio", "compose", "training", "pipelines", "ui")
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "cv2", "xformers", "ray")


def contract(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_rooms_keep_the_contract() -> None:
    result = contract(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("room", "line"), [("studio", "import compose"), ("compose", "from training import base"),
                                            ("training", "import pipelines"), ("ui", "import tests")])  # fmt: skip
def test_the_contract_sees_imports_inside_functions(tmp_path: Path, room: str, line: str) -> None:
    for name in ROOMS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "training" / "base").mkdir()
    (tmp_path / "training" / "base" / "__init__.py").write_text("")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert contract(tmp_path).returncode == 0
    (tmp_path / room / "late.py").write_text(f"def late() -> None:\n    {line}\n")
    assert contract(tmp_path).returncode == 1


@pytest.mark.parametrize("modules", ["studio, compose, training, pipelines, ui", "ui.cli, ui.train_cli, ui.lora_cli"])
def test_importing_the_rooms_is_light(modules: str) -> None:
    code = f"import sys, {modules}; print(*({set(HEAVY)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []
