"""Every trainer's files do to the weights what their formulas say, and nothing of them is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from studio.errors import LoraFileError, LoraShapeError, UnknownFormatError
from studio.lora.convert import lora_from_state_dict
from studio.lora.dense import dense
from studio.lora.files import check_against, load_lora, read_header
from studio.lora.write import save_lora
from tests.studio.lora_dumps import DUMPS, KOHYA, TEXT, UNET, Dump, kohya, lokr, lora, peft


@pytest.fixture(params=DUMPS)
def dump(request: pytest.FixtureRequest) -> Dump:
    torch.manual_seed(0)
    return DUMPS[request.param]()


def write(dump: Dump, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in dump.tensors.items()}, path, metadata=dump.metadata)
    return path


def assert_same_changes(found: Path, dump: Dump, tolerance: float = 1e-4) -> None:
    layers = load_lora(found).layers
    assert set(layers) == set(dump.expected)
    for module, delta in layers.items():
        weight = torch.randn(dump.shapes[module], generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(dense(delta, weight).double(), dump.expected[module](weight), atol=tolerance, rtol=tolerance)


def test_a_file_changes_the_weights_as_its_formula_says(dump: Dump, tmp_path: Path) -> None:
    assert_same_changes(write(dump, tmp_path / "a.safetensors"), dump)


def test_the_header_alone_names_format_and_layers(dump: Dump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(dump, tmp_path / "a.safetensors")
    monkeypatch.setattr("safetensors.safe_open", None)
    header = read_header(path)
    assert header.format == dump.format
    assert str(check_against(header, dump.shapes)) == f"{len(dump.shapes)} of {len(dump.shapes)} layers matched"


def test_header_and_loaded_file_agree(dump: Dump, tmp_path: Path) -> None:
    path = write(dump, tmp_path / "a.safetensors")
    assert check_against(load_lora(path), dump.shapes) == check_against(read_header(path), dump.shapes)


def test_kohya_layout_holds_every_kind(dump: Dump, tmp_path: Path) -> None:
    original = load_lora(write(dump, tmp_path / "a.safetensors"))
    assert_same_changes(save_lora(tmp_path / "b.safetensors", original, "kohya"), dump)


def test_diffusers_layout_holds_lora_and_dora_and_refuses_the_rest(dump: Dump, tmp_path: Path) -> None:
    path = write(dump, tmp_path / "a.safetensors")
    if set(read_header(path).kinds) <= {"lora", "dora"} and not _per_input(dump):
        assert_same_changes(save_lora(tmp_path / "b.safetensors", load_lora(path), "diffusers"), dump)
    else:
        with pytest.raises(LoraFileError, match=r"no names for .* layer"):
            save_lora(tmp_path / "b.safetensors", load_lora(path), "diffusers")
        assert not (tmp_path / "b.safetensors").exists()


def _per_input(dump: Dump) -> bool:
    return any(key.endswith("dora_scale") and tensor.shape[0] == 1 for key, tensor in dump.tensors.items())


def test_tensors_in_memory_give_the_same_lora(dump: Dump) -> None:
    layers = lora_from_state_dict(dump.tensors, name="memory").layers
    for module, delta in layers.items():
        weight = torch.randn(dump.shapes[module])
        torch.testing.assert_close(dense(delta, weight).double(), dump.expected[module](weight), atol=1e-4, rtol=1e-4)


def test_half_precision_alpha_and_weights_are_read(tmp_path: Path) -> None:
    dump = kohya(alpha=6.0)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        dump.tensors = {key: tensor.to(kind) for key, tensor in dump.tensors.items()}
        path = write(dump, tmp_path / "a.safetensors")
        assert read_header(path).alpha == 6.0
        assert {delta.down.dtype for delta in load_lora(path).layers.values()} == {torch.float32}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_conv_in.diff", "whole weight differences"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.on_input", "IA3"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.oft_blocks", "OFT"),
        ("bundle_emb.word.string_to_param.*", "textual-inversion"),
        ("model.diffusion_model.input_blocks.0.0.weight", "whole checkpoint"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "FLUX"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "motion module"),
        ("unet.conv_in.lora_B.bias", "trains biases"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha", "third text encoder"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "is for a transformer .Wan"),
        ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "is for a transformer .Wan"),
        ("lora_prior_unet_down_blocks_0_11_attention_attn_to_q.alpha", "Stable Cascade"),
        ("lora_unet_conv_in.a1.weight", "GLoRA"),
        ("unet:0:up", "counts its layers instead of naming them"),
        ("something.else", "no LoRA format known"),
    ],
)
def test_what_is_no_low_rank_adapter_is_refused_with_its_reason(key: str, reason: str, tmp_path: Path) -> None:
    path = write(Dump("", {key: torch.zeros(2, 2)}), tmp_path / "a.safetensors")
    with pytest.raises(UnknownFormatError, match=reason):
        read_header(path)


def test_one_stray_tensor_refuses_the_whole_file(tmp_path: Path) -> None:
    dump = kohya()
    dump.tensors["lora_unet_down_blocks_9_surprise.lora_down.weight"] = torch.zeros(2, 2)
    with pytest.raises(UnknownFormatError, match=r"1 of its \d+ tensors cannot be placed .'lora_unet_down_blocks_9_surprise"):
        load_lora(write(dump, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("lost", [".lora_down.weight", ".lora_up.weight"])
def test_half_a_layer_is_refused(lost: str, tmp_path: Path) -> None:
    dump = kohya()
    del dump.tensors[f"lora_unet_{UNET[0].flat}{lost}"]
    with pytest.raises(LoraShapeError, match=f"a.safetensors is refused: layer '{UNET[0].module}' lacks"):
        load_lora(write(dump, tmp_path / "a.safetensors"))


def test_tensors_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    dump = kohya()
    dump.tensors[f"lora_unet_{UNET[0].flat}.lora_up.weight"] = torch.zeros(8, 5)
    with pytest.raises(LoraShapeError, match="'up' that does not fit"):
        read_header(write(dump, tmp_path / "a.safetensors"))


def test_one_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    dump = kohya()
    lora(dump, UNET[0].module, "lora_unet_" + UNET[0].ldm.replace(".", "_"), UNET[0], KOHYA)
    with pytest.raises(UnknownFormatError, match="names one layer twice"):
        read_header(write(dump, tmp_path / "a.safetensors"))


def test_peft_configuration_gives_the_scale(tmp_path: Path) -> None:
    dump = peft("base_model.model.")
    path = write(dump, tmp_path / "adapter_model.safetensors")
    pattern = {UNET[0].module.removeprefix("unet."): 8, "ff.net.2": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "alpha_pattern": pattern}), "utf-8")
    scale = {UNET[0].module: 4.0, UNET[4].module: 3.0}
    for module, delta in load_lora(path).layers.items():
        expected = dump.expected[module](torch.zeros(())) * scale.get(module, 2.0)
        torch.testing.assert_close(dense(delta).double(), expected, atol=1e-4, rtol=1e-4)


def test_diffusers_metadata_gives_the_scale_per_component(tmp_path: Path) -> None:
    dump = DUMPS["diffusers lora_A"]()
    config = {
        "unet.r": 3,
        "unet.lora_alpha": 6,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 3,
        "text_encoder.use_rslora": True,
    }
    dump.metadata["lora_adapter_metadata"] = json.dumps(config)
    for module, delta in load_lora(write(dump, tmp_path / "a.safetensors")).layers.items():
        scale = 2.0 if module.startswith("unet.") else 3 / 2**0.5
        torch.testing.assert_close(dense(delta).double(), dump.expected[module](torch.zeros(())) * scale, atol=1e-4, rtol=1e-4)


def test_regular_expressions_of_a_stranger_are_not_run(tmp_path: Path) -> None:
    dump = DUMPS["diffusers lora_A"]()
    dump.metadata["lora_adapter_metadata"] = json.dumps({"unet.lora_alpha": 6, "unet.alpha_pattern": {"(a+)+$": 3}})
    with pytest.raises(LoraFileError, match="alpha_pattern"):
        read_header(write(dump, tmp_path / "a.safetensors"))


def test_lokr_in_peft_names_is_refused_since_its_strength_would_be_a_guess(tmp_path: Path) -> None:
    dump = lokr("whole")
    dump.tensors = {
        f"base_model.model.conv_in.{key.rpartition('.')[2]}": tensor for key, tensor in list(dump.tensors.items())[:1]
    }
    with pytest.raises(UnknownFormatError):
        read_header(write(dump, tmp_path / "a.safetensors"))


def test_a_match_names_what_is_missing_and_what_has_another_shape(tmp_path: Path) -> None:
    dump = kohya()
    path = write(dump, tmp_path / "a.safetensors")
    shapes = {**dump.shapes, UNET[0].module: (16, 8)}
    del shapes[f"text_encoder.{TEXT[0].module}"]
    match = check_against(read_header(path), shapes)
    assert match.wrong_shape == (UNET[0].module,)
    assert match.missing == (f"text_encoder.{TEXT[0].module}",)
    assert str(match) == f"{len(dump.shapes) - 2} of {len(dump.shapes)} layers matched"
    assert not match.complete
