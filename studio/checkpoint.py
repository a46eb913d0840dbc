"""Bases in one file, in the layout of the original code (``model.diffusion_model...``), as most of the world shares them.

Nothing is asked of any network: what such a file does not hold (configurations, the tokenizer) is shipped in
``assets/configs``. Only safetensors is read. Loading is all or nothing: a file that lacks a weight, or has one of another
shape, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.clip import build, clip_tokenizer, clip_weights, open_clip_weights
from studio.errors import DamagedFileError, FileError, UnknownFormatError
from studio.lora.header import FLOATS, Limits, RawHeader, read_raw_header
from studio.paths import assets

LIMITS = Limits(
    header_bytes=64 * 2**20,
    file_bytes=64 * 2**30,
    tensors=50_000,
    kind="a checkpoint",
    convert="for which the checkpoint's author or another program can convert it",
    hint="",
)
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
}
"""Where each family keeps its text encoders."""

_FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
# What else people may take for a checkpoint: marks of which one is in some tensor's name, and what to say.
_LORA_MARKS = ("lora_unet_", "lora_te", ".lora_A.", ".lora_B.", ".lora.down.", ".lora_down.", "hada_w1", "lokr_w1")
_TRANSFORMER_MARKS = ("double_blocks.", "single_blocks.", "joint_blocks.", "single_transformer_blocks.")
_OTHERS = (
    (_LORA_MARKS, "is a LoRA: use it with --lora"),
    (_TRANSFORMER_MARKS, "is a FLUX or SD3 model, which the studio does not have"),
    (("emb_params",), "is a textual-inversion embedding: use it with --embedding"),
    (("control_model.", "controlnet_", "input_hint_block."), "is a ControlNet, not a base"),
    (("motion_modules.",), "is a motion module, not a base"),
    (("conditioner.embedders.0.model.",), "is an SDXL refiner, which is no base of its own"),
    (("cond_stage_model.model.",), "is Stable Diffusion 2, of which the studio has no family: use SD 1.x or SDXL"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A single file that holds a whole base of ``family``."""

    path: Path
    family: str
    header: RawHeader

    @property
    def config(self) -> Path:
        """The folder of shipped configurations for it."""
        return configs() / self.family

    @property
    def scheduler(self) -> dict[str, Any]:
        """Settings of the noise schedule: the family's, with what the file says of itself.

        ``v_pred`` and ``ztsnr`` are the empty tensors by which ComfyUI knows such models.
        """
        settings: dict[str, Any] = json.loads((self.config / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        told = self.header.metadata.get("modelspec.prediction_type", "").lower()
        if "v_pred" in self.header.tensors or told in ("v", "v_prediction"):
            settings["prediction_type"] = "v_prediction"
        if "ztsnr" in self.header.tensors:
            settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return settings

    def read(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The parts of a base by their names, on ``device``; the VAE in single precision, None where the file has none.

        Raises:
            FileError: a weight is missing or of another shape.
        """
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        parts: dict[str, Any] = {"tokenizer": clip_tokenizer(), "scheduler": DDIMScheduler.from_config(self.scheduler)}
        with self._complaining("UNet"):
            load = partial(UNet2DConditionModel.from_single_file, config=str(self.config), subfolder="unet")
            parts["unet"] = complete(load(self._tensors(UNET, dtype, keep=True), dtype=dtype, local_files_only=True)).to(device)
        for name, prefix in TEXT[self.family].items():
            with self._complaining("text encoder"):
                second = name == "text_encoder_2"
                weights = (open_clip_weights if second else clip_weights)(self._tensors(prefix, dtype))
                cls = CLIPTextModelWithProjection if second else CLIPTextModel
                parts[name] = build(cls, self.config / name, weights, dtype).to(device)
        if self.family == "sdxl":
            parts["tokenizer_2"] = clip_tokenizer(pad="!")
        parts["vae"] = None
        if any(name.startswith(VAE) for name in self.header.tensors):
            with self._complaining("VAE"):
                parts["vae"] = _vae(self._tensors(VAE, torch.float32, keep=True), self.config).to(device)
        return parts

    def _tensors(self, prefix: str, dtype: torch.dtype, *, keep: bool = False) -> dict[str, Tensor]:
        return tensors_of(self.header, prefix, dtype, keep=keep)

    @contextmanager
    def _complaining(self, part: str) -> Iterator[None]:
        """Any failure of a loader is one sentence about this file."""
        try:
            yield
        except FileError as error:
            raise type(error)(f"cannot load {self.path.name}: {error}") from error
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            told = " ".join(str(error).split())[:200]
            raise DamagedFileError(
                f"cannot load {self.path.name}: its {part} is not that of the family '{self.family}' ({told})"
            ) from error


def configs() -> Path:
    """The shipped configurations, by family."""
    return assets() / "configs"


def identify(path: Path) -> Checkpoint:
    """What a single file is, from its header alone.

    Raises:
        UnsafeFileError: a pickle. DamagedFileError: cut short.
        UnknownFormatError: no base of a family known here; the message says what it is instead, where that shows.
    """
    header = read_raw_header(path, LIMITS)
    names = header.tensors
    if _FIRST_CONVOLUTION not in names:
        if not any(name.startswith(UNET) for name in names) and _is_vae(names):
            raise UnknownFormatError(f"{path.name} is a VAE: use it with --vae")
        why = _other(names) or "is no checkpoint known here: it has no 'model.diffusion_model'"
        if any(name.startswith("down_blocks.") for name in names):
            why = "holds only a UNet in diffusers' layout: give the whole diffusers folder"
        raise UnknownFormatError(f"{path.name} {why}")
    family = next(
        (family for family, parts in TEXT.items() if all(any(n.startswith(p) for n in names) for p in parts.values())), None
    )
    if family is None:
        raise UnknownFormatError(
            f"{path.name} {_other(names) or 'holds no text encoder: only checkpoints with all their parts can be used'}"
        )
    shape = names[_FIRST_CONVOLUTION].shape
    channels = shape[1] if len(shape) == 4 else 0
    if channels != 4:
        kind = {9: "an inpainting model", 8: "an image-editing model"}.get(channels, "no text-to-image model")
        raise UnknownFormatError(f"{path.name} is {kind} (its UNet takes {channels} channels): use a text-to-image checkpoint")
    used = (UNET, VAE, *TEXT[family].values())
    odd = next((name for name, info in names.items() if name.startswith(used) and _is_quantised(name, info.dtype)), None)
    if odd is not None:
        raise UnknownFormatError(
            f"{path.name} is quantised ('{odd[:80]}' holds {names[odd].dtype} numbers): use a file in half or single precision"
        )
    return Checkpoint(path, family, header)


def _is_quantised(name: str, dtype: str) -> bool:
    """Whole numbers where weights should be, or a scale beside weights that were divided by it."""
    return name.endswith((".scale_weight", ".weight_scale")) or (name.endswith("weight") and dtype not in FLOATS)


def read_vae(path: Path, family: str) -> Any:
    """An ``AutoencoderKL`` in single precision from a file of its own, in the original layout or diffusers'.

    Raises:
        FileError: no VAE, or a damaged one.
    """
    header = read_raw_header(path, LIMITS)
    prefix = VAE if any(name.startswith(VAE) for name in header.tensors) else ""
    if not _is_vae(name.removeprefix(VAE) for name in header.tensors):
        raise UnknownFormatError(f"{path.name} is no VAE: it {_other(header.tensors) or 'has no encoder and decoder'}")
    try:
        return _vae(tensors_of(header, prefix, torch.float32, keep=True), configs() / family)
    except (ValueError, RuntimeError, KeyError, FileError) as error:
        told = " ".join(str(error).split())[:200]
        raise DamagedFileError(f"cannot load {path.name}: it is no VAE of the family '{family}' ({told})") from error


def _vae(tensors: dict[str, Tensor], config: Path) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    # Some files carry the VAE's training loss along.
    own = {name: tensor for name, tensor in tensors.items() if not name.removeprefix(VAE).startswith(("loss.", "model_ema."))}
    load = partial(AutoencoderKL.from_single_file, config=str(config), subfolder="vae")
    return complete(load(own, dtype=torch.float32, local_files_only=True))


def tensors_of(header: RawHeader, prefix: str, dtype: torch.dtype, *, keep: bool = False) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of the name, or with ``keep`` by the whole name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(header.path, framework="pt") as file:
            return {
                name if keep else name.removeprefix(prefix): _as(file.get_tensor(name), dtype)
                for name in header.tensors
                if name.startswith(prefix)
            }
    except SafetensorError as error:
        raise DamagedFileError(f"{header.path.name} is damaged: {error}") from error


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def complete(model: Any) -> Any:
    """``model``, if the loader gave it every weight.

    Raises:
        DamagedFileError: some weight was left without numbers.
    """
    lacking = [name for name, weight in model.named_parameters() if weight.is_meta]
    if lacking:
        raise DamagedFileError(f"it lacks {len(lacking)} weights, for example '{lacking[0]}'")
    return model


def _is_vae(names: Any) -> bool:
    tops = {name.split(".", 1)[0] for name in names}
    return {"encoder", "decoder"} <= tops


def _other(names: Mapping[str, object]) -> str:
    return next((why for marks, why in _OTHERS if any(mark in name for name in names for mark in marks)), "")
