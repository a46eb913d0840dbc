"""Files of strangers: nothing but a sound safetensors file gets past its header."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from studio.errors import (
    DamagedFileError,
    FileError,
    FileLimitError,
    LoraFileError,
    LoraShapeError,
    LoraValuesError,
    PickleRefusedError,
    StudioError,
    UnknownFormatError,
    UnsafeFileError,
    UnsafeMetadataError,
)
from studio.lora.files import load_lora, read_header
from studio.lora.header import Limits, read_raw_header
from tests.studio.lora_dumps import Dump, kohya

NAME = "lora_unet_conv_in"


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def layer(rank: int = 2, **changes: Any) -> dict[str, Any]:
    """The header of one sound layer, 8 in and 8 out; ``changes`` replace parts of its 'up'."""
    size = rank * 8 * 4
    down = {"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, size]}
    up = {"dtype": "F32", "shape": [8, rank], "data_offsets": [size, 2 * size], **changes}
    return {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": down,
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": up,
    }


DATA = bytes(128)
ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def test_the_sound_layer_is_read(path: Path) -> None:
    header = read_header(raw_file(path, layer(), DATA))
    assert (header.rank, header.tensors, header.file_bytes) == (2, 2, path.stat().st_size)


class Bomb:
    """Its unpickling would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.ckpt", "a"])
@pytest.mark.parametrize("kind", [0, 2, 4, 5, "torch", "torch, old", "zip"])
def test_a_pickle_is_refused_whatever_its_name(kind: int | str, name: str, tmp_path: Path) -> None:
    file, trace = tmp_path / name, tmp_path / "trace"
    if isinstance(kind, int):
        file.write_bytes(pickle.dumps({"x": Bomb(trace), "long": "x" * 100}, protocol=kind))
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.pkl", "x" * 600)
    else:
        torch.save({"x": Bomb(trace)}, file, _use_new_zipfile_serialization=kind == "torch")
    for read in (read_header, load_lora):
        with pytest.raises(PickleRefusedError, match=f"{name} is a pickle"):
            read(file)
    assert not trace.exists()


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(path: Path) -> None:
    for length in (0x0280, 0x0480, 0x0580):
        header = json.dumps(layer()).encode().ljust(length)
        assert read_header(raw_file(path, header, DATA)).rank == 2


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"{not json", b"", "damaged"),
        (b"[]", b"", "no safetensors header"),
        (b'{"a":1}', b"", "does not describe tensor 'a'"),
        (b'{"a":' + ONE + b',"a":' + ONE + b"}", b"    ", "twice"),
        (b"{" + b'"a":{' * 100_000, b"", "damaged"),
        (layer(data_offsets=[0, 64]), DATA[:64], "overlap"),
        (layer(data_offsets=[68, 132]), DATA + b"1234", "gap"),
        (layer(data_offsets=[64, 129]), DATA + b"1", "cannot have 65 bytes"),
        (layer(data_offsets=[64, -1]), DATA, "does not describe"),
        (layer(data_offsets=[64, True]), DATA, "does not describe"),
        (layer(data_offsets=[64]), DATA, "does not describe"),
        (layer(shape=[8, -2]), DATA, "does not describe"),
        (layer(shape=[8, 2.0]), DATA, "does not describe"),
        (layer(shape=[1] * 7), DATA, "does not describe"),
        (layer(shape=[2**40, 2**40]), DATA, "cannot have"),
        (layer(), DATA[:-1], "cut short"),
        (layer(), DATA + b"1", "belong to no tensor"),
        ({**layer(), "__metadata__": {"a": 1}}, DATA, "not a table of strings"),
        ({**layer(), "__metadata__": []}, DATA, "not a table of strings"),
        ({**layer(), "__metadata__": {"a": "\ud800"}}, DATA, "characters that are no text"),
        ({**layer(), "__metadata__": {"a\x1b[2J": "b"}}, DATA, "characters that are no text"),
        ({**layer(), "\x1b[2J": layer().popitem()[1]}, DATA, r"'.x1b\[2J' is no name of a tensor"),
        ({**layer(), "\ud800": layer().popitem()[1]}, DATA, "is no name of a tensor"),
        ({**layer(), "x" * 401: layer().popitem()[1]}, DATA, "is no name of a tensor"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused(header: Any, data: bytes, reason: str, path: Path) -> None:
    with pytest.raises(DamagedFileError, match=reason):
        read_header(raw_file(path, header, data))


@pytest.mark.parametrize("content", [b"", b"short", b"<html>not found</html>" * 9, bytes(300)])
def test_what_is_no_safetensors_file_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="not a safetensors file"):
        read_header(path)


def test_caps_hold(path: Path) -> None:
    raw_file(path, layer(), DATA)
    for limits, reason in (
        (Limits(header_bytes=100), "header of"),
        (Limits(file_bytes=200), "GiB"),
        (Limits(tensors=1), "2 tensors"),
        (Limits(rank=1), "rank 2"),
    ):
        with pytest.raises(FileLimitError, match=reason):
            read_header(path, limits=limits)
        with pytest.raises(FileLimitError, match=reason):
            load_lora(path, limits=limits)


