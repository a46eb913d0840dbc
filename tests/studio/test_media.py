from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from studio.base import Base
from studio.errors import FileError, NumericsError, RequestError
from studio.hashes import auto_v3
from studio.media import decode, encode, images_to_media, media_to_images, open_picture, read_carried, save_png


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8))


def test_media_tensors_round_trip() -> None:
    images = [picture(0), picture(1)]
    media = images_to_media(images)
    assert media.shape == (2, 1, 3, 32, 48)
    assert [np.array_equal(a, b) for a, b in zip(images, media_to_images(media), strict=True)] == [True, True]


def test_png_carries_request_and_parameters(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    told = {"request": {"prompt": "ein Bär, 熊"}}
    save_png(path, picture(), told, "prompt\nSteps: 1")
    assert read_carried(path).record == told
    assert read_carried(path).parameters == "prompt\nSteps: 1"
    with Image.open(path) as image:
        assert image.text["parameters"] == "prompt\nSteps: 1"
        assert np.array_equal(np.asarray(image), np.asarray(picture()))
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_other_files_carry_no_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"written as \.png"):
        save_png(tmp_path / "a.jpg", picture(), {}, "")
    plain = tmp_path / "plain.png"
    picture().save(plain)
    with pytest.raises(FileError, match="carries nothing of how it was made"):
        read_carried(plain)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FileError, match="cannot read the picture"):
        read_carried(tmp_path / "text.png")
    with pytest.raises(FileError, match="cannot read the picture"):
        read_carried(tmp_path / "absent.png")


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        save_png(tmp_path / "file" / "a.png", picture(), {}, "")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_decode_is_the_same_alone_and_in_a_batch(base: Base) -> None:
    latents = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    together = decode(base.vae, latents)
    assert all(np.array_equal(together[i], decode(base.vae, latents[i : i + 1])[0]) for i in range(3))
    assert together[0].size == (32, 32)
    assert encode(base.vae, together).shape == latents.shape


def test_nan_latents_are_refused(base: Base) -> None:
    with pytest.raises(NumericsError, match="VAE produced NaN"):
        decode(base.vae, torch.full((1, 8, 8, 8), torch.nan))


def test_auto_v3_skips_the_header(tmp_path: Path) -> None:
    weights = {"a": torch.arange(4.0)}
    save_file(weights, tmp_path / "a.safetensors", {"note": "one"})
    save_file(weights, tmp_path / "b.safetensors", {"note": "another, longer"})
    expected = hashlib.sha256(np.arange(4, dtype=np.float32).tobytes()).hexdigest()[:12]
    assert auto_v3(tmp_path / "a.safetensors") == auto_v3(tmp_path / "b.safetensors") == expected


def test_texts_of_other_programs(tmp_path: Path) -> None:
    comment = b"UNICODE\0" + "ein Bär\nSteps: 3".encode("utf-16-be")
    for name in ("a.jpg", "a.webp"):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        picture().save(tmp_path / name, exif=exif)
        assert read_carried(tmp_path / name).parameters == "ein Bär\nSteps: 3"
    (tmp_path / "a.txt").write_text("a cat\nSteps: 1", "utf-8")
    assert read_carried(tmp_path / "a.txt").parameters == "a cat\nSteps: 1"
    texts = PngInfo()
    texts.add_text("workflow", "{}")
    picture().save(tmp_path / "c.png", pnginfo=texts)
    with pytest.raises(FileError, match="a ComfyUI workflow, which is not read here"):
        read_carried(tmp_path / "c.png")
    with pytest.raises(FileError, match="cannot read"):
        read_carried(tmp_path / "b.txt")


def test_sixteen_bits_of_gray_are_scaled_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(open_picture(tmp_path / "x.png"))[0, 0].tolist() == [128, 128, 128]


def test_a_picture_that_is_a_bomb_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    for reader in (read_carried, open_picture):
        with pytest.raises(FileError, match="cannot read the picture"):
            reader(tmp_path / "x.png")


@pytest.mark.parametrize("text", ["{", "[]", '{"request": 1}', "[" * 200_000], ids=["cut", "list", "number", "deep"])
def test_damaged_records_are_one_sentence(tmp_path: Path, text: str) -> None:
    texts = PngInfo()
    texts.add_text("studio", text)
    picture().save(tmp_path / "x.png", pnginfo=texts)
    with pytest.raises(FileError, match=r"the request in .* is damaged"):
        read_carried(tmp_path / "x.png")
