"""Pictures again when the base was renamed: single-file checkpoints and diffusers folders are found by their hash."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import studio.checkpoint
from pipelines import generate, rerun
from studio.base import forget_bases
from studio.errors import UnknownNameError
from tests.studio.original_layout import narrow_configs, random_models, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A narrow checkpoint of SD 1.x, and configurations that fit it."""
    folder = narrow_configs(tmp_path_factory.mktemp("configs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio.checkpoint, "configs", lambda: folder)
        yield write_checkpoint(tmp_path_factory.mktemp("models") / "mine.safetensors", random_models(folder, "sd15"))
    forget_bases()


@pytest.fixture
def models(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoint and another one."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(checkpoint, folder)
    tensors = load_file(checkpoint)
    tensors["first_stage_model.decoder.conv_out.bias"] += 1
    save_file(tensors, folder / "other.safetensors")
    return folder


def made(base: str, folder: Path) -> Path:
    (path,) = generate("a fox", base=base, steps=1, size=(64, 64), seed=7, device="cpu").save(folder / "x.png")
    return path


def same(path: Path, image: Image.Image) -> bool:
    return np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


@pytest.mark.parametrize("by_name", [True, False])
def test_a_renamed_checkpoint_is_found_by_its_hash(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    if by_name:
        monkeypatch.setenv("STUDIO_MODEL_PATH", str(models))
    name = "mine" if by_name else str(models / "mine.safetensors")
    picture = made(name, tmp_path)
    assert rerun(picture, device="cpu").notes == []
    (models / "mine.safetensors").rename(models / "renamed.safetensors")
    said = f"the base '{name}' is 'renamed.safetensors' now: found by its hash"
    again = rerun(picture, device="cpu")
    assert again.notes == [said]
    assert same(picture, again.images[0])
    # Another checkpoint has taken its name meanwhile.
    (models / "other.safetensors").rename(models / "mine.safetensors")
    again = rerun(picture, device="cpu")
    assert again.notes == [said]
    assert same(picture, again.images[0])


def test_a_checkpoint_that_is_nowhere_is_one_sentence(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_MODEL_PATH", str(models))
    picture = made("mine", tmp_path)
    (models / "mine.safetensors").unlink()
    with pytest.raises(UnknownNameError, match="unknown base 'mine'"):
        rerun(picture, device="cpu")
    again = rerun(picture, device="cpu", base="other")
    assert any("has other weights than when x.png was made" in note for note in again.notes)


def test_a_renamed_folder_is_found_by_its_hash(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_MODEL_PATH", str(tmp_path / "models"))
    shutil.copytree(tiny_base, tmp_path / "models" / "mine")
    picture = made("mine", tmp_path)
    (tmp_path / "models" / "mine").rename(tmp_path / "models" / "renamed")
    again = rerun(picture, device="cpu")
    assert again.notes == ["the base 'mine' is 'renamed' now: found by its hash"]
    assert same(picture, again.images[0])


def test_an_a1111_text_names_its_checkpoint_by_hash(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.hashes import sha256_of

    monkeypatch.setenv("STUDIO_MODEL_PATH", str(models))
    digest = sha256_of([models / "mine.safetensors"])[0][:10]
    text = tmp_path / "theirs.txt"
    told = "a fox\nSteps: 1, Sampler: Euler, CFG scale: 7, Seed: 7, Size: 64x64, Model hash: {}, Model: {}"
    text.write_text(told.format(digest, "theirName_v12"))
    result = rerun(text, device="cpu")
    assert "the base 'theirName_v12' is 'mine.safetensors' here: found by its hash" in result.notes
    assert result.sidecars[0]["base"]["sha256"].startswith(digest)
    assert np.asarray(result.images[0]).std() > 0
    # A checkpoint of that name is here, but its contents are under another one; or nowhere.
    text.write_text(told.format(digest, "other"))
    result = rerun(text, device="cpu")
    assert "the base 'other' is 'mine.safetensors' here: found by its hash" in result.notes
    assert result.sidecars[0]["base"]["sha256"].startswith(digest)
    said = "the base 'other' has other contents than when theirs.txt was made: the picture differs"
    text.write_text(told.format("0123456789", "other"))
    assert said in rerun(text, device="cpu").notes
    text.write_text(told.format("01234567", "other"))  # as A1111 told it before 2023, by another hash
    assert said not in rerun(text, device="cpu").notes
