"""A LoRA by name, and a mixed folder at a glance."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from studio.errors import FileError, PickleRefusedError, RequestError, UnknownNameError
from studio.lora.files import load_lora
from studio.lora.library import find_lora, list_loras, search_folders
from studio.lora.model import Lora, LoraDelta
from studio.lora.survey import survey
from studio.lora.write import save_lora
from tests.studio.lora_dumps import kohya, motion


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with one shipped LoRA."""
    monkeypatch.setattr("studio.lora.library.assets", lambda: tmp_path / "assets")
    monkeypatch.delenv("STUDIO_LORA_PATH", raising=False)
    return touch(tmp_path / "assets/loras/fox.safetensors")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_folders_are_searched_in_order(tmp_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, first, second = (touch(tmp_path / name / "fox.safetensors") for name in ("mine", "first", "second"))
    assert find_lora("fox") == shipped
    monkeypatch.setenv("STUDIO_LORA_PATH", os.pathsep.join(map(str, (first.parent, second.parent))))
    assert find_lora("fox") == first
    assert find_lora("fox", [mine.parent]) == mine
    assert search_folders([mine.parent]) == (mine.parent, first.parent, second.parent, shipped.parent)


@pytest.mark.parametrize("name", ["ink", "ink.safetensors", "style/ink", "style/ink.safetensors", "INK", " ink "])
def test_a_name_may_be_written_in_several_ways(name: str, tmp_path: Path) -> None:
    file = touch(tmp_path / "mine/style/ink.safetensors")
    assert find_lora(name, [tmp_path / "mine"]) == file


def test_an_exact_name_wins_over_its_capitals(tmp_path: Path) -> None:
    lower, upper = touch(tmp_path / "mine/ink.safetensors"), touch(tmp_path / "mine/INK.safetensors")
    assert (find_lora("ink", [tmp_path / "mine"]), find_lora("INK", [tmp_path / "mine"])) == (lower, upper)


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = touch(tmp_path / "else.where/v1.5.safetensors")
    monkeypatch.chdir(tmp_path)
    for text in (file, str(file), "else.where/v1.5.safetensors", "else.where/v1.5"):
        assert find_lora(text).resolve() == file


def test_a_folder_saved_by_peft_is_one_lora(tmp_path: Path) -> None:
    file = touch(tmp_path / "adapter/adapter_model.safetensors")
    assert find_lora(tmp_path / "adapter") == file


def test_an_unknown_name_offers_near_ones_and_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown LoRA 'foxx': did you mean 'fox'\? \(searched .*assets/loras\)"):
        find_lora("foxx")


def test_a_pickle_is_found_by_name_and_refused_with_its_reason(tmp_path: Path) -> None:
    torch.save({}, touch(tmp_path / "mine/old.pt"))
    with pytest.raises(PickleRefusedError):
        load_lora(find_lora("old.pt", [tmp_path / "mine"]))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "style/../../secret"])
def test_requests_from_the_network_choose_by_name_only(name: str, tmp_path: Path) -> None:
    touch(tmp_path / "secret.safetensors")
    with pytest.raises((RequestError, UnknownNameError)):
        find_lora(name, [tmp_path / "assets/loras"], names_only=True)
    with pytest.raises(UnknownNameError):
        find_lora(str(Path("secret")), names_only=True)
    assert find_lora("fox", names_only=True)


def test_links_out_of_a_folder_pipes_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    secret = touch(tmp_path / "secret.safetensors")
    folder = tmp_path / "mine"
    touch(folder / ".hidden.safetensors")
    touch(folder / ".cache/x.safetensors")
    (folder / "link.safetensors").symlink_to(secret)
    os.mkfifo(folder / "pipe.safetensors")
    assert set(list_loras([folder])) == {"fox"}


def test_links_in_a_circle_are_no_crash(tmp_path: Path) -> None:
    circle = tmp_path / "mine" / "circle.safetensors"
    circle.parent.mkdir()
    circle.symlink_to(circle)
    assert set(list_loras([circle.parent])) == {"circle", "fox"}
    (row,) = survey(circle.parent)
    assert "symbolic links" in row.verdict


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_no_name_is_no_request(name: str) -> None:
    with pytest.raises(RequestError, match="needs a name"):
        find_lora(name)


def test_a_mixed_folder_at_a_glance(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    dump = kohya()
    save_file(
        dump.tensors,
        folder / "fits.safetensors",
        metadata={"ss_network_module": "networks.lora", "modelspec.trigger_phrase": "sks"},
    )
    save_file(motion().tensors, folder / "motion.safetensors")
    torch.save({}, folder / "old.ckpt")
    (folder / "cut.safetensors").write_bytes(b"x")
    k = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    save_lora(folder / "sub/xl.safetensors", Lora({k: LoraDelta(torch.zeros(2, 2048), torch.zeros(640, 2), 2.0)}))
    rows = {row.name: row for row in survey(folder, dump.shapes, family="sd15")}
    assert list(rows) == ["cut.safetensors", "fits.safetensors", "motion.safetensors", "old.ckpt", "sub/xl.safetensors"]
    fits = rows["fits.safetensors"]
    assert (fits.fits, fits.verdict, fits.matched, fits.total) == (True, "fits", 18, 18)
    assert (fits.trainer, fits.ranks, fits.alpha, fits.text_encoder, fits.triggers) == ("sd-scripts", (4,), 2.0, True, ("sks",))
    assert rows["motion.safetensors"].verdict == "is for animatediff-motion, not for sd15"
    assert rows["sub/xl.safetensors"].verdict == "is for sdxl, not for sd15"
    assert (rows["old.ckpt"].fits, rows["old.ckpt"].error) == (False, "PickleRefusedError")
    assert "not a safetensors file" in rows["cut.safetensors"].verdict
    assert {row.fits for row in survey(folder)} == {None}


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        survey(tmp_path / "nothing")
