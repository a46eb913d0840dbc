"""``studio render``: reading job files, making what is not there, going on after a stop."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipelines.image import generate
from pipelines.jobs import GenerateJob, Machine, digest
from studio.errors import FileError, NumericsError, RequestError
from studio.lora.model import Lora
from studio.lora.write import save_lora
from studio.media import read_carried, save_png
from ui import cli, console
from ui.jobs import read_jobs
from ui.render import Manifest

MakeLora = Callable[..., Lora]
ROOT = Path(__file__).resolve().parents[2]


def studio(*arguments: str | Path) -> int:
    return console.run(cli.app, ["render", *map(str, arguments)])


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


@pytest.fixture
def job(tiny_base: Path) -> Callable[..., dict[str, Any]]:
    """A line that takes little work."""

    def make(prompt: str = "a cat", **fields: Any) -> dict[str, Any]:
        quick = {"base": str(tiny_base), "steps": 1, "size": [16, 16], "guidance": 1, "seed": 1}
        return {"kind": "generate", "version": 1, "prompt": prompt, **quick, **fields}

    return make


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def test_results_are_made_once(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [job(name="one"), job("a dog", count=2, name="two"), job("a red apple, left!")]
    jobs, out = write(tmp_path / "jobs.jsonl", *lines), tmp_path / "out"
    assert studio(jobs, "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (len(told["made"]), told["skipped"], told["failed"]) == (4, 0, [])
    first, second, third, last = pictures(out)
    assert (second, third, last) == ("one.png", "two-1.png", "two-2.png")
    assert first.startswith("a-red-apple-left-")
    assert [entry["state"] for entry in manifest(out)] == ["done"] * 3
    assert manifest(out)[1]["files"] == {name: (out / name).stat().st_size for name in ("two-1.png", "two-2.png")}
    before = {name: (out / name).stat().st_mtime_ns for name in pictures(out)}
    # Nothing again; then what was lost, and what is new, wherever it stands.
    assert studio(jobs, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 3
    (out / "two-2.png").unlink()
    write(jobs, job("a dog", name="new"), *lines)
    assert studio(jobs, "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (sorted(Path(file).name for file in told["made"]), told["skipped"]) == (["new.png", "two-1.png", "two-2.png"], 2)
    assert (out / "one.png").stat().st_mtime_ns == before["one.png"]
    assert studio(jobs, "--out", out, "--again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 0


def test_a_seed_left_open_follows_from_the_line(job: Any, tmp_path: Path) -> None:
    jobs = write(tmp_path / "j.jsonl", *[{**job(name=name), "seed": None} for name in ("one", "two")])
    (first, second), problems = read_jobs(jobs, Machine())
    again, _ = read_jobs(jobs, Machine())
    assert problems == []
    assert first.job.request.seed == again[0].job.request.seed != second.job.request.seed


def test_other_contents_of_a_lora_are_another_job(job: Any, tmp_path: Path, make_lora: MakeLora) -> None:
    file = save_lora(tmp_path / "cat.safetensors", make_lora(1, trigger="sks"))
    jobs = write(tmp_path / "j.jsonl", job("a sks cat", loras=[f"{file}:0.5"]))
    before = read_jobs(jobs, Machine())[0][0]
    save_lora(file, make_lora(2, trigger="sks"))
    after = read_jobs(jobs, Machine())[0][0]
    assert before.digest != after.digest
    assert before.job.request == after.job.request


def test_inputs_of_one_name_are_kept_apart(
    job: Any, tmp_path: Path, make_lora: MakeLora, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base and a LoRA may share a name; where nothing does, what was made before kinds were noted keeps its digest."""
    bases, loras = tmp_path / "bases", tmp_path / "loras"
    shutil.copytree(tiny_base, bases / "cat")
    monkeypatch.setenv("STUDIO_MODEL_PATH", str(bases))
    save_lora(loras / "cat.safetensors", make_lora(1, trigger="sks"))
    save_lora(loras / "dog.safetensors", make_lora(2, trigger="sks"))
    fields = {"base": "cat", "prompt": "a sks cat"}
    jobs = write(tmp_path / "j.jsonl", job(**fields, loras=["cat"], name="x"), job(**fields, loras=["dog"], name="y"))
    (one, plain), problems = read_jobs(jobs, Machine(lora_dirs=(loras,)))
    assert problems == []
    assert set(one.inputs) == {"base:cat", "lora:cat"}
    bare = {"cat": plain.inputs["base:cat"], "dog": plain.inputs["lora:dog"]}
    assert plain.digest == digest(plain.job.request.model_dump(mode="json"), bare, "y")
    before = one.digest
    weights = bases / "cat" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    (one, _), _ = read_jobs(jobs, Machine(lora_dirs=(loras,)))
    assert one.digest != before


