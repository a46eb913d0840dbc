"""Likeness by the base's features and by a vision model from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.likeness import (
    BaseEncoder,
    FolderEncoder,
    Likeness,
    Standard,
    counted_rows,
    cut,
    left_out,
    middle_mean,
    outputs_of,
)
from studio.base import Base, load_base
from studio.errors import FileError, RequestError, UnsafeFileError


def noise(seed: int, size: tuple[int, int] = (20, 28)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Plain:
    """Features given by the first pixel."""

    name, mark = "plain", "plain"

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.tensor([[float(v) for v in picture.getpixel((0, 0))] for picture in pictures])  # type: ignore[union-attr]


def colour(*rgb: int) -> Image.Image:
    return Image.new("RGB", (4, 4), rgb)


def test_a_picture_is_like_itself_and_likeness_goes_both_ways(base: Base) -> None:
    encoder = BaseEncoder(base, noises=2)
    raw = encoder([noise(seed) for seed in range(4)])
    vectors = Standard.of([raw[:2], raw[2:]])(raw)
    similar = vectors @ vectors.T
    assert torch.allclose(similar.diagonal(), torch.ones(4), atol=1e-5)
    assert torch.allclose(similar, similar.T, atol=1e-6)
    assert float(similar[0, 1]) < 0.999
    assert torch.equal(encoder([noise(3)]), encoder([noise(3)])), "its noise is fixed"


def test_likeness_is_the_mean_cosine_of_standardised_features() -> None:
    known = {"red": [colour(200, 0, 0), colour(240, 20, 0)], "green": [colour(0, 200, 0), colour(0, 220, 40)]}
    likeness = Likeness.of(Plain(), known)
    raw = {name: Plain()(pictures) for name, pictures in known.items()}
    every = torch.cat(list(raw.values())).numpy()
    centre = (raw["red"].mean(0).numpy() + raw["green"].mean(0).numpy()) / 2
    spread = np.maximum(every.std(0), every.std(0).mean() / 10)
    query = (np.array([220.0, 10.0, 0.0]) - centre) / spread
    ones = (raw["green"].numpy() - centre) / spread
    by_hand = np.mean(ones @ query / np.linalg.norm(ones, axis=1) / np.linalg.norm(query))
    told = likeness(colour(220, 10, 0))
    assert told["green"] == pytest.approx(by_hand, abs=1e-5)
    assert told["red"] > 0 > told["green"]
    assert likeness.told_apart() == 1
    assert len(likeness.left_out()) == 4


def test_mixed_references_are_not_told_apart() -> None:
    known = {"one": [colour(200, 0, 0), colour(0, 200, 0)], "two": [colour(210, 0, 0), colour(0, 210, 0)]}
    assert Likeness.of(Plain(), known).told_apart() == 0


def test_left_out_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert left_out(vectors) == pytest.approx([0.5, 0.0, 0.5])
    assert left_out(vectors[:1]) == []


def test_features_that_never_vary_do_not_decide() -> None:
    standard = Standard.of([torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[4.0, 1.0], [6.0, 1.0]])])
    assert float(standard.spread[1]) == pytest.approx(float(standard.spread.mean()) / 10, rel=0.2)
    assert torch.equal(Standard.of([torch.ones(2, 3)])(torch.ones(1, 3)), torch.zeros(1, 3))


def test_the_middle_counts_most() -> None:
    features = torch.zeros(2, 1, 3, 3)
    features[:, :, 1, 1] = 1
    corner = torch.zeros(2, 1, 3, 3)
    corner[:, :, 0, 0] = 1
    total = 1 + 4 * np.exp(-2) + 4 * np.exp(-4)
    assert float(middle_mean(features)) == pytest.approx(1 / total)
    assert float(middle_mean(corner)) == pytest.approx(np.exp(-4) / total)
    assert torch.allclose(middle_mean(torch.ones(1, 5, 1, 7)), torch.ones(5))


def test_hooks_are_gone_whatever_happens(base: Base) -> None:
    block = base.unet.up_blocks[0]
    before = len(block._forward_hooks), len(base.unet._forward_pre_hooks)

    def cancelled() -> None:
        with outputs_of(block), counted_rows(base.unet):
            assert (len(block._forward_hooks), len(base.unet._forward_pre_hooks)) == (before[0] + 1, before[1] + 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert (len(block._forward_hooks), len(base.unet._forward_pre_hooks)) == before


def test_it_works_for_sdxl(tiny_sdxl: Path) -> None:
    base = load_base(tiny_sdxl, device="cpu")
    encoder = BaseEncoder(replace(base, family=replace(base.family, size=(64, 64))), noises=1)
    one, other = encoder([noise(1), noise(2)])
    assert torch.isfinite(one).all()
    assert not torch.equal(one, other)
    assert encoder.block == 1


def test_cut_takes_the_box() -> None:
    picture = Image.new("RGB", (10, 20), "white")
    picture.paste((255, 0, 0), (5, 10, 10, 20))
    assert cut(picture, (0.5, 0.5, 1, 1)).getcolors() == [(50, (255, 0, 0))]
    assert cut(picture, (0, 0, 0.01, 0.01)).size == (1, 1)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers") / "clip"
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
        )
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, '
        '"crop_size": {"height": 16, "width": 16}}'
    )
    return folder


def test_a_vision_model_of_a_folder(tower: Path) -> None:
    from transformers import CLIPVisionModel

    encoder = FolderEncoder(tower)
    pictures = [noise(1), noise(2, (40, 20))]
    told = encoder(pictures)
    pixels = encoder.processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        stock = CLIPVisionModel.from_pretrained(tower)(pixels).pooler_output
    assert torch.allclose(told, stock, atol=1e-6)
    assert "CLIPVisionModel" in encoder.name


def test_folders_that_are_no_vision_model(tower: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="neither 'base' nor a folder"):
        FolderEncoder(tmp_path / "none")
    with pytest.raises(FileError, match=r"has no config\.json"):
        FolderEncoder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsafeFileError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        FolderEncoder(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((tower / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileError, match="cannot load the encoder"):
        FolderEncoder(tmp_path)
