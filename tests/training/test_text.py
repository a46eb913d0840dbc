"""Captions are read as the stock pipeline reads a prompt, whatever they hold, and once however often they are asked for."""

from __future__ import annotations

import pytest
import torch

from compose.text import encode_pair
from studio.base import Base, load_base
from studio.lora.files import read_header
from tests.training.conftest import Configure
from training import train_concept
from training.batches import Captions
from training.progress import Progress
from training.text import Reader, known_words, lengths


def quiet(progress: Progress) -> None:
    pass


LONG = "a frog " * 40
CAPTIONS = ["a (frog:1.3) BREAK, [on the left]", "", LONG, "a (frog:1.3) BREAK, [on the left]"]


def test_states_are_those_of_the_stock_pipeline(base: Base) -> None:
    read = Reader(base).read_frozen(CAPTIONS)
    ids = base.tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=base.context_length, return_tensors="pt")
    with torch.no_grad():
        states = base.text_encoder(ids.input_ids)[0]
    assert torch.equal(read.ids, ids.input_ids)
    torch.testing.assert_close(read.states, states, atol=1e-5, rtol=1e-5)
    assert read.pooled is None
    assert not read.states.requires_grad


def test_both_encoders_of_sdxl_are_read(tiny_sdxl: object) -> None:
    base = load_base(str(tiny_sdxl), "cpu")
    assert base.tokenizer_2 is not None and base.text_encoder_2 is not None
    read = Reader(base).read_frozen(CAPTIONS)
    first, second = (
        words(CAPTIONS, padding="max_length", truncation=True, max_length=base.context_length, return_tensors="pt").input_ids
        for words in (base.tokenizer, base.tokenizer_2)
    )
    with torch.no_grad():
        one = base.text_encoder(first, output_hidden_states=True)
        two = base.text_encoder_2(second, output_hidden_states=True)
    assert read.pooled is not None
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    said = torch.tensor([bool(text) for text in CAPTIONS])
    torch.testing.assert_close(read.states[said], states[said], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read.pooled[said], two.text_embeds[said], atol=1e-5, rtol=1e-5)
    assert not read.states[~said].any() and not read.pooled[~said].any()


def test_a_caption_left_out_is_what_generation_has_without_a_negative(tiny_sdxl: object, base: Base) -> None:
    large = load_base(str(tiny_sdxl), "cpu")
    for given in (large, base):
        read, (wanted, _) = Reader(given).read_frozen([""]), encode_pair(given, ["a cat"], [""])
        torch.testing.assert_close(read.states, wanted.states, atol=1e-5, rtol=1e-5)
        assert (read.pooled is None) == (wanted.pooled is None)
        if read.pooled is not None and wanted.pooled is not None:
            assert torch.equal(read.pooled, wanted.pooled)


@pytest.mark.parametrize("text", ["none", "embedding+lora"])
def test_sdxl_learns_with_all_captions_left_out(configure: Configure, tiny_sdxl: object, text: str) -> None:
    config = configure(base=str(tiny_sdxl), train_text=text, caption_dropout=1.0, prior="none", steps=2)
    assert all(loss == loss for loss in train_concept(config, quiet).losses)


def test_an_earlier_layer_is_read_as_generation_reads_it(base: Base) -> None:
    ids = base.tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=base.context_length, return_tensors="pt")
    with torch.no_grad():
        layers = base.text_encoder(ids.input_ids, output_hidden_states=True).hidden_states
        wanted = base.text_encoder.final_layer_norm(layers[-2])
    numbers = torch.arange(3)
    for captions in (Captions(base, True, 2), Captions(base, False, 2)):
        assert [captions.number(text) for text in CAPTIONS] == [0, 1, 2, 0]
        torch.testing.assert_close(captions.states(numbers).states, wanted[:3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(Reader(base).read_frozen(CAPTIONS).states, wanted, atol=1e-2)


@pytest.mark.parametrize("text", ["none", "embedding"])
def test_clip_skip_reaches_the_training(configure: Configure, text: str) -> None:
    plain = train_concept(configure(train_text=text, steps=1), quiet)
    skipped = train_concept(configure(train_text=text, steps=1, clip_skip=2, restart=True), quiet)
    assert skipped.losses != plain.losses
    assert read_header(skipped.path).metadata["ss_clip_skip"] == "2"


@pytest.mark.parametrize("keep", [True, False])
def test_captions_by_number(base: Base, keep: bool) -> None:
    captions = Captions(base, keep)
    numbers = torch.tensor([captions.number(text) for text in CAPTIONS])
    assert numbers.tolist() == [0, 1, 2, 0]
    assert captions.called(numbers) == CAPTIONS
    picked = captions.states(numbers[[2, 0]])
    torch.testing.assert_close(picked.states, Reader(base).read_frozen([LONG, CAPTIONS[0]]).states, atol=1e-5, rtol=1e-5)
    later = captions.number("a caption that comes later")
    assert len(captions.states(torch.tensor([later])).states) == 1


def test_long_captions_and_known_words_are_told(base: Base) -> None:
    assert [count > 1 for count in lengths(base, ["a b", "", LONG])] == [False, False, True]
    assert known_words(base, "A b")
    assert not known_words(base, "a zqx")
