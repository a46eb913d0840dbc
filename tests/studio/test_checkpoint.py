"""Single-file checkpoints in the original layout, with every way to a network closed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import studio.checkpoint
from studio.base import Base, forget_bases, load_base, locate
from studio.checkpoint import identify, read_vae
from studio.clip import clip_tokenizer
from studio.errors import DamagedFileError, FileError, PickleRefusedError, RequestError, UnknownFormatError, UnknownNameError
from studio.hashes import sha256_of
from tests.studio.original_layout import (
    checkpoint_tensors,
    narrow_configs,
    random_models,
    vae_tensors,
    write_checkpoint,
    write_marked,
)

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Configurations of narrow models in place of the shipped ones."""
    folder = narrow_configs(tmp_path_factory.mktemp("configs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio.checkpoint, "configs", lambda: folder)
        yield folder
    forget_bases()


@pytest.fixture(scope="module")
def models(narrow: Path) -> dict[str, dict[str, Any]]:
    return {family: random_models(narrow, family) for family in ("sd15", "sdxl")}


@pytest.fixture(scope="module")
def files(models: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(folder / f"my {family}.safetensors", parts) for family, parts in models.items()}


def test_the_tokenizer_gives_clips_own_ids() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Ein Bär, №1 🐻!").input_ids == tokenizer("ein bär, №1 🐻!").input_ids
    assert (tokenizer.pad_token_id, clip_tokenizer(pad="!").pad_token_id, tokenizer.model_max_length) == (49407, 0, 77)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_weight_arrives(files: dict[str, Path], models: dict[str, dict[str, Any]], family: str) -> None:
    base = load_base(files[family], device="cpu", dtype="fp32")
    assert (base.family.name, base.name, base.source) == (family, f"my {family}", files[family])
    assert base.sha256 == sha256_of([files[family]])[0]
    for name, model in {**base.models(), "vae": base.vae}.items():
        expected = models[family][name].state_dict()
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())
    assert base.scheduler.config.prediction_type == "epsilon"
    assert base.context_length == 77


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_picture_is_that_of_the_stock_pipeline(
    files: dict[str, Path], models: dict[str, dict[str, Any]], family: str
) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from compose.denoise import denoise, generators_of, initial_noise
    from compose.text import encode_pair

    base = load_base(files[family], device="cpu", dtype="fp32")
    parts = {**models[family], "scheduler": base.scheduler, "tokenizer": clip_tokenizer()}
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=clip_tokenizer(pad="!"), add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    size = (64, 64)
    expected = pipeline(
        "a red fox", negative_prompt="blurry", width=64, height=64, num_inference_steps=2, guidance_scale=4.0,
        latents=initial_noise(base, generators_of([5]), size), output_type="latent",
    ).images  # fmt: skip
    negative, positive = encode_pair(base, ["a red fox"], ["blurry"])
    got = denoise(base, negative, positive, seeds=[5], size=size, steps=2, guidance=4.0, scheduler="ddim")
    assert got.std() > 0.1
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_half_precision_spares_the_vae(files: dict[str, Path]) -> None:
    base = load_base(files["sdxl"], device="cpu", dtype="bf16")
    assert {model.dtype for model in base.models().values()} == {torch.bfloat16}
    assert base.vae.dtype == torch.float32


def test_loras_of_others_fit_a_single_file(files: dict[str, Path], tmp_path: Path) -> None:
    from compose.bank import Adapter, LoraBank
    from studio.lora.files import load_lora

    base = load_base(files["sdxl"], device="cpu", dtype="fp32")
    names = {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (64, 112),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (48, 48),
        "lora_te2_text_model_encoder_layers_2_mlp_fc1": (96, 64),
    }
    tensors = {}
    for name, (out, into) in names.items():
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, into), f"{name}.lora_up.weight": torch.ones(out, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with LoraBank(base.models(), [Adapter("x", load_lora(tmp_path / "x.safetensors"))], family="sdxl") as bank:
        assert bank.matched == {"x": 3}


def test_what_a_file_says_of_its_predictions(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    told = write_checkpoint(tmp_path / "v.safetensors", models["sd15"], {"modelspec.prediction_type": "v"})
    assert identify(told).scheduler["prediction_type"] == "v_prediction"
    empty = torch.zeros(0)
    marked = write_checkpoint(tmp_path / "z.safetensors", models["sdxl"], v_pred=empty, ztsnr=empty)
    settings = load_base(marked, device="cpu").scheduler.config
    assert (settings.prediction_type, settings.rescale_betas_zero_snr, settings.timestep_spacing) == (
        "v_prediction",
        True,
        "trailing",
    )


def test_another_vae(files: dict[str, Path], models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    plain = models["sd15"]["vae"]
    other = random_models(Path(studio.checkpoint.configs()), "sd15")["vae"]
    other.decoder.conv_out.bias.data += 1
    original = tmp_path / "original.safetensors"
    save_file({k: v.contiguous() for k, v in {**vae_tensors(other), "loss.logvar": torch.zeros(1)}.items()}, original)
    other.save_pretrained(tmp_path / "folder")
    flat = tmp_path / "flat.safetensors"
    save_file(load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors"), flat)
    for place in (original, tmp_path / "folder", flat):
        base = load_base(files["sd15"], device="cpu", dtype="fp32", vae=str(place))
        assert torch.equal(base.vae.decoder.conv_out.bias, other.decoder.conv_out.bias)
        assert torch.equal(
            base.vae.encoder.mid_block.attentions[0].to_q.weight, plain.encoder.mid_block.attentions[0].to_q.weight
        )
        assert base.vae_name == place.stem
        assert len(base.vae_sha256) == 64
    assert load_base(files["sd15"], device="cpu", dtype="fp32").vae_sha256 == ""
    with pytest.raises(UnknownNameError, match="unknown VAE 'nothing'"):
        load_base(files["sd15"], vae="nothing")
    with pytest.raises(FileError, match=r"no config\.json"):
        load_base(files["sd15"], vae=str(tmp_path))


def test_a_vae_of_another_kind_is_refused(files: dict[str, Path], base: Base, tmp_path: Path) -> None:
    base.vae.save_pretrained(tmp_path / "eight")
    with pytest.raises(RequestError, match="has 8 latent channels, but the base's UNet 4"):
        load_base(files["sd15"], device="cpu", vae=str(tmp_path / "eight"))
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UnknownFormatError, match=r"lora\.safetensors is no VAE: it is a LoRA: use it with --lora"):
        read_vae(tmp_path / "lora.safetensors", "sd15")


def test_a_checkpoint_without_a_vae_asks_for_one(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    parts = {name: model for name, model in models["sd15"].items() if name != "vae"}
    file = write_checkpoint(tmp_path / "bare.safetensors", parts)
    with pytest.raises(FileError, match=r"bare\.safetensors holds no VAE: give one with --vae"):
        load_base(file, device="cpu")
    models["sd15"]["vae"].save_pretrained(tmp_path / "vae")
    assert load_base(file, device="cpu", vae=str(tmp_path / "vae")).vae_name == "vae"


def without(source: Path, drop: str, target: Path) -> Path:
    save_file({name: tensor for name, tensor in load_file(source).items() if not name.startswith(drop)}, target)
    return target


@pytest.mark.parametrize(
    ("drop", "reason"),
    [
        (
            "model.diffusion_model.middle_block.0.in_layers.2.weight",
            "its UNet is not that of the family 'sd15'|lacks 1 weights",
        ),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "text encoder is not that of the family"),
        ("first_stage_model.decoder.conv_out", "lacks 2 weights|VAE is not that"),
        ("cond_stage_model.", "holds no text encoder"),
    ],
)
def test_missing_weights_are_one_sentence(files: dict[str, Path], tmp_path: Path, drop: str, reason: str) -> None:
    with pytest.raises(FileError, match=reason) as caught:
        load_base(without(files["sd15"], drop, tmp_path / "x.safetensors"), device="cpu")
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lora_unet_x.lora_down.weight": (1, 1)}, "is a LoRA: use it with --lora"),
        ({"emb_params": (1, 1)}, "embedding: use it with --embedding"),
        ({"encoder.conv_in.weight": (1, 1), "decoder.conv_in.weight": (1, 1)}, "is a VAE: use it with --vae"),
        ({"model.diffusion_model.double_blocks.0.x": (1, 1)}, "FLUX or SD3"),
        ({"down_blocks.0.x": (1, 1)}, "only a UNet in diffusers' layout"),
        ({"control_model.x": (1, 1)}, "is a ControlNet"),
        ({"other": (1, 1)}, "is no checkpoint known here"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4), "cond_stage_model.model.x": (1, 1)}, "Stable Diffusion 2"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4), "conditioner.embedders.0.model.x": (1, 1)}, "refiner"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3), "cond_stage_model.transformer.x": (1, 1)},
            "inpainting",
        ),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (8,), "cond_stage_model.transformer.x": (1,)},
            "no text-to-image model",
        ),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, tensors: dict[str, tuple[int, int]], reason: str) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(UnknownFormatError, match=reason):
        load_base(file)


