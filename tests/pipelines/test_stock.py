"""A shipped LoRA makes the same picture here and in stock diffusers, which knows nothing of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import generate
from studio.base import load_base
from studio.lora.files import load_lora
from studio.lora.write import Layout, save_lora
from studio.paths import assets

pytestmark = pytest.mark.usefixtures("no_network")
STEPS, GUIDANCE, SEED = 5, 5.0, 11
LEVELS = 2
"""Levels of 255 that the two may differ by."""


@pytest.fixture(scope="module")
def stock() -> Any:
    """The embedded base in the stock pipeline."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(assets() / "base", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_picture(pipeline: Any, prompt: str, lora: Path | None) -> np.ndarray:
    from compose.denoise import generators_of, initial_noise

    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, use_safetensors=True)
    try:
        noise = initial_noise(load_base(device="cpu"), generators_of([SEED]), (64, 64))
        image = pipeline(
            prompt, negative_prompt="", width=64, height=64, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise
        ).images[0]
    finally:
        pipeline.unload_lora_weights()
    return np.asarray(image).astype(int)


def our_picture(prompt: str, lora: Path | None) -> np.ndarray:
    result = generate(
        prompt,
        loras=() if lora is None else [str(lora)],
        scheduler="ddim",
        steps=STEPS,
        guidance=GUIDANCE,
        seed=SEED,
        device="cpu",
    )
    return np.asarray(result.images[0]).astype(int)


@pytest.mark.parametrize(("name", "layout"), [("pastel", "diffusers"), ("cat-face", "kohya")])
def test_a_shipped_lora_in_stock_diffusers(stock: Any, name: str, layout: Layout, tmp_path: Path) -> None:
    shipped = assets() / "loras" / f"{name}.safetensors"
    lora = load_lora(shipped)
    file = shipped if layout == "diffusers" else save_lora(tmp_path / shipped.name, lora, layout)
    prompt = f"{lora.trigger} apple"
    with_it, without = our_picture(prompt, file), our_picture(prompt, None)
    assert np.abs(with_it - stock_picture(stock, prompt, file)).max() <= LEVELS
    assert np.abs(without - stock_picture(stock, prompt, None)).max() <= LEVELS
    assert np.abs(with_it - without).mean() > 5, "the LoRA changes the picture"
