"""Checkpoints in the original code's layout, written from diffusers models: the inverse of what loading does.

Norms, convolutions and attention of the UNet, VAE and text encoders get the names that the original code gives them.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from studio.checkpoint import UNET, VAE, configs
from studio.lora.names import diffusers_to_ldm

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj"}  # fmt: skip


def unet_tensors(unet: nn.Module) -> dict[str, Tensor]:
    up = {i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")}
    found = {}
    for name, tensor in unet.state_dict().items():
        path, _, kind = name.rpartition(".")
        plain = diffusers_to_ldm(path, attention_blocks=frozenset(up)) or {"conv_norm_out": "out.0"}[path]
        head, _, last = plain.rpartition(".")
        found[
            f"{UNET}{f'{head}.{RESNET[last]}' if last in ('norm1', 'norm2') and 'transformer' not in head else plain}.{kind}"
        ] = tensor
    return found


def vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    blocks = len(vae.config.block_out_channels)
    found = {}
    for name, tensor in vae.state_dict().items():
        path = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        path = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", path)
        path = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", path)
        path = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", path)
        path = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", path)
        path = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", path)
        if match := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", path):
            path = f"{match[1]}mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
            if match[3] == "weight" and match[2] != "group_norm":
                tensor = tensor[:, :, None, None]  # there a 1 x 1 convolution
        found[path] = tensor
    return found


def clip_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    found = {f"text_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return {**found, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    given = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    found = {
        "token_embedding.weight": given["embeddings.token_embedding.weight"],
        "positional_embedding": given["embeddings.position_embedding.weight"],
        "ln_final.weight": given["final_layer_norm.weight"],
        "ln_final.bias": given["final_layer_norm.bias"],
        "text_projection": given["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for number in range(encoder.config.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            for our_part, their_part in OPEN_CLIP.items():
                found[f"{theirs}.{their_part}.{kind}"] = given[f"{ours}.{our_part}.{kind}"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(
                [given[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
    return found


def checkpoint_tensors(models: dict[str, Any]) -> dict[str, Tensor]:
    """``unet``, ``text_encoder``, ``vae`` and, for SDXL, ``text_encoder_2`` under the names of one file."""
    xl = "text_encoder_2" in models
    first = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    tensors = unet_tensors(models["unet"])
    tensors |= {first + name: tensor for name, tensor in clip_tensors(models["text_encoder"]).items()}
    if "vae" in models:
        tensors |= {VAE + name: tensor for name, tensor in vae_tensors(models["vae"]).items()}
    if xl:
        tensors |= {
            "conditioner.embedders.1.model." + name: tensor
            for name, tensor in open_clip_tensors(models["text_encoder_2"]).items()
        }
    return tensors


def write_checkpoint(path: Path, models: dict[str, Any], metadata: dict[str, str] | None = None, **more: Tensor) -> Path:
    """One file with all of ``models``; as most are, in half precision."""
    tensors = {**checkpoint_tensors(models), "model_ema.decay": torch.ones(())}
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in {**tensors, **more}.items()}
    save_file(half, path, metadata)
    return path


def write_marked(path: Path, shapes: dict[str, torch.Size]) -> dict[str, tuple[float, float]]:
    """A file of half-precision zeros with these names and shapes, of which the disk holds next to nothing.

    Returns what each tensor with two numbers or more begins with, another pair for every name; small whole numbers, which
    every format holds exactly.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    marks = {name: (index // 64 + 1.0, index % 64 + 1.0) for index, name in enumerate(shapes) if shapes[name].numel() > 1}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, pair in marks.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])  # type: ignore[index]
            file.write(struct.pack("<2e", *pair))
        file.truncate(8 + len(text) + end)
    return marks


NARROW: dict[str, dict[str, Any]] = {
    "sd15/unet": {
        "block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 48, "norm_num_groups": 16, "attention_head_dim": 4,
    },
    "sd15/vae": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8},
    "sd15/text_encoder": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "sdxl/unet": {
        "block_out_channels": [32, 64, 64], "cross_attention_dim": 48 + 64, "norm_num_groups": 16,
        "attention_head_dim": [2, 4, 4], "transformer_layers_per_block": [1, 2, 2], "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
    },
    "sdxl/vae": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8},
    "sdxl/text_encoder": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "sdxl/text_encoder_2": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 40,
    },
}  # fmt: skip


def narrow_configs(folder: Path) -> Path:
    """The shipped configurations with small widths: everything else is as in the real models."""
    for file in configs().rglob("*.json"):
        place = file.relative_to(configs())
        settings = json.loads(file.read_text()) | NARROW.get(place.parent.as_posix(), {})
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(json.dumps(settings))
    return folder


def random_models(folder: Path, family: str) -> dict[str, Any]:
    """Models of the configurations in ``folder`` with random weights, rounded to half precision as files hold them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    models: dict[str, Any] = {name: cls.from_config(cls.load_config(folder / family / name)) for name, cls in classes.items()}
    models["text_encoder"] = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / family / "text_encoder"))
    if family == "sdxl":
        models["text_encoder_2"] = CLIPTextModelWithProjection(
            CLIPTextConfig.from_pretrained(folder / family / "text_encoder_2")
        )
    for model in models.values():
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.7 * weight[0].numel() ** -0.5)
            weight.data = weight.data.half().float()
        model.eval().requires_grad_(False)
    return models
