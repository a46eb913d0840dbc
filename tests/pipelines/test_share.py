from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines import generate
from pipelines.share import share
from studio.errors import FileError, RequestError, UnknownNameError
from studio.hashes import auto_v3
from studio.lora.files import load_lora
from studio.lora.model import Lora
from studio.lora.write import save_lora

MakeLora = Callable[..., Lora]


@pytest.fixture
def cat(make_lora: MakeLora, tmp_path: Path) -> Path:
    metadata = {"studio.trigger": "sks", "studio.class_word": "cat", "studio.family": "embedded"}
    return save_lora(tmp_path / "loras" / "my cat.safetensors", make_lora(1, "attn1 attn2"), metadata=metadata)


def unpacked(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def test_the_archive_holds_all_that_others_need(cat: Path, tiny_base: Path, tmp_path: Path) -> None:
    result = share("my cat", tmp_path / "out.zip", base=str(tiny_base), lora_dirs=[cat.parent], seed=3)
    assert result.notes == ()
    folder = unpacked(result.path, tmp_path / "unpacked")
    assert {file.name for file in folder.iterdir()} == {"my cat.safetensors", "my cat.png", "my cat.json", "README.md"}
    assert (folder / "my cat.safetensors").read_bytes() == cat.read_bytes()
    assert load_lora(folder / "my cat.safetensors").trigger == "sks"
    with Image.open(folder / "my cat.png") as picture:
        assert set(picture.text) == {"parameters"}
        assert picture.text["parameters"].startswith("sks cat <lora:my cat:1>\n")
        expected = generate("sks cat", base=str(tiny_base), loras=[str(cat)], seed=3).images[0]
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert json.loads((folder / "my cat.json").read_text())["activation text"] == "sks"
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["instance_prompt"] == "sks"
    assert auto_v3(cat) in text
    assert not [file for file in folder.iterdir() if str(tmp_path).encode() in file.read_bytes()], "a path of this machine"


def test_the_same_parts_make_the_same_archive(cat: Path, tiny_base: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "red.jpg")
    for name in ("a.zip", "b.zip"):
        share(str(cat), tmp_path / name, preview=tmp_path / "red.jpg")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with Image.open(unpacked(tmp_path / "a.zip", tmp_path / "x") / "my cat.png") as picture:
        assert picture.size == (1024, 512)


def test_a_strangers_words_are_no_markup(make_lora: MakeLora, tmp_path: Path) -> None:
    nasty = "`<script>x</script>` ](http://x) | --- \"'\n# head"
    source = save_lora(tmp_path / "x.safetensors", make_lora(1, "attn1"), metadata={"studio.trigger": nasty})
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    folder = unpacked(share(str(source), tmp_path / "x.zip", preview=tmp_path / "p.png").path, tmp_path / "x")
    lines = (folder / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# x", "## Use"]
    assert isinstance(yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)])), dict)
    for line in lines[lines.index("---", 1) :]:
        if "script" in line:
            assert line.startswith(("    ", "| trigger | `")) and line.count("`") in (0, 2), line


def test_mistakes_are_one_sentence(make_lora: MakeLora, cat: Path, tmp_path: Path) -> None:
    silent = save_lora(tmp_path / "silent.safetensors", make_lora(1, "attn1"))
    with pytest.raises(RequestError, match="'silent' names no trigger to draw a preview with: give --prompt or --preview"):
        share(str(silent), tmp_path / "x.zip")
    with pytest.raises(RequestError, match=r"as a \.zip file, not as 'x\.tar'"):
        share(str(cat), tmp_path / "x.tar")
    with pytest.raises(UnknownNameError):
        share("nothing", tmp_path / "x.zip")
    with pytest.raises(FileError, match="cannot read the picture"):
        share(str(cat), tmp_path / "x.zip", preview=cat)
    assert not (tmp_path / "x.zip").exists()
