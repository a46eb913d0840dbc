"""Files as each trainer writes them, made here: literal names, tiny random tensors, and the dense change by separate code.

The names are spelled out by hand, so that a fault in the product's name tables cannot hide in the expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

WeightToDelta = Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """One layer under its names: ours, flattened diffusers (kohya), LDM, and the shape of its weight."""

    module: str
    flat: str
    ldm: str
    shape: tuple[int, ...]


UNET = (
    Layer(
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        "down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
        "input_blocks.2.1.transformer_blocks.0.attn1.to_q",
        (8, 8),
    ),
    Layer(
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
        (8, 12),
    ),
    Layer(
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "middle_block.1.transformer_blocks.0.attn1.to_out.0",
        (8, 8),
    ),
    Layer(
        "unet.up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj",
        "up_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj",
        "output_blocks.7.1.transformer_blocks.0.ff.net.0.proj",
        (64, 8),
    ),
    Layer(
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
        "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2",
        "output_blocks.11.1.transformer_blocks.0.ff.net.2",
        (8, 32),
    ),
)
CONVOLUTIONS = (
    Layer(
        "unet.down_blocks.2.attentions.0.proj_in",
        "down_blocks_2_attentions_0_proj_in",
        "input_blocks.7.1.proj_in",
        (8, 8, 1, 1),
    ),
    Layer("unet.down_blocks.0.resnets.1.conv1", "down_blocks_0_resnets_1_conv1", "input_blocks.2.0.in_layers.2", (8, 8, 3, 3)),
    Layer("unet.up_blocks.1.resnets.0.conv2", "up_blocks_1_resnets_0_conv2", "output_blocks.3.0.out_layers.3", (8, 8, 3, 3)),
    Layer("unet.down_blocks.0.downsamplers.0.conv", "down_blocks_0_downsamplers_0_conv", "input_blocks.3.0.op", (8, 8, 3, 3)),
    Layer("unet.up_blocks.1.upsamplers.0.conv", "up_blocks_1_upsamplers_0_conv", "output_blocks.5.2.conv", (8, 8, 3, 3)),
)
OTHERS = (
    Layer(
        "unet.mid_block.resnets.1.time_emb_proj",
        "mid_block_resnets_1_time_emb_proj",
        "middle_block.2.emb_layers.1",
        (8, 32),
    ),
    Layer(
        "unet.up_blocks.0.resnets.0.conv_shortcut",
        "up_blocks_0_resnets_0_conv_shortcut",
        "output_blocks.0.0.skip_connection",
        (8, 16, 1, 1),
    ),
    Layer("unet.conv_in", "conv_in", "input_blocks.0.0", (8, 4, 3, 3)),
    Layer("unet.conv_out", "conv_out", "out.2", (4, 8, 3, 3)),
    Layer("unet.time_embedding.linear_1", "time_embedding_linear_1", "time_embed.0", (32, 8)),
)  # fmt: skip
TEXT = (
    Layer("encoder.layers.0.self_attn.q_proj", "text_model_encoder_layers_0_self_attn_q_proj", "", (12, 12)),
    Layer("encoder.layers.1.self_attn.out_proj", "text_model_encoder_layers_1_self_attn_out_proj", "", (12, 12)),
    Layer("encoder.layers.1.mlp.fc1", "text_model_encoder_layers_1_mlp_fc1", "", (24, 12)),
)


@dataclass
class Dump:
    """Tensors of a file under construction, and by module what they should do to a weight ``W``."""

    format: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    expected: dict[str, WeightToDelta] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def pair(shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """Random ``down`` and ``up``."""
    out, into, *kernel = shape
    return torch.randn(rank, into, *kernel), torch.randn(out, rank, *(1 for _ in kernel))


def product(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``scale * up @ down`` by a plain sum over the rank."""
    total = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
    for r in range(down.shape[0]):
        column = up[:, r].reshape(-1, *(1,) * (down.ndim - 1)).double()
        total += column * down[r].double()
    return scale * total


def lora(
    dump: Dump, module: str, key: str, layer: Layer, names: tuple[str, str], *, rank: int = 4, alpha: float | None = None
) -> None:
    """Add a low-rank layer; ``names`` are the endings of ``down`` and ``up``."""
    down, up = pair(layer.shape, rank)
    dump.tensors[f"{key}{names[0]}"], dump.tensors[f"{key}{names[1]}"] = down, up
    if alpha is not None:
        dump.tensors[f"{key}.alpha"] = torch.tensor(alpha)
    change = product(down, up, 1.0 if alpha is None else alpha / rank)
    dump.expected[module] = lambda weight, change=change: change
    dump.shapes[module] = layer.shape


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
OLD_UNET = (".lora.down.weight", ".lora.up.weight")
OLD_TEXT = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")


