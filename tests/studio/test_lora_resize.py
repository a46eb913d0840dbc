"""Resizing keeps the best part of a change; converting pickles runs nothing."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from studio.errors import FileError, FileLimitError, LoraShapeError, PickleRefusedError, RequestError, UnknownFormatError
from studio.lora.convert import convert_pickle
from studio.lora.dense import dense
from studio.lora.files import load_lora, read_header
from studio.lora.header import Limits
from studio.lora.model import DoraDelta, LohaDelta, Lora, LoraDelta
from studio.lora.resize import resize
from tests.studio.lora_dumps import kohya, motion

LAYER = "unet.mid_block.attentions.0.proj_in"


def one(shape: tuple[int, ...], rank: int, alpha: float = 3.0) -> LoraDelta:
    out, into, *kernel = shape
    return LoraDelta(torch.randn(rank, into, *kernel), torch.randn(out, rank, *(1 for _ in kernel)), alpha)


def shortened(delta: LoraDelta | LohaDelta | DoraDelta, rank: int, keep: float | None = None) -> tuple[LoraDelta, float]:
    result = resize(Lora({LAYER: delta}), rank=rank, keep=keep)
    short = result.lora.layers[LAYER]
    assert isinstance(short, LoraDelta)
    return short, result.kept[LAYER]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (10, 6, 3, 3), (8, 8, 1, 1)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_result_is_the_best_of_its_rank(shape: tuple[int, ...], rank: int) -> None:
    torch.manual_seed(0)
    delta = one(shape, 5)
    short, kept = shortened(delta, rank)
    full = dense(delta)
    values = torch.linalg.svdvals(full.flatten(1))
    torch.testing.assert_close((dense(short) - full).norm(), values[rank:].norm(), atol=1e-4, rtol=1e-4)
    assert kept == pytest.approx(float((values[:rank] ** 2).sum() / (values**2).sum()), abs=1e-5)
    assert (short.rank, short.scale) == (rank, 1.0)
    assert short.down.shape == (rank, *shape[1:])
    assert short.up.shape == (shape[0], rank, *(1 for _ in shape[2:]))


def test_a_larger_rank_than_needed_is_not_padded() -> None:
    delta = one((12, 20), 2)
    short, kept = shortened(delta, 8)
    torch.testing.assert_close(dense(short), dense(delta), atol=1e-4, rtol=1e-4)
    assert short.rank <= 8
    assert kept == pytest.approx(1)
    assert shortened(delta, 8, keep=1 - 1e-6)[0].rank == 2


def test_a_share_to_keep_chooses_the_rank() -> None:
    delta = LoraDelta(torch.eye(4), torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])), 4.0)
    assert [shortened(delta, 4, keep=share)[0].rank for share in (0.5, 0.75, 0.8, 0.95, 1.0)] == [1, 1, 2, 3, 4]


def test_loha_becomes_lora() -> None:
    delta = LohaDelta(torch.randn(6, 2), torch.randn(2, 9), torch.randn(6, 2), torch.randn(2, 9), 1.0)
    short, kept = shortened(delta, 4)
    torch.testing.assert_close(dense(short), dense(delta), atol=1e-4, rtol=1e-4)
    assert kept == pytest.approx(1)


def test_dora_keeps_its_magnitude() -> None:
    magnitude = torch.rand(12)
    delta = replace(one((12, 20), 2), magnitude=magnitude)
    short, _ = shortened(delta, 2)
    weight = torch.randn(12, 20)
    torch.testing.assert_close(dense(short, weight), dense(delta, weight), atol=1e-4, rtol=1e-4)
    with pytest.raises(LoraShapeError, match="per input channel"):
        shortened(DoraDelta(one((6, 6), 2), torch.rand(6), 1), 1)


def test_a_layer_without_effect_stays_without() -> None:
    short, kept = shortened(LoraDelta(torch.randn(2, 4), torch.zeros(4, 2), 2.0), 2)
    assert dense(short).abs().max() == 0
    assert kept == 1


@pytest.mark.parametrize(("rank", "keep"), [(0, None), (-1, None), (2, 0.0), (2, 1.5)])
def test_ranks_and_shares_out_of_range_are_refused(rank: int, keep: float | None) -> None:
    with pytest.raises(RequestError):
        shortened(one((4, 4), 2), rank, keep)


def test_dora_without_the_weight_says_so() -> None:
    with pytest.raises(LoraShapeError, match="needs the weight"):
        dense(replace(one((4, 4), 2), magnitude=torch.rand(4)))


def test_a_change_of_the_wrong_size_says_so() -> None:
    with pytest.raises(LoraShapeError, match=r"\(4, 4\) does not fit a weight of shape \(8, 2\)"):
        dense(one((4, 4), 2), torch.zeros(8, 2))


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
@pytest.mark.parametrize("old", [True, False])
def test_a_motion_lora_in_a_pickle_is_converted(wrapper: str | None, old: bool, tmp_path: Path) -> None:
    dump = motion("module.")
    content = {"epoch": 3, "global_step": 9, wrapper: dump.tensors} if wrapper else dump.tensors
    torch.save(content, tmp_path / "zoom.ckpt", _use_new_zipfile_serialization=not old)
    written = convert_pickle(tmp_path / "zoom.ckpt", tmp_path / "zoom.safetensors")
    header = read_header(written)
    assert (header.family, header.rank, len(header.layers)) == ("animatediff-motion", 2, 8)
    for module, delta in load_lora(written).layers.items():
        torch.testing.assert_close(dense(delta).double(), dump.expected[module](torch.zeros(())), atol=1e-4, rtol=1e-4)


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    for index, save in enumerate((torch.save, lambda content, file: file.write_bytes(pickle.dumps(content)))):
        file, trace = tmp_path / f"{index}.ckpt", tmp_path / "trace"
        save({**kohya().tensors, "x": Bomb(trace)}, file)
        with pytest.raises(PickleRefusedError, match="cannot be read without running code"):
            convert_pickle(file, tmp_path / "out.safetensors")
        assert not trace.exists()
        assert not (tmp_path / "out.safetensors").exists()


def test_pickles_that_are_no_lora_say_so(tmp_path: Path) -> None:
    file, out = tmp_path / "a.ckpt", tmp_path / "out.safetensors"
    for content in ([1, 2], {"a": 1}, {"weight": torch.zeros(2, 2)}):
        torch.save(content, file)
        with pytest.raises(UnknownFormatError):
            convert_pickle(file, out)
    with pytest.raises(FileError, match="cannot read"):
        convert_pickle(tmp_path / "nothing.ckpt", out)
    file.write_bytes(b"nonsense")
    with pytest.raises(PickleRefusedError):
        convert_pickle(file, out)


def test_caps_hold_for_pickles(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    torch.save(kohya().tensors, file)
    for limits in (Limits(file_bytes=1000), Limits(tensors=3), Limits(rank=3)):
        with pytest.raises(FileLimitError):
            convert_pickle(file, tmp_path / "out.safetensors", limits=limits)
    # A view claims a size that the file does not have.
    torch.save({"lora_unet_conv_in.lora_down.weight": torch.zeros(1).expand(2**20)}, file)
    with pytest.raises(FileLimitError, match="holds"):
        convert_pickle(file, tmp_path / "out.safetensors", limits=Limits(file_bytes=2**20))