@pytest.mark.parametrize("whole", [True, False])
def test_other_contents_of_a_vae_are_another_job(job: Any, tmp_path: Path, tiny_base: Path, whole: bool) -> None:
    folder = shutil.copytree(tiny_base / "vae", tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    jobs = write(tmp_path / "j.jsonl", job(vae=str(folder if whole else weights)), job())
    (before, without), problems = read_jobs(jobs, Machine())
    assert problems == []
    weights.write_bytes(weights.read_bytes() + b" ")
    (after, same), _ = read_jobs(jobs, Machine())
    assert before.digest != after.digest
    assert without.digest == same.digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"promt": "x"}, "unknown key 'promt': did you mean 'prompt'"),
        ({"nmae": "x"}, "unknown key 'nmae': did you mean 'name'"),
        ({"kind": "genrate"}, "unknown kind 'genrate': did you mean 'generate'"),
        ({"kind": None}, "'kind' is missing: say what to make, one of generate"),
        ({"version": 2}, "version 2 of 'generate' is not known here"),
        ({"name": "../x"}, "name '../x' cannot name a file"),
        ({"name": 5}, "name 5 cannot name a file"),
        ({"name": "\u93e1" * 90}, "is too long for a file: 270 bytes of UTF-8, at most 200"),
        ({"base": "x" * 300}, "cannot look for a file it names: File name too long"),
        ({"vae": "nowhere"}, "unknown VAE 'nowhere'"),
        ({"negative": "half a face \ud83d"}, r"a text holds \ud83d, half of a character"),
        ({"\udc80": 1}, r"a text holds \udc80, half of a character"),
        ('{"\\ud83d": 1, "\\ud83d": 1}', r"'\ud83d' is given twice"),
        ("[" * 100_000, "values lie too deep in each other"),
        ({"steps": "many"}, "steps: "),
        ({"size": [18, 16]}, "size 18x16 does not fit base 'tiny'"),
        ({"loras": ["nowhere"]}, "unknown LoRA 'nowhere'"),
        ({"method": "swich"}, "did you mean 'switch'"),
        ({"method": "switch"}, "composes LoRAs, but the request names none"),
        ({"scheduler": "eular"}, "'eular'"),
        ({"init_image": "none.png"}, "cannot read the picture none.png"),
        ({"name": "good"}, "would write good.png, as line 1 does"),
        ("{", "no JSON"),
        ("[1]", "not a set of keys and values"),
        ('{"kind": "generate", "seed": 1, "seed": 2}', "'seed' is given twice"),
        ('{"kind": "generate", "guidance": NaN}', "NaN is not a number here"),
    ],
)
def test_every_wrong_line_is_named_before_anything_is_made(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: dict[str, Any] | str, said: str
) -> None:
    wrong = line if isinstance(line, str) else job("a wrong one", **line)
    jobs = write(tmp_path / "jobs.jsonl", job(name="good"), "", wrong, job("a dog", name="fine"))
    assert studio(jobs, "--out", tmp_path / "out") in (2, 3)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: nothing was made: jobs.jsonl, line 3: ")
    assert said in error
    assert pictures(tmp_path / "out") == []


