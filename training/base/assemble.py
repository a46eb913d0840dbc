"""Put the trained parts into a stock diffusers folder that ``StableDiffusionPipeline.from_pretrained`` loads with no
code of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from studio.base import weights_sha256
from training.base import checkpoint, text, unet, vae

WEIGHTED = ("unet", "text_encoder", "vae")


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=unet.TRAIN_STEPS, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


def part_weights(work: Path, name: str, prefix: str) -> dict[str, Tensor]:
    """The averaged weights of one trained part, without the objective's own modules."""
    groups, _ = checkpoint.load(work / name)
    return {k[len(prefix) :]: v for k, v in groups["ema"].items() if k.startswith(prefix)}


def load_vae(work: Path, channels: int = 8) -> AutoencoderKL:
    """The trained VAE, its ``scaling_factor`` set so that scaled latents have unit deviation."""
    model = vae.build(channels)
    model.load_state_dict(part_weights(work, f"vae{channels}", "vae."))
    model.eval()
    model.register_to_config(scaling_factor=round(1 / vae.scores(model)["std"], 5))
    return model


def load_text(work: Path) -> CLIPTextModel:
    words = text.tokenizer()
    model = text.build(len(words), words.bos_token_id, words.eos_token_id)
    model.load_state_dict(part_weights(work, "text", "text."))
    return model.eval()


def load_unet(work: Path, name: str, channels: int = 8) -> UNet2DConditionModel:
    model = unet.build(channels)
    model.load_state_dict(part_weights(work, name, "unet."))
    return model.eval()


def saved_vae(folder: Path) -> AutoencoderKL:
    """That of a finished base ``folder``, in single precision."""
    return AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).float().eval()


def saved_text(folder: Path) -> CLIPTextModel:
    """As :func:`saved_vae`."""
    return CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).float().eval()


def saved_unet(folder: Path) -> UNet2DConditionModel:
    """As :func:`saved_vae`, ready to be trained."""
    return UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).float()


def finished(work: Path, init: Path | None, channels: int = 8) -> tuple[AutoencoderKL, CLIPTextModel]:
    """VAE and text encoder trained in ``work``; what it lacks, from the base folder ``init``."""
    vae_model = load_vae(work, channels) if init is None or checkpoint.exists(work / f"vae{channels}") else saved_vae(init)
    return vae_model, load_text(work) if init is None or checkpoint.exists(work / "text") else saved_text(init)


def pipeline(vae_model: AutoencoderKL, text_model: CLIPTextModel, unet_model: UNet2DConditionModel) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae_model, text_encoder=text_model, tokenizer=text.tokenizer(), unet=unet_model, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save(pipe: StableDiffusionPipeline, folder: Path, name: str, facts: dict[str, Any] | None = None) -> str:
    """Write ``pipe`` in half precision; returns the base's hash.

    The stock loader brings UNet and VAE back as fp32 but would leave a half-precision text encoder in fp16, and the
    first matrix product would fail: so its config says float32 over the fp16 file.
    """
    half = {part: getattr(pipe, part) for part in WEIGHTED}
    for module in half.values():
        module.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for module in half.values():
        module.float()
    for part in WEIGHTED:
        config = folder / part / "config.json"
        content = json.loads(config.read_text("utf-8"))
        for key in ("_name_or_path", "torch_dtype"):  # where it was loaded from is nobody's business
            content.pop(key, None)
        if part == "text_encoder":
            content["dtype"] = "float32"
        config.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    digest = weights_sha256(folder)
    record = {"name": name, "family": "embedded", "sha256": digest, **(facts or {})}
    (folder / "studio.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return digest