def test_pickles_and_cut_files_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "x.ckpt")
    with pytest.raises(PickleRefusedError, match=r"x\.ckpt is a pickle"):
        load_base(tmp_path / "x.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(files["sd15"].read_bytes()[:-1000])
    with pytest.raises(DamagedFileError, match="cut short"):
        load_base(tmp_path / "cut.safetensors")
    first, text = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x.weight"
    whole, plain, scale = torch.zeros(8, 4, 3, 3, dtype=torch.int8), torch.zeros(8, 4, 3, 3), torch.ones(1)
    for tensors in (
        {first: whole, text: scale},
        {first: plain, text: whole},
        {first: plain, text: scale, "model.diffusion_model.out.2.scale_weight": scale.clone()},
    ):
        save_file(tensors, tmp_path / "q.safetensors")
        with pytest.raises(UnknownFormatError, match="is quantised"):
            load_base(tmp_path / "q.safetensors")


def test_names_below_the_model_path(files: dict[str, Path], tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_MODEL_PATH", f"{files['sd15'].parent}:{tiny_base.parent}")
    assert locate("my sd15") == locate("my sd15.safetensors") == files["sd15"]
    assert locate("tiny") == tiny_base
    with pytest.raises(UnknownNameError, match="did you mean 'my sd15'"):
        locate("my sd16")
    assert "unet" not in studio.base.known_bases()


@pytest.mark.slow
def test_the_real_shapes_of_stable_diffusion_1_5(tmp_path: Path) -> None:
    """About two gigabytes of random half-precision weights under the original names, through the shipped configurations."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = studio.checkpoint.configs() / "sd15"
    with init_empty_weights():
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        }
    count = 0
    for model in models.values():
        weights = {k: torch.randn(v.shape, dtype=torch.float16) * 0.02 for k, v in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        count += sum(v.numel() for v in weights.values())
    assert count == 859_520_964 + 83_653_863 + 123_060_480
    file = write_checkpoint(tmp_path / "real.safetensors", models)
    expected = models["unet"].state_dict()["mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"].clone()
    del models
    base = load_base(file, device="cpu", dtype="bf16")
    assert base.family.name == "sd15"
    assert torch.equal(base.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight, expected.bfloat16())

    from compose.text import encode

    encoded = encode(base, ["a photo of a (cat:1.2)"])
    with torch.no_grad():
        out = base.unet(torch.zeros(1, 4, 16, 16, dtype=torch.bfloat16), torch.tensor(10), encoded.states).sample
    assert encoded.states.shape == (1, 77, 768)
    assert out.shape == (1, 4, 16, 16)
    assert out.isfinite().all()
    forget_bases()


@pytest.mark.slow
def test_the_real_shapes_of_sdxl(tmp_path: Path) -> None:
    """Every tensor of a file with SDXL's own names and shapes arrives where it belongs. About ten gigabytes of memory."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = studio.checkpoint.configs() / "sdxl"
    with init_empty_weights():
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2")),
        }
    counts = {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}
    assert counts == {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    }  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in checkpoint_tensors(models).items()}
    marks = write_marked(tmp_path / "real.safetensors", shapes)
    assert len(shapes) == 2515
    del models
    base = load_base(tmp_path / "real.safetensors", device="cpu", dtype="bf16")
    assert base.family.name == "sdxl"
    found = checkpoint_tensors({**base.models(), "vae": base.vae})
    wrong = [
        name
        for name, pair in marks.items()
        if not name.endswith("position_ids") and tuple(found[name].flatten()[:2].tolist()) != pair
    ]
    assert wrong == []

    from compose.text import encode

    encoded = encode(base, ["a photo of a (cat:1.2)"])
    assert encoded.states.shape == (1, 77, 768 + 1280)
    assert encoded.pooled is not None and encoded.pooled.shape == (1, 1280)
    forget_bases()


def test_a_fresh_process_asks_no_network_either(files: dict[str, Path], narrow: Path) -> None:
    """Without the variables that this test run sets to keep the libraries offline."""
    code = f"""
import socket
def refuse(*args, **kwargs):
    raise SystemExit("a connection was asked for")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.create_connection = refuse
import studio.checkpoint
from pathlib import Path
studio.checkpoint.configs = lambda: Path({str(narrow)!r})
from pipelines import generate
result = generate("a (red:1.2) fox", base={str(files["sdxl"])!r}, device="cpu", steps=1, size=(32, 32), seed=1)
print(result.images[0].size, result.sidecars[0]["base"]["family"])
"""
    hushed = ("HF_", "TRANSFORMERS_", "DIFFUSERS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hushed)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split("\n")[0] == "(32, 32) sdxl"