def test_a_huge_header_is_refused_before_it_is_read(path: Path) -> None:
    raw_file(path, b"{}", length=2**40)
    with pytest.raises(FileLimitError, match="claims a header"):
        read_header(path)


def test_the_rank_is_capped_at_1024(path: Path) -> None:
    with pytest.raises(FileLimitError, match="rank 1025"):
        read_header(raw_file(path, layer(1025), bytes(2 * 1025 * 32)))


def test_thin_factors_of_a_giant_are_refused(path: Path) -> None:
    """A file of a few megabytes whose product would fill the memory."""
    side = 2**18
    for names in (("lora_down.weight", "lora_up.weight"), ("lokr_w1_b", "lokr_w1_a")):
        parts: dict[str, Any] = {
            f"{NAME}.{names[0]}": {"dtype": "U8", "shape": [1, side], "data_offsets": [0, side]},
            f"{NAME}.{names[1]}": {"dtype": "U8", "shape": [side, 1], "data_offsets": [side, 2 * side]},
        }
        if "lokr" in names[0]:
            parts[f"{NAME}.lokr_w2"] = {"dtype": "U8", "shape": [1, 1], "data_offsets": [2 * side, 2 * side + 1]}
        text = json.dumps(parts).replace('"U8"', '"F8_E4M3"')
        with pytest.raises(FileLimitError, match="larger than any of a known model"):
            load_lora(raw_file(path, text.encode(), bytes(2 * side + len(parts) - 2)))


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(FileError, match="is a pipe"):
        read_header(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(value: float, path: Path) -> None:
    dump = kohya()
    next(iter(dump.tensors.values())).view(-1)[3] = value
    save_file(dump.tensors, path)
    with pytest.raises(LoraValuesError, match="NaN or infinity"):
        load_lora(path)


def test_an_alpha_that_is_no_number_is_refused(path: Path) -> None:
    dump = kohya(alpha=float("nan"))
    save_file(dump.tensors, path)
    with pytest.raises(LoraValuesError, match="alpha of layer"):
        read_header(path)


def test_an_alpha_of_several_numbers_is_refused(path: Path) -> None:
    dump = kohya(alpha=None)
    dump.tensors["lora_unet_conv_in.alpha"] = torch.ones(2)
    save_file(dump.tensors, path)
    with pytest.raises(LoraShapeError, match="alpha that is not one number"):
        read_header(path)


def test_weights_in_whole_numbers_are_refused(path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="I32 numbers"):
        read_header(raw_file(path, layer(dtype="I32"), DATA))
    for odd in ("F4", [], {}, None, 32):
        with pytest.raises(UnknownFormatError, match="number format"):
            read_header(raw_file(path, layer(dtype=odd), DATA))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ss_output_name", "../../.bashrc"),
        ("ss_output_name", "/etc/passwd"),
        ("ss_output_name", "C:\\Windows\\x"),
        ("ss_output_name", "..\\x"),
        ("modelspec.title", "~/x"),
        ("studio.name", "a\0b"),
        ("modelspec.thumbnail", "file:///etc/passwd"),
        ("modelspec.thumbnail", "https://example.org/track.png"),
    ],
)
def test_metadata_that_tries_to_be_a_path_is_refused(key: str, value: str, path: Path) -> None:
    with pytest.raises(UnsafeMetadataError, match=key if "thumbnail" not in key else "outside the file"):
        read_header(raw_file(path, {"__metadata__": {key: value}, **layer()}, DATA))


def test_metadata_of_honest_files_passes(path: Path) -> None:
    honest = {
        "ss_output_name": "my..dog v1.0 (final) ~cute~ 犬",
        "ss_sd_model_name": "runwayml/stable-diffusion-v1-5",
        "modelspec.title": "cats/dogs: a study",
        "modelspec.thumbnail": "data:image/png;base64,AAAA",
        "ss_tag_frequency": "{}",
    }
    assert read_header(raw_file(path, {"__metadata__": honest, **layer()}, DATA)).metadata == honest


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read LoRA file .*nothing\.safetensors: No such file"):
        read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="directory"):
        read_header(tmp_path)


def test_refusals_have_their_own_class_and_exit_code() -> None:
    assert [kind.exit_code for kind in (PickleRefusedError, FileLimitError, UnsafeMetadataError)] == [
        UnsafeFileError.exit_code
    ] * 3
    damaged = (DamagedFileError, UnknownFormatError, LoraShapeError, LoraValuesError)
    assert {kind.exit_code for kind in damaged} == {LoraFileError.exit_code}


def test_random_damage_never_gets_further_than_an_error_of_ours(path: Path) -> None:
    dump = kohya()
    save_file(dump.tensors, path)
    sound = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(sound)
        for place in torch.randint(0, 4000, (3,), generator=generator).tolist():
            damaged[place] = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            load_lora(path)
        except StudioError:
            refused += 1
    assert refused > 250


def test_every_prefix_of_a_file_is_refused(path: Path) -> None:
    sound = raw_file(path, layer(), DATA).read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        with pytest.raises(StudioError):
            read_raw_header(path)


def test_looking_at_a_file_needs_no_torch(path: Path) -> None:
    save_file(Dump("", kohya().tensors).tensors, path)
    look = f"print(len(read_header({str(path)!r}).layers))"
    code = f"import sys; from studio.lora import read_header; {look}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "18"