def kohya(*, alpha: float | None = 2.0, text: str = "lora_te_", ldm: bool = False) -> Dump:
    """sd-scripts, with diffusers' names (SD1.5) or the original ones (SDXL)."""
    dump = Dump("kohya")
    for layer in UNET + CONVOLUTIONS + OTHERS:
        name = layer.ldm.replace(".", "_") if ldm else layer.flat
        lora(dump, layer.module, f"lora_unet_{name}", layer, KOHYA, alpha=alpha)
    for layer in TEXT:
        component = "text_encoder_2" if text == "lora_te2_" else "text_encoder"
        lora(dump, f"{component}.{layer.module}", f"{text}{layer.flat}", layer, KOHYA, alpha=alpha)
    return dump


def diffusers(names: tuple[str, str], text_names: tuple[str, str], wrapper: str = "text_model.") -> Dump:
    """diffusers' ``unet.`` and ``text_encoder.`` prefixes, new and old endings."""
    dump = Dump("diffusers")
    for layer in UNET + CONVOLUTIONS:
        lora(dump, layer.module, layer.module, layer, names, rank=3)
    for layer in TEXT:
        lora(dump, f"text_encoder.{layer.module}", f"text_encoder.{wrapper}{layer.module}", layer, text_names, rank=2)
    return dump


def processor(prefix: str) -> Dump:
    """diffusers before PEFT: attention processors with LoRA inside."""
    dump = Dump("processor")
    for layer in UNET[:3]:
        home, _, leaf = layer.module.removeprefix("unet.").removesuffix(".0").rpartition(".")
        lora(dump, layer.module, f"{prefix}{home}.processor.{leaf}_lora", layer, (".down.weight", ".up.weight"))
    for layer in TEXT[:2]:
        home, _, leaf = layer.module.rpartition(".")
        old = {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}[leaf]
        lora(
            dump, f"text_encoder.{layer.module}", f"text_encoder.text_model.{home}.{old}", layer, (".down.weight", ".up.weight")
        )
    return dump


def peft(prefix: str, layers: tuple[Layer, ...] = UNET + CONVOLUTIONS, adapter: str = "") -> Dump:
    """PEFT's own files: one model, no component in the names."""
    dump = Dump("peft")
    names = (f".lora_A{adapter}.weight", f".lora_B{adapter}.weight")
    for layer in layers:
        module = layer.module if layer in UNET + CONVOLUTIONS else f"text_encoder.{layer.module}"
        lora(dump, module, f"{prefix}{layer.module.removeprefix('unet.')}", layer, names, rank=2)
    return dump


def comfy() -> Dump:
    """ComfyUI's own export, with the original names."""
    dump = Dump("comfy")
    for layer in UNET + CONVOLUTIONS + OTHERS:
        lora(dump, layer.module, f"diffusion_model.{layer.ldm}", layer, KOHYA, alpha=3.0)
    for layer in TEXT:
        key = f"text_encoders.clip_l.transformer.text_model.{layer.module}"
        lora(dump, f"text_encoder.{layer.module}", key, layer, KOHYA, alpha=1.0)
        key = f"text_encoders.clip_g.transformer.text_model.{layer.module}"
        lora(dump, f"text_encoder_2.{layer.module}", key, layer, PEFT)
    return dump


def motion(prefix: str = "") -> Dump:
    """AnimateDiff's MotionLoRA in the names of its own code."""
    dump = Dump("motion")
    for block in ("down_blocks.0", "up_blocks.3"):
        for attention in (0, 1):
            for leaf in ("to_q", "to_out"):
                module = f"unet.{block}.motion_modules.0.transformer_blocks.0.attn{attention + 1}.{leaf}" + (
                    ".0" if leaf == "to_out" else ""
                )
                home = (
                    f"{prefix}{block}.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.{attention}"
                )
                layer = Layer(module, "", "", (320, 320))
                lora(dump, module, f"{home}.processor.{leaf}_lora", layer, (".down.weight", ".up.weight"), rank=2)
    return dump


