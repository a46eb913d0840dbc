"""A folder of small captioned pictures, and configurations that train in about a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.config import ConceptConfig, make_config


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (64, 64)) -> None:
    """A red square on a plain background."""
    rng = np.random.default_rng(seed)
    image = np.full((size[1], size[0], 3), rng.integers(60, 255, 3), np.uint8)
    y, x = rng.integers(0, size[1] // 2), rng.integers(0, size[0] // 2)
    image[y : y + size[1] // 2, x : x + size[0] // 2] = (200, 20, 20)
    Image.fromarray(image).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(5):
        draw(folder / f"{index}.png", index)
        (folder / f"{index}.txt").write_text(f"a {{trigger}} apple on the {'left' if index % 2 else 'right'}", "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_sd15(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, said to be of Stable Diffusion 1.5's family."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-15"
    shutil.copytree(tiny_base, folder)
    (folder / "studio.json").write_text(json.dumps({"name": "tiny-15", "family": "sd15"}), "utf-8")
    return folder


Configure = Callable[..., ConceptConfig]


@pytest.fixture
def configure(pictures: Path, tiny_base: Path, tmp_path: Path) -> Configure:
    def make(**changes: Any) -> ConceptConfig:
        values: dict[str, Any] = {
            "data": pictures,
            "output": tmp_path / "out" / "zqx.safetensors",
            "base": str(tiny_base),
            "trigger": "zqx",
            "class_word": "apple",
            "rank": 2,
            "steps": 4,
            "batch": 4,
            "warmup": 0,
            "device": "cpu",
            "targets": "attn",
        }
        return make_config(**(values | changes))

    return make
