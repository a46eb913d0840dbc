from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from studio.embeddings import load_embedding, load_embeddings
from studio.errors import (
    DamagedFileError,
    FileLimitError,
    LoraShapeError,
    LoraValuesError,
    PickleRefusedError,
    RequestError,
    UnknownFormatError,
    UnknownNameError,
)


def write(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def test_layouts_of_others(tmp_path: Path) -> None:
    one = load_embedding(write(tmp_path / "bad-hands.safetensors", emb_params=torch.ones(3, 8).half()))
    assert (one.name, one.calls, one.tokens) == ("bad-hands", ("bad-hands",), 3)
    assert one.vectors["text_encoder"].dtype == torch.float32
    assert len(one.sha256) == 64
    both = load_embedding(write(tmp_path / "xl.safetensors", clip_l=torch.ones(2, 8), clip_g=torch.ones(2, 12)))
    assert {name: tuple(rows.shape) for name, rows in both.vectors.items()} == {
        "text_encoder": (2, 8),
        "text_encoder_2": (2, 12),
    }
    token = load_embedding(write(tmp_path / "toy.safetensors", **{"<cat-toy>": torch.ones(8)}))
    assert (token.calls, token.tokens) == (("toy", "<cat-toy>"), 1)


@pytest.mark.parametrize(
    ("tensors", "error", "reason"),
    [
        ({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, UnknownFormatError, "is a LoRA, not an embedding"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, UnknownFormatError, "the tensors 'a', 'b'"),
        ({"emb_params": torch.ones(2, 2).long()}, UnknownFormatError, "no numbers"),
        ({"emb_params": torch.ones(2, 2, 2)}, LoraShapeError, r"not of shape \(2, 2, 2\)"),
        ({"emb_params": torch.full((2, 2), torch.nan)}, LoraValuesError, "NaN"),
        ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(3, 8)}, LoraShapeError, "different numbers of vectors"),
        ({"emb_params": torch.ones(2**21, 8)}, FileLimitError, "more than the 0.1 GiB an embedding file may have"),
    ],
)
def test_other_files_are_refused_with_a_reason(
    tmp_path: Path, tensors: dict[str, torch.Tensor], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        load_embedding(write(tmp_path / "x.safetensors", **tensors))


def test_pickles_and_damage_are_refused(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}}, tmp_path / "x.pt")
    with pytest.raises(PickleRefusedError, match=r"x\.pt is a pickle"):
        load_embedding(tmp_path / "x.pt")
    (tmp_path / "y.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    with pytest.raises(DamagedFileError):
        load_embedding(tmp_path / "y.safetensors")
    with pytest.raises(UnknownNameError, match=r"unknown embedding .*known: y\.safetensors"):
        load_embedding(tmp_path / "z.safetensors")


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [write(folder / "x.safetensors", emb_params=torch.ones(1, 8)) for folder in (tmp_path, tmp_path / "b")]
    with pytest.raises(RequestError, match="two embeddings are called 'x'"):
        load_embeddings(tuple(str(path) for path in paths))
