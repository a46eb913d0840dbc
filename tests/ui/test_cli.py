"""The ``studio`` command with the rooms behind it replaced: what it asks for, prints, and ends with."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import pipelines.explain
from studio.errors import (
    CancelledError,
    FileError,
    LoraFileError,
    NumericsError,
    OutOfMemoryError,
    RequestError,
    UnknownNameError,
)
from studio.requests import GenerateRequest, as_request
from ui import cli, console
from ui.arguments import free_path, parse_settings

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class FakeResult:
    """What the command line uses of a result."""

    request: GenerateRequest
    seeds: tuple[int, ...] = (7,)
    seconds: float = 1.25
    notes: tuple[str, ...] = ("a note",)
    images: list[Image.Image] = field(default_factory=list)

    def save(self, path: Path) -> list[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"png")
        return [path]


@pytest.fixture
def machine() -> dict[str, Any]:
    """Options beside the request that reached ``pipelines``."""
    return {}


@pytest.fixture
def calls(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Requests that reached ``pipelines``; results go below ``tmp_path``."""
    seen: list[Any] = []
    fake = ModuleType("pipelines")

    def generate(prompt: str, **fields: Any) -> FakeResult:
        print("a library says hello")
        machine.update({key: fields.pop(key) for key in ("device", "dtype", "memory", "lora_dirs", "explain") if key in fields})
        saves = fields.pop("on_round")
        seen.append(as_request(prompt, **fields))
        saves(FakeResult(seen[-1]))
        return FakeResult(seen[-1])

    def rerun(file: Path, **options: Any) -> FakeResult:
        seen.append(file)
        machine.update(options)
        return FakeResult(as_request("again"))

    fake.generate, fake.rerun, fake.explain = generate, rerun, pipelines.explain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipelines", fake)
    monkeypatch.chdir(tmp_path)
    return seen


def studio(*arguments: str) -> int:
    return console.run(cli.app, arguments)


def test_generate_passes_everything_on(calls: list[GenerateRequest], capsys: pytest.CaptureFixture[str]) -> None:
    code = studio(
        "generate", "a sks cat", "--lora", "cat:0.8", "--lora", r"C:\x.safetensors:0.5", "--lora", r"C:\y.safetensors",
        "--base", "other", "--negative", "blur", "--steps", "4", "--guidance", "3.5", "--seed", "7", "--size", "96x64",
        "--scheduler", "ddim", "--count", "2", "--out", "x.png",
    )  # fmt: skip
    assert code == 0
    (request,) = calls
    assert [(lora.name, lora.weight) for lora in request.loras] == [
        ("cat", 0.8), (r"C:\x.safetensors", 0.5), (r"C:\y.safetensors", 1.0),
    ]  # fmt: skip
    assert (request.prompt, request.base, request.negative, request.steps) == ("a sks cat", "other", "blur", 4)
    assert (request.guidance, request.seed, request.size, request.scheduler, request.count) == (3.5, 7, (96, 64), "ddim", 2)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "x.png"
    assert "note: a note" in printed.err


def test_options_not_given_are_left_to_the_base(calls: list[GenerateRequest]) -> None:
    assert studio("generate", "a cat", "--out", "x.png") == 0
    assert calls[0] == GenerateRequest(prompt="a cat")


def test_where_and_how_is_passed_on(calls: list[GenerateRequest], machine: dict[str, Any]) -> None:
    code = studio(
        "generate", "a cat", "--vae", "v.safetensors", "--clip-skip", "2", "--embedding", "e.safetensors", "--embedding",
        "f.safetensors", "--lora-dir", "a", "--lora-dir", "b", "--device", "cpu", "--dtype", "bfloat16", "--memory", "low",
    )  # fmt: skip
    assert code == 0
    assert (calls[0].vae, calls[0].clip_skip, calls[0].embeddings) == ("v.safetensors", 2, ("e.safetensors", "f.safetensors"))
    assert machine == {"lora_dirs": [Path("a"), Path("b")], "device": "cpu", "dtype": "bfloat16", "memory": "low"}
    machine.clear()
    assert studio("rerun", "old.png", "--base", "other", "--lora-dir", "a", "--memory", "high") == 0
    assert machine == {"base": "other", "lora_dirs": [Path("a")], "memory": "high"}