def motion_director() -> Dump:
    """MotionDirector for AnimateDiff: the last word of every temporal layer gets the ``_lora``, numbers too."""
    dump = Dump("motion")
    block = "down_blocks.1.motion_modules.0.transformer_blocks.0"
    theirs = "down_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0"
    for ours, home, leaf, shape in (
        ("attn1.to_q", "attention_blocks.0", "to_q", (8, 8)),
        ("attn2.to_out.0", "attention_blocks.1.to_out", "0", (8, 8)),
        ("ff.net.0.proj", "ff.net.0", "proj", (64, 8)),
        ("ff.net.2", "ff.net", "2", (8, 32)),
    ):
        layer = Layer(f"unet.{block}.{ours}", "", "", shape)
        lora(dump, layer.module, f"{theirs}.{home}.processor.{leaf}_lora", layer, (".down.weight", ".up.weight"))
    return dump


def motion_director_spatial() -> Dump:
    """MotionDirector's spatial part, in the names of attention processors, also where there is none."""
    dump = Dump("processor")
    keys = (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q_lora",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora",
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
        "up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj_lora",
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2_lora",
    )
    for layer, key in zip(UNET, keys, strict=True):
        lora(dump, layer.module, key, layer, (".down.weight", ".up.weight"))
    return dump


def one_trainer() -> Dump:
    """OneTrainer's newer layout: short prefixes before the original names."""
    dump = Dump("diffusers")
    for layer in UNET + CONVOLUTIONS + OTHERS:
        lora(dump, layer.module, f"unet.{layer.ldm}", layer, KOHYA, alpha=2.0)
    for layer in TEXT:
        for short, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
            lora(dump, f"{component}.{layer.module}", f"{short}.text_model.{layer.module}", layer, KOHYA, alpha=2.0)
    return dump


