from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compose.text import chunk_ids, chunks_of, encode, encode_pair
from studio.base import Base, load_base

LONG = "a red apple on the left of a green dog on grass and a cat in the night on the left"


@pytest.fixture(scope="module")
def stock(tiny_base: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_base)


def test_short_prompts_are_encoded_as_by_the_stock_pipeline(base: Base, stock: Any) -> None:
    for prompt in ("a red apple", "", "ein Bär!"):
        expected, empty = stock.encode_prompt(prompt, "cpu", 1, True, negative_prompt="night")
        negative, positive = encode_pair(base, [prompt], ["night"])
        torch.testing.assert_close(positive.states, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(negative.states, empty, atol=1e-6, rtol=1e-5)


def test_long_prompts_lose_no_word(base: Base) -> None:
    chunks = chunk_ids(base.tokenizer, LONG, base.context_length)
    assert [len(chunk) for chunk in chunks] == [16, 16]
    body = base.tokenizer(LONG, add_special_tokens=False).input_ids
    special = {base.tokenizer.bos_token_id, base.tokenizer.eos_token_id}
    assert [token for chunk in chunks for token in chunk if token not in special] == body
    negative, positive = encode_pair(base, [LONG], ["night"])
    assert positive.states.shape == negative.states.shape == (1, 32, 32)
    assert positive.ids.shape == (1, 32)
    for index, chunk in enumerate(chunks):
        alone = base.text_encoder(torch.tensor([chunk])).last_hidden_state
        torch.testing.assert_close(positive.states[:, 16 * index : 16 * index + 16], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(negative.states[:, 16:], encode(base, [""]).states, atol=1e-5, rtol=1e-4)


def test_a_prompt_that_just_fits_is_one_chunk(base: Base) -> None:
    assert chunks_of(base, ["a " * 14]) == 1
    assert chunks_of(base, ["a " * 15]) == 2


@pytest.mark.parametrize("negative", ["", "night"])
def test_sdxl_equals_the_stock_pipeline(tiny_sdxl: Path, negative: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    from compose.denoise import denoise, generators_of, initial_noise

    base = load_base(tiny_sdxl, device="cpu")
    assert base.family.name == "sdxl"
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    size = (64, 32)
    expected = stock(
        "a red apple", negative_prompt=negative or None, width=size[0], height=size[1], num_inference_steps=4,
        guidance_scale=4.0, latents=initial_noise(base, generators_of([5]), size), output_type="latent",
    ).images  # fmt: skip
    uncond, cond = encode_pair(base, ["a red apple"], [negative])
    got = denoise(base, uncond, cond, seeds=[5], size=size, steps=4, guidance=4.0, scheduler="ddim")
    assert (got - expected).abs().max() <= 1e-4