def test_all_wrong_lines_are_told_at_once(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = write(tmp_path / "j.jsonl", job(steps=0), job(seed=-1), job(), job())
    assert studio(jobs, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert "line 2: seed" in printed
    assert "line 4: the same as line 3" in printed
    assert "line 1: steps" in printed.splitlines()[-1]
    assert "and 2 more" in printed


def test_yaml_says_the_same_and_knows_its_lines(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = "- kind: generate\n  prompt: a cat\n  seed: 1\n\n# one more\n- kind: generate\n  prompt: a dog\n  promt: x\n"
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(listed)
    _, (problem,) = read_jobs(jobs, Machine())
    assert str(problem) == "line 8: unknown key 'promt': did you mean 'prompt'?"
    jobs.write_text("kind: generate\nprompt: a cat\nseed: 1\n---\nkind: generate\nprompt: a dog\nseed: 1\n")
    items, problems = read_jobs(jobs, Machine())
    assert ([item.line for item in items], problems) == ([1, 5], [])
    lines = write(tmp_path / "j.jsonl", *[{"kind": "generate", "prompt": p, "seed": 1} for p in ("a cat", "a dog")])
    assert [item.digest for item in read_jobs(lines, Machine())[0]] == [item.digest for item in items]
    jobs.write_text("- kind: generate\n  prompt: a\n  prompt: b\n- 5\n- {a: !!python/object:os.system x}\n- {1: 2}\n")
    told = [str(problem) for problem in read_jobs(jobs, Machine())[1]]
    for text, place in zip(
        told, ("line 3: 'prompt' is", "line 4: not a set", "line 5: no plain", "line 6: not a set"), strict=True
    ):
        assert text.startswith(place)
    jobs.write_text("- kind: generate\n- [\n")
    assert [problem.line for problem in read_jobs(jobs, Machine())[1]] == [3]
    for value, place in (
        ("prompt: 2024-02-30", "line 1: no plain YAML (day is out of range for month)"),
        ("seed: !!int foo", "line 1: no plain YAML (invalid literal"),
        ("seed: !!bool foo", "line 1: no plain YAML ("),
        ("seed: !!timestamp foo", "line 1: no plain YAML ("),
        ("? [a, b]\n  : 1", "line 1: no plain YAML (found unhashable key)"),
        (f"options: {'[' * 900}{']' * 900}", "line 2: values lie too deep in each other"),
        ("prompt: a \x01", "line 2: no YAML (the character U+0001 must not stand there)"),
        ('prompt: "\\ud83d"', "line 1: a text holds"),
    ):
        jobs.write_text(f"- kind: generate\n  {value}\n")
        (problem,) = read_jobs(jobs, Machine())[1]
        assert str(problem).startswith(place)
    with pytest.raises(RequestError, match=r"must end in .jsonl"):
        read_jobs(tmp_path / "jobs.txt", Machine())
    with pytest.raises(FileError, match="cannot read"):
        read_jobs(tmp_path / "none.yaml", Machine())
    jobs.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="not UTF-8"):
        read_jobs(jobs, Machine())
    jobs.write_text("")
    with pytest.raises(RequestError, match="holds no job"):
        read_jobs(jobs, Machine())


def test_a_dry_run_prints_whole_lines_that_can_be_run(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = write(tmp_path / "j.jsonl", {**job(), "seed": None}, job("a dog", name="dog"))
    assert studio(jobs, "--out", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()
    again = write(tmp_path / "again.jsonl", *printed)
    items, problems = read_jobs(again, Machine())
    assert problems == []
    assert [item.resolved() for item in items] == [json.loads(line) for line in printed]
    assert json.loads(printed[0])["seed"] is not None


def test_a_failure_costs_only_its_own_line(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GenerateJob.run
    bad: dict[str, Exception] = {"a": NumericsError("the model produced NaN"), "b": ZeroDivisionError("a bug")}

    def run(self: GenerateJob, folder: Path, name: str, mark: str, reach: Any) -> Any:
        if name in bad:
            raise bad[name]
        return real(self, folder, name, mark, reach)

    monkeypatch.setattr(GenerateJob, "run", run)
    jobs, out = write(tmp_path / "j.jsonl", *[job(name=name) for name in "abc"]), tmp_path / "out"
    assert studio(jobs, "--out", out) == 1
    printed = capsys.readouterr()
    assert "1 made, 0 were there already, 2 failed" in printed.out
    assert printed.err.splitlines()[-2:] == [
        "failed: line 1 (a): the model produced NaN", "failed: line 2 (b): ZeroDivisionError: a bug",
    ]  # fmt: skip
    assert [entry["state"] for entry in manifest(out)] == ["failed", "failed", "done"]
    assert "Traceback" in manifest(out)[1]["traceback"]
    bad.clear()
    assert studio(jobs, "--out", out) == 0
    assert pictures(out) == ["a.png", "b.png", "c.png"]


def test_where_no_bar_can_be_each_job_says_how_long_the_rest_takes(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, now = GenerateJob.run, [0.0]

    def run(self: GenerateJob, folder: Path, name: str, mark: str, reach: Any) -> Any:
        now[0] += 6
        if name == "bad":
            raise NumericsError("the model produced NaN")
        return real(self, folder, name, mark, reach)

    monkeypatch.setattr(GenerateJob, "run", run)
    monkeypatch.setattr("ui.render.time", SimpleNamespace(monotonic=lambda: now[0]))
    jobs = write(tmp_path / "j.jsonl", job(name="one"), job("a dog", count=2, name="two"), job("a red cat", name="bad"))
    assert studio(jobs, "--out", tmp_path / "out") == 1
    assert [line for line in capsys.readouterr().err.splitlines() if " of 4: " in line] == [
        "1 of 4: made one.png, about 18 s left", "3 of 4: made two-1.png, two-2.png, about 4 s left", "4 of 4: failed bad.png",
    ]  # fmt: skip
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a terminal has the bar instead
    assert studio(jobs, "--out", tmp_path / "out") == 1 and " of 1: " not in capsys.readouterr().err


def test_nothing_foreign_is_written_over(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs, out = write(tmp_path / "j.jsonl", job(name="cat")), tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (4, 4)).save(out / "cat.png")
    mine = (out / "cat.png").read_bytes()
    assert studio(jobs, "--out", out) == 4
    assert "would write over" in capsys.readouterr().err
    assert (out / "cat.png").read_bytes() == mine
    (out / "cat.png").unlink()
    assert studio(jobs, "--out", out) == 0
    # A crash after the renaming and before the note leaves a file that is recognised, also when the line is edited then.
    (out / "manifest.jsonl").unlink()
    write(jobs, job("a dog", name="cat"))
    assert studio(jobs, "--out", out) == 0


def test_a_picture_made_by_hand_is_foreign(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one of the same seed, and even of the very same request."""
    line, out = job(name="cat"), tmp_path / "out"
    asked = {key: value for key, value in line.items() if key not in ("name", "prompt")}
    for prompt in ("a dog", "a cat"):
        generate(prompt, **asked, progress=False).save(out / "cat.png")
        mine = (out / "cat.png").read_bytes()
        assert studio(write(tmp_path / "j.jsonl", line), "--out", out) == 4
        assert "would write over" in capsys.readouterr().err
        assert (out / "cat.png").read_bytes() == mine


def test_an_edited_line_is_made_again_even_when_it_is_edited_back(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, out = tmp_path / "j.jsonl", tmp_path / "out"
    made = []
    for prompt in ("a cat", "a dog", "a cat", "a cat"):
        assert studio(write(jobs, job(prompt, name="x")), "--out", out, "--json") == 0
        made.append(len(json.loads(capsys.readouterr().out)["made"]))
        # Sizes that happen to be the same must not hide whose picture it is.
        entries = [{**entry, "files": {"x.png": (out / "x.png").stat().st_size}} for entry in manifest(out)]
        write(out / "manifest.jsonl", *entries)
        assert read_carried(out / "x.png").record["request"]["prompt"] == prompt
    assert made == [1, 1, 1, 0]


def test_a_failure_does_not_make_a_file_foreign(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, out = write(tmp_path / "j.jsonl", job(name="x")), tmp_path / "out"
    assert studio(jobs, "--out", out) == 0
    save_png(out / "x.png", Image.new("RGB", (4, 4)), {"request": {}}, "")  # as versions without the mark wrote it

    def fails(*_: Any) -> Any:
        raise NumericsError("NaN")

    with monkeypatch.context() as patched:
        patched.setattr(GenerateJob, "run", fails)
        assert studio(jobs, "--out", out, "--again") == 1
    assert studio(write(jobs, job("a dog", name="x")), "--out", out) == 0


def test_a_torn_manifest_and_halves_of_files_are_cleaned_up(job: Any, tmp_path: Path) -> None:
    jobs, out = write(tmp_path / "j.jsonl", job(name="cat"), job("a dog", name="dog")), tmp_path / "out"
    assert studio(jobs, "--out", out) == 0
    first, second = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text(first + second[:40])
    (out / ".dog.png.123.new").write_bytes(b"half")
    assert studio(jobs, "--out", out) == 0
    assert [entry["name"] for entry in manifest(out)] == ["cat", "dog"]
    assert not list(out.glob(".*.new"))


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = Manifest(tmp_path)
    with pytest.raises(FileError, match="another 'studio render' is at work"):
        Manifest(tmp_path)
    first.close()
    Manifest(tmp_path).close()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on(job: Any, tmp_path: Path, how: signal.Signals, code: int) -> None:
    lines = [job(f"a cat {index}", name=f"p{index}", steps=2 if index < 2 else 400) for index in range(4)]
    jobs, out = write(tmp_path / "j.jsonl", *lines), tmp_path / "out"
    command = [sys.executable, "-m", "ui.cli", "render", str(jobs), "--out", str(out)]
    # A shell's background job ignores Ctrl-C and so would its children: the run starts with the usual handling.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listening) as process:
        deadline = time.monotonic() + 240
        while not (out / "p1.png").exists() or len(manifest(out)) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(how)
        told = process.stderr.read() if process.stderr else ""
    assert process.returncode == code
    done = [entry["name"] for entry in manifest(out)]
    assert done[:2] == ["p0", "p1"]
    assert len(done) < 4
    if how is signal.SIGINT:
        assert "the same command goes on" in told
    kept = {name: (out / name).stat().st_mtime_ns for name in ("p0.png", "p1.png")}
    # Short ones in their place, so that the test ends soon; the first two are not made again.
    write(jobs, *lines[:2], *[{**line, "steps": 2} for line in lines[2:]])
    assert studio(jobs, "--out", out) == 0
    assert pictures(out) == [f"p{index}.png" for index in range(4)]
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
