from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import studio.base
import studio.placement
from studio.base import PICKLES, Base, forget_bases, load_base, locate, weights_sha256
from studio.errors import FileError, RequestError, UnknownNameError, UnsafeFileError
from studio.family import detect
from studio.hashes import cache_folder


def test_loads_a_stock_folder_ready_for_inference(base: Base, tiny_base: Path) -> None:
    assert base.name == "tiny"
    assert base.family.name == "embedded"
    assert (base.latent_factor, base.size_step, base.context_length, base.latent_channels) == (4, 16, 16, 8)
    for model in (*base.models().values(), base.vae):
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert base.sha256 == weights_sha256(tiny_base)
    assert load_base(tiny_base, device="cpu") is load_base(tiny_base, device="cpu")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A card that a base half fills, simulated in main memory: how much of it is free."""
    room = {"free": 8 * 10**9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(studio.placement, "free_bytes", lambda device: room["free"])
    monkeypatch.setattr(studio.base, "_numbers", lambda source: 10**9)
    monkeypatch.setattr(studio.base, "_at", lambda placement: (torch.device("cpu"), placement.dtype))
    forget_bases()
    yield room
    forget_bases()


def test_a_loaded_base_is_taken_again_however_little_memory_it_leaves(tiny_base: Path, card: dict[str, int]) -> None:
    first = load_base(tiny_base, device="cuda:0")
    card["free"] -= 4 * 10**9
    assert load_base(tiny_base, device="cuda:0") is first
    assert not first.placement.offload
    assert load_base(tiny_base, device="cuda:0", memory="low").placement.offload
    forget_bases()
    late = load_base(tiny_base, device="cuda:0")
    assert late.placement.offload
    card["free"] += 4 * 10**9
    assert load_base(tiny_base, device="cuda:0") is late


def test_half_precision_spares_the_vae(tiny_base: Path) -> None:
    half = load_base(tiny_base, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32


def test_hash_follows_the_weights_and_is_remembered(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    assert weights_sha256(copy) == weights_sha256(tiny_base)
    assert len(json.loads((cache_folder() / "hashes.json").read_text())) == 6
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_sha256(copy) != weights_sha256(tiny_base)


def test_unknown_name_offers_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown base 'embeded': did you mean 'embedded'"):
        load_base("embeded")


def test_unreachable_hub_is_one_sentence() -> None:
    with pytest.raises(FileError, match="'someone/some-model' is no local file or folder and the model hub cannot be reached"):
        locate("someone/some-model")


def test_a_hub_id_is_fetched_without_its_pickles(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_base("someone/some-model", device="cpu").sha256 == weights_sha256(tiny_base)
    ((name, patterns),) = asked
    assert name == "someone/some-model"
    assert not any(fnmatch(f"unet/diffusion_pytorch_model{ending}", p) for ending in PICKLES for p in patterns)
    assert any(fnmatch("unet/diffusion_pytorch_model.safetensors", pattern) for pattern in patterns)


def test_pickles_are_refused_whatever_the_rest(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_base, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="only pickled weights"):
        load_base(copy)


def test_damaged_weights_are_one_sentence(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(tiny_base, copy)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10" * 64)
    with pytest.raises(FileError, match="cannot load the base in"):
        load_base(copy, device="cpu")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "text_encoder", "vae"])
def test_a_folder_that_lacks_a_part_is_one_sentence(tiny_base: Path, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "half"
    shutil.copytree(tiny_base, copy)
    shutil.rmtree(copy / part)
    with pytest.raises(FileError, match=f"is no whole base: it has no folder {part}$"):
        load_base(copy, device="cpu")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("unet/config.json", '{"block_out_channels": 5}'),
        ("text_encoder/config.json", "[]"),
        ("text_encoder/config.json", '{"hidden_size": "wide"}'),
        ("vae/config.json", '{"block_out_channels": "x"}'),
        ("vae/config.json", "[]"),
        ("scheduler/scheduler_config.json", "[]"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": 3}'),
        ("tokenizer/tokenizer_config.json", "[]"),
        ("tokenizer/tokenizer.json", "{}"),
        ("studio.json", '{"family": []}'),
    ],
)
def test_damaged_configurations_are_one_sentence(tiny_base: Path, tmp_path: Path, file: str, text: str) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(tiny_base, copy)
    assert (copy / file).is_file()
    (copy / file).write_text(text)
    with pytest.raises((FileError, RequestError)) as caught:
        load_base(copy, device="cpu")
    assert "\n" not in str(caught.value)
    assert "huggingface" not in str(caught.value)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no unet/config\.json"):
        load_base(tmp_path)


def test_families_by_configuration() -> None:
    sd15 = {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280], "in_channels": 4}
    assert detect(sd15, "x").name == "sd15"
    assert detect({"addition_embed_type": "text_time", "block_out_channels": [320, 640, 1280]}, "x").name == "sdxl"
    assert detect({"cross_attention_dim": 192, "block_out_channels": [64, 128, 192], "in_channels": 8}, "x").name == "embedded"
    with pytest.raises(RequestError, match="base 'inpaint' is of no known family"):
        detect({**sd15, "in_channels": 9}, "inpaint")
    with pytest.raises(RequestError, match="knows only embedded, sd15, sdxl"):
        detect(sd15, "x", told="sd9")
