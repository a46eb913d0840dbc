from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from studio.embeddings import carried_embeddings, load_embedding, load_embeddings, token_tensors
from studio.errors import (
    DamagedFileError,
    FileLimitError,
    LoraFileError,
    LoraShapeError,
    LoraValuesError,
    PickleRefusedError,
    RequestError,
    UnknownFormatError,
    UnknownNameError,
)
from studio.lora.convert import lora_from_state_dict
from studio.lora.files import load_lora, read_header
from studio.lora.model import Lora, LoraDelta
from studio.lora.resize import resize
from studio.lora.write import save_lora

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
DELTA = LoraDelta(torch.ones(2, 8), torch.ones(8, 2), 2.0)


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


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_words_lie_in_the_lora_s_file(tmp_path: Path, layout: str) -> None:
    tokens = {"zqx": {"text_encoder": some(7, 2, 8)}, "old cat": {"text_encoder": some(1, 8), "text_encoder_2": some(1, 12)}}
    path = save_lora(tmp_path / "x.safetensors", Lora({LAYER: DELTA}, tokens=tokens), layout)  # type: ignore[arg-type]
    found = load_lora(path)
    assert list(found.layers) == [LAYER]
    assert {word: sorted(vectors) for word, vectors in found.tokens.items()} == {
        "zqx": ["text_encoder"],
        "old cat": ["text_encoder", "text_encoder_2"],
    }
    assert torch.equal(found.tokens["zqx"]["text_encoder"], tokens["zqx"]["text_encoder"])
    assert read_header(path).tokens == ("zqx", "old cat")
    first, second = carried_embeddings("x", found)
    assert (first.calls, first.tokens, first.layers, first.sha256) == (("zqx",), 2, 7, found.sha256)
    assert (second.calls, second.tokens, second.layers) == (("old cat",), 1, 0)


def test_a_file_of_words_alone_and_a_plain_lora(tmp_path: Path) -> None:
    path = save_lora(
        tmp_path / "w.safetensors", Lora({}, {"studio.family": "embedded"}, tokens={"zqx": {"text_encoder": some(1, 8)}})
    )
    header = read_header(path)
    assert (header.layers, header.rank, header.tokens, header.family) == ({}, 0, ("zqx",), "embedded")
    assert load_lora(path).tokens["zqx"]["text_encoder"].shape == (1, 8)
    plain = save_lora(tmp_path / "p.safetensors", Lora({LAYER: DELTA}))
    assert (load_lora(plain).tokens, read_header(plain).tokens) == ({}, ())
    with pytest.raises(LoraFileError, match="has no layers"):
        save_lora(tmp_path / "n.safetensors", Lora({}))


def test_words_outlive_what_is_done_to_the_layers() -> None:
    lora = Lora({LAYER: DELTA}, tokens={"zqx": {"text_encoder": some(1, 8)}})
    assert resize(lora, rank=1).lora.tokens == lora.tokens
    tensors, metadata = token_tensors(lora.tokens)
    state = {f"{LAYER}.lora_A.weight": DELTA.down, f"{LAYER}.lora_B.weight": DELTA.up, **tensors}
    assert list(lora_from_state_dict(state, name="x", metadata=metadata).tokens) == ["zqx"]


@pytest.mark.parametrize(
    ("changes", "metadata", "error", "reason"),
    [
        ({}, {}, UnknownFormatError, "does not say which words"),
        ({}, {"studio.tokens": "zqx"}, UnknownFormatError, "does not say which words"),
        ({}, {"studio.tokens": '["zqx", "abc"]'}, UnknownFormatError, "does not say which words"),
        ({"text_encoder": some(1, 1, 1, 8)}, {"studio.tokens": '["zqx"]'}, LoraShapeError, "not that of learnt tokens"),
        ({"text_encoder_2": some(2, 8)}, {"studio.tokens": '["zqx"]'}, LoraShapeError, "different numbers of vectors"),
        ({"text_encoder": torch.full((1, 8), torch.nan)}, {"studio.tokens": '["zqx"]'}, LoraValuesError, "NaN"),
        ({"text_encoder": torch.ones(1, 8).long()}, {"studio.tokens": '["zqx"]'}, UnknownFormatError, "I64 numbers"),
    ],
)
def test_words_that_are_not_understood_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor], metadata: dict[str, str], error: type[Exception], reason: str
) -> None:
    vectors = {"text_encoder": some(1, 8)} | changes
    tensors = {f"lora_tokens.0.{encoder}": rows for encoder, rows in vectors.items()}
    tensors |= {f"{LAYER}.lora_A.weight": DELTA.down, f"{LAYER}.lora_B.weight": DELTA.up}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(error, match=reason):
        load_lora(tmp_path / "x.safetensors")