def test_json_is_one_line_and_the_rest_goes_to_stderr(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert studio("generate", "a cat", "--out", "x.png", "--json") == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    answer = json.loads(printed.out)
    assert answer["files"] == ["x.png"]
    assert answer["request"]["prompt"] == "a cat"
    assert (answer["seeds"], answer["seconds"], answer["notes"]) == ([7], 1.25, ["a note"])
    assert "a library says hello" in printed.err


def test_unnamed_results_never_overwrite(calls: list[Any], tmp_path: Path) -> None:
    assert studio("generate", "A red fox!") == studio("generate", "A red fox!") == 0
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == ["0001-a-red-fox.png", "0002-a-red-fox.png"]
    assert free_path(tmp_path, "…", ".png").name == "0001-picture.png"


def test_the_method_and_all_that_belongs_to_it_is_passed_on(calls: list[GenerateRequest], machine: dict[str, Any]) -> None:
    code = studio(
        "generate", "a cat", "--lora", "cat", "--lora", "dog", "--compose", "cmlora", "--set", "max-age=2",
        "--set", "phase=0.5",
        "--region", "cat@0,0,0.5,1=a sks cat", "--region", "dog:0.5+cat@m.png", "--init-image", "x.png", "--strength", "0.4",
        "--strict", "--explain", "why",
    )  # fmt: skip
    assert code == 0
    (request,) = calls
    assert (request.method, request.options) == ("cmlora", {"max_age": 2, "phase": 0.5})
    assert (request.init_image, request.strength, request.triggers) == (Path("x.png"), 0.4, "require")
    assert (request.regions[0].box, request.regions[0].prompt) == ((0.0, 0.0, 0.5, 1.0), "a sks cat")
    assert [(ref.name, ref.weight) for ref in request.regions[1].loras] == [("dog", 0.5), ("cat", 1.0)]
    assert (request.regions[1].mask, request.regions[1].prompt) == (Path("m.png"), None)
    assert machine == {"explain": Path("why")}


def test_another_method_takes_no_options_of_the_one_before(calls: list[Any], machine: dict[str, Any]) -> None:
    assert studio("rerun", "old.png", "--compose", "switch") == 0
    assert machine == {"method": "switch", "options": {}}
    machine.clear()
    assert studio("rerun", "old.png", "--set", "tau=3") == 0
    assert machine == {"options": {"tau": 3}}


def test_a_picture_is_made_again_with_other_regions_and_explained(
    calls: list[Any], machine: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert studio("rerun", "old.png", "--region", "a@0,0,0.5,1", "--region", "b@m.png", "--explain", "why") == 0
    assert machine == {"regions": ("a@0,0,0.5,1", "b@m.png"), "explain": Path("why")}
    assert f"what was done: {Path('why') / 'index.html'}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("generate", "a cat"), ("rerun", "old.png")])
def test_a_place_that_cannot_be_written_is_said_before_drawing(
    calls: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert studio(*command, "--out", "file/x.png") == FileError.exit_code
    assert "cannot write to the folder file" in capsys.readouterr().err
    assert studio(*command, "--out", "folder.png") == 2
    assert "--out 'folder.png' is a folder" in capsys.readouterr().err
    (tmp_path / "outputs").write_text("")
    assert studio(*command) == FileError.exit_code
    assert calls == []


def test_rerun_hands_the_file_over(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert studio("rerun", "old.png", "--out", "new.png") == 0
    assert calls == [Path("old.png")]
    assert capsys.readouterr().out.splitlines()[-1] == "new.png"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("steps: too many"), 2),
        (UnknownNameError("LoRA", "ctas", ["cats"]), 3),
        (FileError("cannot read"), 4),
        (LoraFileError("damaged"), 6),
        (NumericsError("NaN\nin two lines"), 7),
        (OutOfMemoryError("no memory"), 8),
        (CancelledError("cancelled"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["pipelines"], "generate", fail)
    assert studio("generate", "a cat", "--json") == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert json.loads(printed.out)["error"]["exit_code"] == code
    assert code in console.EXIT_CODES


def test_what_was_made_before_a_stop_is_named(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(prompt: str, on_round: Any, **_: Any) -> None:
        on_round(FakeResult(as_request(prompt)))
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pipelines"], "generate", stopped)
    assert studio("generate", "a cat", "--count", "40", "--out", "x.png") == 130
    assert capsys.readouterr().err.splitlines() == ["made before that: x.png", "error: cancelled"]
    assert Path("x.png").read_bytes() == b"png"


def test_a_bug_is_not_dressed_up_as_a_users_mistake(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(sys.modules["pipelines"], "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        studio("generate", "a cat")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate",), "Missing argument 'PROMPT'"),
        (("generate", "a", "--steps", "many"), "'--steps'"),
        (("generate", "a", "--stpes", "4"), "--stpes"),
        (("generate", "a", "--size", "big"), "size"),
        (("generate", "a", "--steps", "0"), "steps"),
        (("generate", "a", "--lora", "cat:nan"), "finite"),
        (("generate", "a", "--out", "a.jpg"), ".png"),
        (("rerun", "a.png", "--out", "folder"), ".png"),
        (("generate", "a", "--memory", "most"), "'--memory'"),
        (("generate", "a", "--dtype", "int8"), "'--dtype'"),
        (("generate", "a", "--clip-skip", "0"), "clip_skip"),
        (("generate", "a", "--set", "tau"), "OPTION=VALUE"),
        (("generate", "a", "--set", "tau=2", "--set", "tau=3"), "given twice"),
        (("generate", "a", "--strict", "--as-written"), "one of them"),
        (("generate", "a", "--strength", "0.5"), "init_image"),
        (("generate", "a", "--init-image", "x.png", "--strength", "1.5"), "strength"),
        (("generate", "a", "--region", "cat"), "cat-face@0,0,0.5,1"),
        (("generate", "a", "--region", "cat@0,0,nan,1"), "finite"),
        (("generate", "a", "--region", "cat@0.6,0,0.5,1"), "x0 < x1"),
        (("nothing",), "'nothing'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    calls: list[Any], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert studio(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert said in printed.err
    assert calls == []


def test_every_error_has_a_documented_exit_code() -> None:
    from studio import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.StudioError)]
    assert {kind.exit_code for kind in kinds} <= set(console.EXIT_CODES)
    readme = (ROOT / "README.md").read_text("utf-8")
    for code, meaning in console.EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in readme


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from studio import __version__

    assert studio("--version") == 0
    assert capsys.readouterr().out == f"diffusion-customization-studio {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train", "concept", "--help"], ["lora", "--help"]])
def test_help_takes_less_than_a_second_of_work(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-m", "ui.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage: " in result.stdout
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 1.0


def test_settings_are_yaml_values() -> None:
    assert parse_settings(["min-snr=null", "flip=true", "targets=[a, b]", "caption=x=y"]) == {
        "min_snr": None, "flip": True, "targets": ["a", "b"], "caption": "x=y",
    }  # fmt: skip
    with pytest.raises(RequestError, match="OPTION=VALUE"):
        parse_settings(["flip"])
    with pytest.raises(RequestError, match="not a YAML value"):
        parse_settings(["flip=[1"])
