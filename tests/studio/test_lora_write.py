"""LoRA files we write: names and metadata the field reads, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from studio.errors import DamagedFileError, FileError, LoraFileError, LoraValuesError, RequestError, UnsafeMetadataError
from studio.lora.files import load_lora, read_header
from studio.lora.model import DoraDelta, Lora, LoraDelta
from studio.lora.write import save_lora

TO_K = "unet.{}.attentions.0.transformer_blocks.0.attn2.to_k"


def delta(out: int, into: int, rank: int = 4, alpha: float = 8.0) -> LoraDelta:
    return LoraDelta(torch.randn(rank, into), torch.randn(out, rank), alpha)


def simple(family: str = "embedded", **metadata: str) -> Lora:
    """One UNet and one text layer with the widths of a family."""
    channels, context, block = {"embedded": (64, 192, 0), "sd15": (320, 768, 0), "sdxl": (640, 2048, 1)}[family]
    layers = {
        TO_K.format(f"down_blocks.{block}"): delta(channels, context),
        "text_encoder.encoder.layers.0.self_attn.q_proj": delta(context, context, rank=2),
    }
    if family == "sdxl":
        layers["text_encoder_2.encoder.layers.0.mlp.fc1"] = delta(5120, 1280)
    return Lora(layers, metadata)


UNET_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT_NAME = "text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("embedded", {UNET_NAME, f"lora_te_{TEXT_NAME}"}),
        ("sd15", {UNET_NAME, f"lora_te_{TEXT_NAME}"}),
        (
            "sdxl",
            {
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
                f"lora_te1_{TEXT_NAME}",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            },
        ),
    ],
)
def test_kohya_names_are_those_its_readers_expect(family: str, keys: set[str], tmp_path: Path) -> None:
    tensors = load_file(save_lora(tmp_path / "a.safetensors", simple(family), "kohya"))
    assert {key.partition(".")[0] for key in tensors} == keys
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}


def test_diffusers_names(tmp_path: Path) -> None:
    tensors = load_file(save_lora(tmp_path / "a.safetensors", simple("sdxl"), "diffusers"))
    assert set(tensors) == {
        f"{module}.lora_{side}.weight"
        for side in "AB"
        for module in (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        )
    }


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_metadata_the_field_reads(layout: str, tmp_path: Path) -> None:
    given = {"studio.trigger": "sks", "studio.kind": "concept", "studio.name": "dog", "ss_steps": "300"}
    path = save_lora(tmp_path / "a.safetensors", simple("sd15"), layout, given)  # type: ignore[arg-type]
    metadata = read_header(path).metadata
    assert metadata.items() >= given.items()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == ("8.0" if layout == "kohya" else "4.0")
    assert metadata["ss_output_name"] == "dog"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["studio.family"] == "sd15"
    assert ("lora_adapter_metadata" in metadata) == (layout == "diffusers")
    data = path.read_bytes()
    block = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(block).hexdigest()


def test_peft_configuration_names_every_layer(tmp_path: Path) -> None:
    metadata = read_header(save_lora(tmp_path / "a.safetensors", simple())).metadata
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"], config["text_encoder.r"]) == (4, 4, 2)
    assert config["text_encoder.target_modules"] == ["encoder.layers.0.self_attn.q_proj"]


def test_what_a_file_said_is_kept_when_it_is_written_again(tmp_path: Path) -> None:
    first = save_lora(tmp_path / "a.safetensors", simple(ss_steps="7"), "kohya", {"modelspec.author": "somebody"})
    second = load_lora(save_lora(tmp_path / "b.safetensors", load_lora(first), "diffusers"))
    assert (second.metadata["ss_steps"], second.metadata["modelspec.author"]) == ("7", "somebody")
    assert second.metadata["ss_network_alpha"] == "4.0"  # of this file, not of the first


def test_an_unknown_family_is_not_claimed(tmp_path: Path) -> None:
    lora = Lora({TO_K.format("mid_block"): delta(10, 20)})
    metadata = read_header(save_lora(tmp_path / "a.safetensors", lora)).metadata
    assert "studio.family" not in metadata
    assert "unknown" not in str(metadata)


def test_equal_loras_give_equal_files(tmp_path: Path) -> None:
    lora = simple()
    first, second = (save_lora(tmp_path / f"{name}.safetensors", lora) for name in "ab")
    assert load_lora(first).sha256 == load_lora(second).sha256
    assert load_lora(first).source == first


def test_half_precision_is_written_where_asked(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a.safetensors", simple(), "kohya", dtype=torch.float16)
    kinds = {key.partition(".")[2]: tensor.dtype for key, tensor in load_file(path).items()}
    assert kinds == {"lora_down.weight": torch.float16, "lora_up.weight": torch.float16, "alpha": torch.float32}


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    huge = Lora({TO_K.format("mid_block"): LoraDelta(torch.full((2, 4), 1e6), torch.ones(4, 2), 2.0)})
    with pytest.raises(LoraValuesError, match=r"holds NaN or infinity as torch\.float16"):
        save_lora(tmp_path / "a.safetensors", huge, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    shared = torch.randn(16, 16)
    lora = Lora({TO_K.format("mid_block"): LoraDelta(shared[:4], shared[:, :4], 4.0)})
    (back,) = load_lora(save_lora(tmp_path / "a.safetensors", lora)).layers.values()
    torch.testing.assert_close(back.up, shared[:, :4])  # type: ignore[union-attr]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    assert save_lora(tmp_path / "new" / "folder" / "a.safetensors", simple()).is_file()


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"cannot write .*file/a\.safetensors: "):
        save_lora(tmp_path / "file" / "a.safetensors", simple())


def test_a_write_that_fails_leaves_the_old_file_and_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_lora(tmp_path / "a.safetensors", simple())
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*a\.safetensors: No space left"):
        save_lora(path, simple(ss_steps="1"))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_requests_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"not as 'a.ckpt'"):
        save_lora(tmp_path / "a.ckpt", simple())
    with pytest.raises(RequestError, match="unknown LoRA layout 'comfy'"):
        save_lora(tmp_path / "a.safetensors", simple(), "comfy")  # type: ignore[arg-type]
    with pytest.raises(LoraFileError, match="no layers"):
        save_lora(tmp_path / "a.safetensors", Lora({}))
    with pytest.raises(DamagedFileError, match="not a table of strings"):
        save_lora(tmp_path / "a.safetensors", simple(), metadata={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(UnsafeMetadataError, match="ss_output_name"):
        save_lora(tmp_path / "a.safetensors", simple(), metadata={"ss_output_name": "../a"})
    with pytest.raises(LoraFileError, match="kohya's layout has no names"):
        save_lora(tmp_path / "a.safetensors", Lora({"transformer.x_embedder": delta(4, 4)}), "kohya")


def test_dora_per_input_channel_keeps_its_axis(tmp_path: Path) -> None:
    lora = Lora({TO_K.format("mid_block"): DoraDelta(delta(6, 6), torch.rand(6), axis=1)})
    (back,) = load_lora(save_lora(tmp_path / "a.safetensors", lora, "kohya")).layers.values()
    assert isinstance(back, DoraDelta)
    assert back.axis == 1
