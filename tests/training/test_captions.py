"""What becomes of captions on their way to the text encoder: shuffled clauses, and more than one chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compose.text import encode, words_of
from compose.tokens import chunks, length, literal
from studio.base import Base
from studio.lora.files import read_header
from tests.training.conftest import Configure
from training import describe, train_concept
from training.batches import Captions, shuffled
from training.progress import Progress
from training.text import Reader

TAGS = "zqx apple, on the left, red, on grass, in the sun"


def quiet(progress: Progress) -> None:
    pass


def test_clauses_change_places_and_the_first_ones_stay() -> None:
    draw = torch.Generator().manual_seed(0)
    orders = {shuffled(TAGS, 1, draw) for _ in range(200)}
    assert len(orders) == 24 and TAGS in orders
    assert all(text.startswith("zqx apple, ") and sorted(text.split(", ")) == sorted(TAGS.split(", ")) for text in orders)
    assert {shuffled(TAGS, 9, draw) for _ in range(9)} == {TAGS}
    assert shuffled("one ,two,, ", 2, draw) == "one, two" and shuffled("", 0, draw) == ""
    assert not all(shuffled(TAGS, 0, draw).startswith("zqx") for _ in range(20))


def test_shuffled_captions_train_and_resume_alike(configure: Configure, pictures: Path) -> None:
    for text in pictures.glob("*.txt"):
        text.write_text(TAGS, "utf-8")
    plain = train_concept(configure(cache_text=False), quiet).losses
    changes = {"shuffle_caption": True, "keep_tokens": 1, "prior": "consistency", "checkpoint_every": 2}
    whole = train_concept(configure(**changes, restart=True), quiet)
    bits = whole.path.read_bytes()
    assert abs(whole.losses[0] - plain[0]) > 1e-4
    assert read_header(whole.path).metadata["ss_keep_tokens"] == "1"

    def killed(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyError("as if killed")

    whole.path.unlink()
    with pytest.raises(KeyError):
        train_concept(configure(**changes), killed)
    again = train_concept(configure(**changes), quiet)
    assert "resumed at step 2" in again.notes and again.path.read_bytes() == bits


def test_shuffled_captions_are_forgotten_with_their_batch(
    configure: Configure, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in pictures.glob("*.txt"):
        text.write_text(TAGS, "utf-8")
    known: list[list[str]] = []
    forget = Captions.forget

    def watched(self: Captions, count: int) -> None:
        known.append(list(self.texts))
        forget(self, count)
        assert len(self.texts) == count and all(self.number(text) == index for index, text in enumerate(self.texts))

    monkeypatch.setattr(Captions, "forget", watched)
    train_concept(configure(shuffle_caption=True, steps=12, prior="consistency"), quiet)
    first = len(known[0])
    assert len({text for texts in known for text in texts[first:]}) > 4
    assert all(len(texts) <= first + 4 for texts in known)


def test_several_chunks_are_read_as_generation_reads_them(base: Base) -> None:
    long = "a frog on grass, " * 20
    words = words_of(base)["text_encoder"]
    count = length(words, long)
    assert count > 2
    assert literal(words, long, count) == chunks(words, long)
    read = Reader(base, count=count).read_frozen([long, "a frog"])
    wanted = encode(base, [long, "a frog"])
    torch.testing.assert_close(read.states, wanted.states, atol=1e-5, rtol=1e-5)
    assert torch.equal(read.ids, wanted.ids)
    for fewer in (1, 2):
        end = words.tokenizer.eos_token_id
        assert all(chunk.ids.index(end) == words.context - 1 for chunk in literal(words, long, fewer))  # filled to the brim


def test_no_order_of_clauses_leaves_anything_out(base: Base) -> None:
    """Chunks that end at commas may need one more; then they are filled instead."""
    words, draw = words_of(base)["text_encoder"], torch.Generator().manual_seed(1)
    rng = np.random.default_rng(2)
    tags = ", ".join(" ".join(rng.choice(["red", "blue", "green"], rng.integers(1, 6))) for _ in range(12))
    count = length(words, tags)
    orders = [shuffled(tags, 0, draw) for _ in range(100)]
    assert max(len(chunks(words, text)) for text in orders) > count
    special = {words.tokenizer.bos_token_id, words.tokenizer.eos_token_id}
    for text in orders:
        read = [token for chunk in literal(words, text, count) for token in chunk.ids if token not in special]
        assert read == words.tokenizer.convert_tokens_to_ids(words.tokenizer.tokenize(text))


def test_long_captions_train_whole_when_asked(configure: Configure, pictures: Path) -> None:
    (pictures / "0.txt").write_text(TAGS + ", on grass" * 15, "utf-8")
    note = next(note for note in describe(configure()).notes if "are cut" in note)
    assert note.startswith("1 captions are longer than caption_chunks 1 reads")
    needed = int(note.split("it would take ")[1].rstrip(")"))
    assert needed > 2 and not any("are cut" in note for note in describe(configure(caption_chunks=needed)).notes)
    assert any("are cut" in note for note in describe(configure(caption_chunks=needed - 1)).notes)
    less, more = (describe(configure(train_text="lora", caption_chunks=count)).memory_bytes for count in (1, needed))
    assert less < more
    for changes in ({}, {"train_text": "embedding+lora"}):
        result = train_concept(configure(caption_chunks=needed, restart=True, **changes), quiet)
        assert all(loss == loss for loss in result.losses)
        assert int(read_header(result.path).metadata["ss_max_token_length"]) % needed == 0
    assert (
        train_concept(configure(restart=True), quiet).losses
        != train_concept(configure(caption_chunks=needed, restart=True), quiet).losses
    )


def test_prompts_of_the_prior_count_too(configure: Configure) -> None:
    long = ("a cat on grass, " * 12,)
    assert any("'a cat on grass," in note for note in describe(configure(prior_prompts=long)).notes if "are cut" in note)
    result = train_concept(configure(prior_prompts=long, caption_chunks=8), quiet)
    assert "ss_max_token_length" in read_header(result.path).metadata


def test_a_learnt_trigger_takes_its_places(configure: Configure, pictures: Path) -> None:
    """A caption that is short enough as text, and too long with the vectors of the trigger."""
    for text in pictures.glob("*.txt"):
        text.write_text("zqx apple", "utf-8")
    assert not any("are cut" in note for note in describe(configure()).notes)
    told = describe(configure(train_text="embedding", tokens=14)).notes
    assert any("are cut" in note for note in told)
