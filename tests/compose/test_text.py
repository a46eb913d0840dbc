from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compose.text import Reading, chunks_of, encode, encode_pair, weighted, words_of
from compose.tokens import Words, chunks, learnt, one_chunk
from studio.base import Base, load_base
from studio.embeddings import load_embedding
from studio.errors import RequestError, WrongBaseError

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
    cut = [chunk.ids for chunk in chunks(words_of(base)["text_encoder"], LONG)]
    assert [len(chunk) for chunk in cut] == [16, 16]
    body = base.tokenizer(LONG, add_special_tokens=False).input_ids
    special = {base.tokenizer.bos_token_id, base.tokenizer.eos_token_id}
    assert [token for chunk in cut for token in chunk if token not in special] == body
    negative, positive = encode_pair(base, [LONG], ["night"])
    assert positive.states.shape == negative.states.shape == (1, 32, 32)
    assert positive.ids.shape == (1, 32)
    for index, chunk in enumerate(cut):
        alone = base.text_encoder(torch.tensor([chunk])).last_hidden_state
        torch.testing.assert_close(positive.states[:, 16 * index : 16 * index + 16], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(negative.states[:, 16:], encode(base, [""]).states, atol=1e-5, rtol=1e-4)


def test_a_prompt_that_just_fits_is_one_chunk(base: Base) -> None:
    assert chunks_of(base, ["a " * 14]) == 1
    assert chunks_of(base, ["a " * 15]) == 2


def bodies(words: Words, text: str) -> list[str]:
    """The words of each chunk."""
    special = {words.tokenizer.bos_token_id, words.tokenizer.eos_token_id, words.tokenizer.pad_token_id}
    return [
        words.tokenizer.decode([token for token in chunk.ids if token not in special]).strip() for chunk in chunks(words, text)
    ]


def test_a_full_chunk_is_cut_at_a_near_comma(base: Base) -> None:
    words = words_of(base)["text_encoder"]
    near = bodies(words, "a " * 11 + ", red apple cat")
    assert near == [("a " * 11).strip() + " ,", "red apple cat"]
    far = bodies(words, "a " * 8 + ", a a a a a red apple")
    assert [len(body.split()) for body in far] == [14, 2]
    assert bodies(words, "a " * 14 + ", red") == [("a " * 14).strip(), ", red"]


def test_break_begins_a_chunk(base: Base) -> None:
    words = words_of(base)["text_encoder"]
    assert bodies(words, "a cat BREAK a dog") == ["a cat", "a dog"]
    assert bodies(words, "a cat BREAK") == ["a cat"]
    assert bodies(words, "BREAK a cat BREAK BREAK a dog") == ["", "a cat", "", "a dog"]
    assert encode(base, ["a cat BREAK a dog", "a cat"]).states.shape == (2, 32, 32)


def test_weights_scale_their_columns_and_keep_the_mean(base: Base) -> None:
    plain = encode(base, ["a red apple on grass"]).states
    both = encode(base, ["a (red apple:1.5) on [grass]", "a red apple on grass"]).states
    assert torch.equal(both[1:], plain)
    factors = torch.ones(16)
    factors[2:4], factors[5] = 1.5, 1 / 1.1
    torch.testing.assert_close(both[:1], weighted(plain, factors[None]), atol=1e-5, rtol=1e-4)
    assert (both[0] - plain[0]).abs().max() > 0.1
    assert torch.equal(encode(base, [r"a red apple (on:1.0) grass"]).states, plain)
    assert encode(base, ["(a red apple:0)"]).states.isfinite().all()


def test_each_chunk_keeps_its_own_mean(base: Base) -> None:
    first, second = (encode(base, [text]).states for text in ("a (cat:2)", "a dog"))
    torch.testing.assert_close(encode(base, ["a (cat:2) BREAK a dog"]).states, torch.cat([first, second], 1))


def test_clip_skip_reads_a_layer_below(base: Base) -> None:
    from transformers import CLIPTextModel

    config = base.text_encoder.config.to_dict() | {"num_hidden_layers": 1}
    short = CLIPTextModel(type(base.text_encoder.config)(**config))
    short.load_state_dict({k: v for k, v in base.text_encoder.state_dict().items() if "layers.1." not in k})
    ids = torch.tensor([chunks(words_of(base)["text_encoder"], "a red apple")[0].ids])
    expected = short.eval()(ids).last_hidden_state
    torch.testing.assert_close(encode(base, ["a red apple"], reading=Reading(clip_skip=2)).states, expected)
    with pytest.raises(RequestError, match="clip skip 3 is more than the 2 layers"):
        encode(base, ["a cat"], reading=Reading(clip_skip=3))


def write_embedding(path: Path, **tensors: torch.Tensor) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path


def test_learnt_words_stand_in_their_columns(base: Base, tmp_path: Path) -> None:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    reading = Reading(embeddings=(load_embedding(write_embedding(tmp_path / "my-cat.safetensors", emb_params=vectors)),))
    got = encode(base, ["a (My-Cat:1.2) on grass", "a cat"], reading=reading)
    words = words_of(base, reading)["text_encoder"]
    (chunk,) = chunks(words, "a (my-cat:1.2) on grass")
    assert chunk.weights[2:5] == [1.2, 1.2, 1.0]

    table = base.text_encoder.get_input_embeddings()
    ids = torch.tensor([chunk.ids])
    unused = torch.tensor([5, 6])
    before = table.weight.data[unused].clone()
    ids[0, 2:4] = unused
    try:
        table.weight.data[unused] = vectors
        plain = base.text_encoder(ids).last_hidden_state[0]
    finally:
        table.weight.data[unused] = before
    expected = weighted(plain[None], torch.tensor([chunk.weights]))[0]
    torch.testing.assert_close(got.states[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.states[1:], encode(base, ["a cat"]).states)
    assert learnt(reading.embeddings, "a cat (embedding:my-cat)") == {"my-cat"}
    assert learnt(reading.embeddings, "a my-cats xmy-cat") == set()


def test_a_learnt_word_is_never_cut(base: Base, tmp_path: Path) -> None:
    vectors = torch.randn(5, 32)
    reading = Reading(embeddings=(load_embedding(write_embedding(tmp_path / "w.safetensors", **{"<w>": vectors})),))
    words = words_of(base, reading)["text_encoder"]
    cut = chunks(words, "a " * 10 + "<w> cat")
    assert [list(chunk.vectors) for chunk in cut] == [[], [1]]
    long = Reading(embeddings=(load_embedding(write_embedding(tmp_path / "l.safetensors", emb_params=torch.ones(15, 32))),))
    with pytest.raises(RequestError, match="'l' takes 15 tokens, but a chunk has 14"):
        encode(base, ["l"], reading=long)


def test_embeddings_of_another_family_are_one_sentence(base: Base, tiny_sdxl: Path, tmp_path: Path) -> None:
    wide = load_embedding(write_embedding(tmp_path / "wide.safetensors", emb_params=torch.ones(1, 48)))
    with pytest.raises(WrongBaseError, match="vectors of 48 numbers, but the base's text encoder has 32"):
        encode(base, ["wide"], reading=Reading(embeddings=(wide,)))
    xl = load_base(tiny_sdxl, device="cpu")
    narrow = load_embedding(write_embedding(tmp_path / "narrow.safetensors", emb_params=torch.ones(1, 32)))
    with pytest.raises(WrongBaseError, match="'narrow' has no part for the base's text encoder 2"):
        encode(xl, ["narrow"], reading=Reading(embeddings=(narrow,)))
    two = load_embedding(write_embedding(tmp_path / "two.safetensors", clip_l=torch.ones(2, 32), clip_g=torch.ones(2, 48)))
    with_word = encode(xl, ["a two"], reading=Reading(embeddings=(two,)))
    assert (with_word.pooled - encode(xl, ["a two"]).pooled).abs().max() > 1e-3


def test_sdxl_weights_each_encoder_and_leaves_the_pooled_vector(tiny_sdxl: Path) -> None:
    xl = load_base(tiny_sdxl, device="cpu")
    plain, heavy = (encode(xl, [text]) for text in ("a cat", "a (cat:1.5)"))
    assert torch.equal(plain.pooled, heavy.pooled)
    factors = torch.ones(1, 16)
    factors[0, 2] = 1.5
    for part in (slice(0, 32), slice(32, 80)):
        torch.testing.assert_close(heavy.states[..., part], weighted(plain.states[..., part], factors))
        assert (heavy.states - plain.states)[..., part].abs().max() > 0.1


def test_the_mean_is_brought_back_where_it_says_something() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 20, 30, generator=generator)
    weights = torch.ones(1, 20)
    weights[0, 3:7], weights[0, 9] = 1.4, 0.5
    plain = noise - 0.3  # as CLIP's, clearly beside zero
    got = weighted(plain, weights)
    assert got.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)
    torch.testing.assert_close(got / got[:, :1], plain * weights[..., None] / plain[:, :1])
    centred = noise - noise.mean()
    assert torch.equal(weighted(centred, weights), centred * weights[..., None])
    # A mean that the weights carry over zero: the factor stays at its bound.
    odd = torch.cat([torch.full((1, 10, 30), 1.0), torch.full((1, 10, 30), -0.8)], 1)
    heavy = torch.cat([torch.ones(1, 10), torch.full((1, 10), 2.0)], 1)
    torch.testing.assert_close(weighted(odd, heavy), odd * heavy[..., None] / 2)
    assert torch.equal(weighted(plain, torch.zeros(1, 20)), torch.zeros_like(plain))
    assert torch.equal(weighted(plain, torch.ones(1, 20)), plain)


def test_readers_of_columns_name_the_words_that_are_too_many(base: Base) -> None:
    words = words_of(base)["text_encoder"]
    one_chunk(words, "a red apple", "the method 'x'")
    with pytest.raises(RequestError, match=r"the method 'x' reads the places of words.* 14 tokens: leave out 'red apple'"):
        one_chunk(words, "a " * 14 + "red apple", "the method 'x'")


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
