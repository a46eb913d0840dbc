"""One request of two LoRAs by every door, composed by changing one word: the command line, Python, and a job file."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compose.profile import SUFFIX, Profile
from pipelines import generate
from studio.base import Base
from studio.lora.files import load_lora
from studio.lora.model import Lora
from studio.lora.write import save_lora
from ui import cli, console

METHODS = ("merge", "switch", "composite", "cmlora")
PROMPT = "on the left a red cat a green dog"
FIELDS: dict[str, Any] = {"steps": 4, "size": [32, 16], "seed": 7, "guidance": 4.0, "negative": "night"}
SETTINGS: dict[str, dict[str, Any]] = {
    "merge": {"weight": "1/K"}, "switch": {"tau": 3}, "composite": {"gain": 1.5}, "cmlora": {"dominance": 4},
}  # fmt: skip
"""Something else than the default for every method."""


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def studio(*arguments: str | Path) -> int:
    return console.run(cli.app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, make_lora: Callable[..., Lora], base: Base
) -> dict[str, Any]:
    """All of a request but its method: two LoRAs, each with its profile beside it."""
    folder, names = tmp_path_factory.mktemp("loras"), []
    for seed, (trigger, noun) in enumerate((("red", "cat"), ("green", "dog"))):
        path = save_lora(folder / f"lora{seed}.safetensors", make_lora(seed, size=0.3, trigger=trigger, class_word=noun))
        Profile(lora_sha256=load_lora(path).sha256, base_sha256=base.sha256, score=0.5 - seed, curve=(0.5 - seed,)).save(
            path.with_name(path.stem + SUFFIX)
        )
        names.append(f"{path}:0.8")
    return {"prompt": PROMPT, "base": str(tiny_base), "loras": names, **FIELDS}


def from_job_file(folder: Path, lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What ``studio render`` makes of ``lines``, by method."""
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert studio("render", folder / "jobs.jsonl", "--out", folder / "out") == 0
    entries = [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text("utf-8").splitlines()]
    return {entry["request"]["method"]: pixels(folder / "out" / file) for entry in entries for file in entry["files"]}


def from_command_line(asked: dict[str, Any], method: str, options: dict[str, Any], out: Path) -> np.ndarray:
    """What ``studio generate`` makes."""
    words = ["generate", asked["prompt"], "--compose", method, "--base", asked["base"], "--out", str(out)]
    words += [word for name in asked["loras"] for word in ("--lora", name)]
    words += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    words += ["--size", "x".join(map(str, asked["size"]))]
    words += [word for key in ("steps", "seed", "guidance", "negative") for word in (f"--{key}", str(asked[key]))]
    assert studio(*words) == 0
    return pixels(out)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, asked: dict[str, Any]) -> dict[str, np.ndarray]:
    """The four pictures of a job file whose lines differ in their method only."""
    lines = [{"kind": "generate", "version": 1, **asked, "method": method} for method in METHODS]
    return from_job_file(tmp_path_factory.mktemp("jobs"), lines)


@pytest.mark.parametrize("method", METHODS)
def test_one_word_gives_the_same_pixels_by_every_door(
    asked: dict[str, Any], rendered: dict[str, np.ndarray], tmp_path: Path, method: str
) -> None:
    result = generate({**asked, "method": method}, progress=False)
    assert np.array_equal(np.asarray(result.images[0]), rendered[method])
    assert np.array_equal(from_command_line(asked, method, {}, tmp_path / "x.png"), rendered[method])


def test_each_of_the_four_words_gives_another_picture(rendered: dict[str, np.ndarray]) -> None:
    assert set(rendered) == set(METHODS)
    for one, other in combinations(METHODS, 2):
        assert abs(rendered[one] - rendered[other]).max() > 3, f"{one} and {other} draw the same"


@pytest.mark.parametrize("method", METHODS)
def test_an_option_acts_alike_by_every_door(
    asked: dict[str, Any], rendered: dict[str, np.ndarray], tmp_path: Path, method: str
) -> None:
    options = SETTINGS[method]
    result = generate(asked["prompt"], **{key: value for key, value in asked.items() if key != "prompt"}, method=method,
                      options=options, progress=False)  # fmt: skip
    set_here = np.asarray(result.images[0]).astype(int)
    assert abs(set_here - rendered[method]).max() > 0
    assert np.array_equal(from_command_line(asked, method, options, tmp_path / "x.png"), set_here)
    line = {"kind": "generate", **asked, "method": method, "options": options}
    assert np.array_equal(from_job_file(tmp_path, [line])[method], set_here)