def normed(weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """Each slice of ``weight`` along ``axis`` scaled to the length ``magnitude`` names."""
    scaled = weight.clone()
    for i in range(weight.shape[axis]):
        part = weight.select(axis, i)
        scaled.select(axis, i).copy_(part / part.norm() * magnitude.flatten()[i].double())
    return scaled


def dora(kind: str) -> Dump:
    """DoRA as LyCORIS stores it (per output or per input channel) and as PEFT does."""
    dump = Dump("diffusers" if kind == "peft" else "kohya")
    for layer in UNET + CONVOLUTIONS:
        key = layer.module if kind == "peft" else f"lora_unet_{layer.flat}"
        lora(dump, layer.module, key, layer, PEFT if kind == "peft" else KOHYA, alpha=None if kind == "peft" else 2.0)
        plain = dump.expected[layer.module]
        axis = 1 if kind == "input" else 0
        magnitude = torch.rand(layer.shape[axis]) + 0.5
        kernel = [1] * (len(layer.shape) - 2)
        if kind == "peft":
            dump.tensors[f"{key}.lora_magnitude_vector"] = magnitude.reshape(1, -1, *kernel) if kernel else magnitude
        else:
            dump.tensors[f"{key}.dora_scale"] = magnitude.reshape(*((1, -1) if axis else (-1, 1)), *kernel)
        dump.expected[layer.module] = lambda weight, plain=plain, m=magnitude, axis=axis: (
            normed(weight.double() + plain(weight), m, axis) - weight.double()
        )
    return dump


def locon_tucker() -> Dump:
    """LyCORIS LoCon with its convolution core in ``lora_mid``."""
    dump = Dump("kohya")
    for layer in CONVOLUTIONS[1:3]:
        out, into, *kernel = layer.shape
        key = f"lora_unet_{layer.flat}"
        down, mid, up = torch.randn(3, into, 1, 1), torch.randn(3, 3, *kernel), torch.randn(out, 3, 1, 1)
        dump.tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
        dump.tensors[f"{key}.alpha"] = torch.tensor(1.5)
        change = torch.zeros(layer.shape, dtype=torch.float64)
        for p in range(3):
            for q in range(3):
                outer = torch.outer(up[:, p, 0, 0], down[q, :, 0, 0]).double()
                change += outer[:, :, None, None] * mid[p, q].double()
        dump.expected[layer.module] = lambda weight, change=change: 0.5 * change
        dump.shapes[layer.module] = layer.shape
    return dump


def loha(*, tucker: bool = False, prefix: str = "lora_unet_") -> Dump:
    """LyCORIS LoHa; with ``tucker`` the convolution form with cores."""
    dump = Dump("lycoris" if prefix == "lycoris_" else "kohya")
    for layer in CONVOLUTIONS[1:] if tucker else UNET + CONVOLUTIONS:
        out, into, *kernel = layer.shape
        key, rank, factors = f"{prefix}{layer.flat}", 3, []
        flat = into if tucker else int(torch.Size(layer.shape[1:]).numel())
        for name in ("w1", "w2"):
            a = torch.randn(rank, out) if tucker else torch.randn(out, rank)
            b = torch.randn(rank, flat)
            dump.tensors |= {f"{key}.hada_{name}_a": a, f"{key}.hada_{name}_b": b}
            if tucker:
                core = torch.randn(rank, rank, *kernel)
                dump.tensors[f"{key}.hada_t{name[1]}"] = core
                full = torch.zeros(layer.shape, dtype=torch.float64)
                for p in range(rank):
                    for q in range(rank):
                        full += torch.outer(a[p], b[q]).double()[:, :, None, None] * core[p, q].double()
                factors.append(full)
            else:
                factors.append((a.double() @ b.double()).reshape(layer.shape))
        dump.tensors[f"{key}.alpha"] = torch.tensor(1.0)
        change = factors[0] * factors[1] / rank
        dump.expected[layer.module] = lambda weight, change=change: change
        dump.shapes[layer.module] = layer.shape
    return dump


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """The Kronecker product, block by block."""
    rows = [torch.cat([w1[i, j].double() * w2.double() for j in range(w1.shape[1])], dim=1) for i in range(w1.shape[0])]
    return torch.cat(rows, dim=0)


def lokr(kind: str) -> Dump:
    """LyCORIS LoKr: ``whole`` factors (alpha without effect), ``low`` rank second factor, or ``tucker`` convolutions."""
    dump = Dump("kohya")
    for layer in CONVOLUTIONS[1:] if kind == "tucker" else UNET + CONVOLUTIONS:
        out, into, *kernel = layer.shape
        key, rank = f"lora_unet_{layer.flat}", 2
        w1 = torch.randn(2, 4)
        dump.tensors[f"{key}.lokr_w1"] = w1
        dump.tensors[f"{key}.alpha"] = torch.tensor(1.0)
        rows, columns = out // 2, into // 4
        if kind == "whole":
            w2 = torch.randn(rows, columns, *kernel)
            dump.tensors[f"{key}.lokr_w2"] = w2
        elif kind == "low":
            flat = columns * int(torch.Size(kernel).numel())
            a, b = torch.randn(rows, rank), torch.randn(rank, flat)
            dump.tensors |= {f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
            w2 = (a @ b).reshape(rows, columns, *kernel)
        else:
            core, a, b = torch.randn(rank, rank, *kernel), torch.randn(rank, rows), torch.randn(rank, columns)
            dump.tensors |= {f"{key}.lokr_t2": core, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
            w2 = sum(torch.outer(a[p], b[q])[:, :, None, None] * core[p, q] for p in range(rank) for q in range(rank))  # type: ignore[assignment]
        change = kronecker(w1, w2) * (1.0 if kind == "whole" else 1.0 / rank)
        dump.expected[layer.module] = lambda weight, change=change: change
        dump.shapes[layer.module] = layer.shape
    return dump


DUMPS: dict[str, Callable[[], Dump]] = {
    "kohya": kohya,
    "kohya without alpha": lambda: kohya(alpha=None),
    "kohya, LDM names, first encoder of SDXL": lambda: kohya(ldm=True, text="lora_te1_"),
    "kohya, LDM names, second encoder of SDXL": lambda: kohya(ldm=True, text="lora_te2_"),
    "diffusers lora_A": lambda: diffusers(PEFT, PEFT),
    "diffusers lora_A, flat text names": lambda: diffusers(PEFT, PEFT, wrapper=""),
    "diffusers lora.down": lambda: diffusers(OLD_UNET, OLD_TEXT),
    "processor": lambda: processor("unet."),
    "processor, bare": lambda: processor(""),
    "processor, distributed": lambda: processor("unet.module."),
    "PEFT": lambda: peft("base_model.model."),
    "PEFT, text encoder": lambda: peft("base_model.model.text_model.", TEXT),
    "PEFT, bare": lambda: peft(""),
    "PEFT, with adapter name": lambda: peft("base_model.model.", adapter=".default_0"),
    "ComfyUI": comfy,
    "MotionLoRA": motion,
    "MotionLoRA, distributed": lambda: motion("module."),
    "MotionDirector": motion_director,
    "MotionDirector, spatial": motion_director_spatial,
    "OneTrainer": one_trainer,
    "DoRA, per output": lambda: dora("output"),
    "DoRA, per input": lambda: dora("input"),
    "DoRA, PEFT": lambda: dora("peft"),
    "LoCon with core": locon_tucker,
    "LoHa": loha,
    "LoHa, library names": lambda: loha(prefix="lycoris_"),
    "LoHa with cores": lambda: loha(tucker=True),
    "LoKr, whole": lambda: lokr("whole"),
    "LoKr, low rank": lambda: lokr("low"),
    "LoKr with core": lambda: lokr("tucker"),
}  # fmt: skip
