"""Tiny random models for every test: the structure of the embedded base, a thousandth of its size. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import nn

    from studio.base import Base
    from studio.lora.model import Lora

# Before any import of a library that reads it: no hub is ever asked.
os.environ["HF_HUB_OFFLINE"] = "1"

WORDS = ("a", "red", "green", "apple", "cat", "dog", "on", "grass", "the", "left", "of", "photo", "sks", "style", "in", "night")
CONTEXT = 16


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of the tests stay out of the user's home."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to a network is closed, and the libraries are not told to stay offline by themselves."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def tiny_tokenizer() -> object:
    """A CLIP tokenizer that knows :data:`WORDS` as single tokens and every byte."""
    from transformers import CLIPTokenizer

    from studio.clip import byte_symbols

    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens.append(pieces[0])
    unique = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {token: index for index, token in enumerate(unique)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=CONTEXT)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stock random ``StableDiffusionPipeline``: latent factor 4, sides from 16 in multiples of 4, 16 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text_encoder = CLIPTextModel(config)
    for name, weight in text_encoder.named_parameters():
        if weight.ndim > 1:
            # The library starts CLIP so small that all prompts would look alike.
            torch.nn.init.normal_(weight, std=1.0 if "embedding" in name else weight.shape[-1] ** -0.5)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(16, 32, 48),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 4, 6), norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=8, norm_num_groups=4, sample_size=64, mid_block_add_attention=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    pipeline.save_pretrained(folder)
    (folder / "studio.json").write_text(json.dumps({"name": "tiny", "family": "embedded"}), "utf-8")
    return folder


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> Base:
    """The tiny base, loaded."""
    from studio.base import load_base

    return load_base(tiny_base, device="cpu")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    """A random SDXL of the tiny base's parts: two text encoders, pooled text and sizes as extra conditions."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        **{**base.text_encoder.config.to_dict(), "projection_dim": 24, "hidden_size": 48, "num_attention_heads": 4}
    )
    second = CLIPTextModelWithProjection(config)
    for weight in second.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 48, attention_head_dim=(2, 4), norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=base.text_encoder, text_encoder_2=second, tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer, unet=unet, scheduler=base.scheduler, force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bases") / "tiny-xl"
    pipeline.save_pretrained(folder)
    return folder


MakeLora = Callable[..., "Lora"]


def layers_of(models: dict[str, nn.Module], wanted: str) -> dict[str, nn.Module]:
    """Linear and convolution layers of ``models`` whose name contains one of the words of ``wanted``."""
    from torch import nn

    return {
        f"{part}.{path}": module
        for part, model in models.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(word in f"{part}.{path}" for word in wanted.split())
    }


@pytest.fixture(scope="session")
def make_lora(base: Base) -> MakeLora:
    """``make_lora(seed, wanted="attn1 attn2", rank=4, alpha=2.0, size=0.3, **metadata)``: a random LoRA for the tiny base."""
    import torch

    from studio.lora.model import Lora, LoraDelta

    def make(
        seed: int, wanted: str = "attn1 attn2", rank: int = 4, alpha: float = 2.0, size: float = 0.3, **metadata: str
    ) -> Lora:
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for name, module in layers_of(base.models(), wanted).items():
            out, *into = module.weight.shape
            up = (out, rank, 1, 1) if len(into) == 3 else (out, rank)
            layers[name] = LoraDelta(
                down=torch.randn(rank, *into, generator=generator) * size,
                up=torch.randn(up, generator=generator) * size,
                alpha=alpha,
            )
        return Lora(layers=layers, metadata={"studio." + key: value for key, value in metadata.items()})

    return make
