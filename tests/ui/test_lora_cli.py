"""``studio lora ...`` on tiny files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio.lora.files import load_lora
from studio.lora.model import Lora, LoraDelta
from studio.lora.write import save_lora
from ui import cli, console

QUERY, KEY = (f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k"))


def studio(*arguments: str) -> int:
    return console.run(cli.app, ("lora", *arguments))


def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return json.loads(printed)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    layers = {name: LoraDelta(torch.randn(4, 8), torch.randn(8, 4), 2.0) for name in (QUERY, KEY)}
    metadata = {"studio.trigger": "zqx", "studio.base_sha256": "old", "note": "\x1b[31mred\n" + "x" * 500}
    return save_lora(tmp_path / "cat.safetensors", Lora(layers, metadata), "kohya")


def test_show_tells_what_a_file_is(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studio("show", str(lora), "--json") == 0
    facts = answer(capsys)
    assert (facts["layers"], facts["ranks"], facts["alpha"], facts["triggers"]) == (2, [4], 2.0, ["zqx"])
    assert facts["metadata"]["studio.trigger"] == "zqx"


def test_show_keeps_a_strangers_text_from_the_terminal(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studio("show", str(lora)) == 0
    printed = capsys.readouterr().out
    assert "zqx" in printed
    assert "\x1b" not in printed
    assert "x" * 200 not in printed.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize(("width", "code"), [(8, 0), (16, 6)])
def test_check_counts_layers(
    lora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, code: int
) -> None:
    base = SimpleNamespace(models=dict, name="tiny", sha256="new", family=SimpleNamespace(title="tiny"))
    monkeypatch.setattr("studio.base.load_base", lambda name: base)
    monkeypatch.setattr("studio.lora.files.module_shapes", lambda: {QUERY: (8, 8), KEY: (width, 8)})
    assert studio("check", str(lora), "--json") == code
    found = answer(capsys)
    assert found["matched"] == (2 if code == 0 else 1)
    assert found["wrong_shape"] == ([] if code == 0 else [KEY])
    assert found["same_base_version"] is False
    assert studio("check", str(lora)) == code
    printed = capsys.readouterr().out
    assert f"{found['matched']} of 2 layers matched" in printed
    assert "another version of tiny" in printed


def test_convert_keeps_the_change(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studio("convert", str(lora), str(tmp_path / "new.safetensors"), "--layout", "diffusers", "--json") == 0
    assert answer(capsys)["format"] == "diffusers"
    before, after = (load_lora(path).layers[QUERY] for path in (lora, tmp_path / "new.safetensors"))
    assert isinstance(before, LoraDelta)
    assert isinstance(after, LoraDelta)
    torch.testing.assert_close(after.scale * after.up @ after.down, before.scale * before.up @ before.down)


def test_a_pickle_is_read_only_when_asked(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    pickled, out = tmp_path / "cat.pt", tmp_path / "new.safetensors"
    torch.save(load_file(lora), pickled)
    assert studio("convert", str(pickled), str(out)) == 5
    assert "pickle" in capsys.readouterr().err
    assert not out.exists()
    assert studio("convert", str(pickled), str(out), "--from-pickle") == 0
    assert len(load_lora(out).layers) == 2


def test_resize_lowers_the_rank_and_says_what_is_kept(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studio("resize", str(lora), str(tmp_path / "small.safetensors"), "--rank", "2", "--json") == 0
    facts = answer(capsys)
    assert facts["ranks"] == [2]
    assert 0 < facts["least_kept"] < 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("show", "no-such-lora"), 3),
        (("convert", "{lora}", "{folder}/x.safetensors", "--layout", "other"), 2),
        (("convert", "{lora}", "{folder}/x.bin"), 2),
        (("resize", "{lora}", "{folder}/x.safetensors"), 2),
        (("resize", "{lora}", "{folder}/x.safetensors", "--rank", "0"), 2),
    ],
)
def test_mistakes_have_codes(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int
) -> None:
    assert studio(*(a.format(lora=lora, folder=tmp_path) for a in arguments)) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


@pytest.fixture
def folder(lora: Path, base: Any, make_lora: Any) -> Path:
    """LoRAs for the tiny base, for another one, a damaged file and a pickle."""
    save_lora(lora.parent / "sub" / "good.safetensors", make_lora(1, "attn1 text_encoder", trigger="sks \x1b[2J cat"))
    (lora.parent / "cut.safetensors").write_bytes(lora.read_bytes()[:-9])
    torch.save({"x": torch.ones(1)}, lora.parent / "old.pt")
    return lora.parent


def test_check_makes_one_table_of_a_folder(
    folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert studio("check", str(folder), "--base", str(tiny_base), "--json") == 0
    found = answer(capsys)
    assert (found["files"], found["fit"], found["base"]) == (4, 1, "tiny")
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["sub/good.safetensors"]["fits"]
    assert rows["sub/good.safetensors"]["text_encoder"]
    assert rows["cat.safetensors"]["verdict"].startswith("does not fit: 0 of 2")
    assert rows["cut.safetensors"]["error"] == "DamagedFileError"
    assert rows["old.pt"]["error"] == "PickleRefusedError"
    monkeypatch.setenv("COLUMNS", "200")
    assert studio("check", str(folder), "--base", str(tiny_base)) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out
    (line,) = (line for line in printed.out.splitlines() if "sub/good" in line)
    assert "fits" in line and "studio" in line and "sks" in line
    assert "1 of 4 LoRA files" in printed.err


def test_names_are_looked_for_in_lora_dir(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studio("show", "cat") == 3
    assert studio("show", "cat", "--lora-dir", str(lora.parent), "--json") == 0
    assert answer(capsys)["file"] == str(lora)


def test_share_packs_a_lora(folder: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.zip"
    code = studio(
        "share", "good", "--lora-dir", str(folder), "--base", str(tiny_base), "--prompt", "a cat", "-o", str(out), "--json"
    )
    assert code == 0
    found = answer(capsys)
    assert found["file"] == str(out)
    assert set(found["holds"]) == {"good.safetensors", "good.png", "good.json", "README.md"}
    assert out.is_file()
