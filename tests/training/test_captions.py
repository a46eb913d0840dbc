"""What becomes of captions on their way to the text encoder: shuffled clauses, and more than one chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compose.text import encode, words_of
from compose.tokens import chunks, length, literal
from studio.base import Base
from studio.lora.files import read_header
from tests.training.conftest import Configure
from training import describe, train_concept
from training.batches import shuffled
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
    plain = train_concept(configure(), quiet).losses
    changes = {"shuffle_caption": True, "keep_tokens": 1, "prior": "consistency", "checkpoint_every": 2}
    whole = train_concept(configure(**changes, restart=True), quiet)
    bits = whole.path.read_bytes()
    assert whole.losses[0] != plain[0]
    assert read_header(whole.path).metadata["ss_keep_tokens"] == "1"

    def killed(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyError("as if killed")

    whole.path.unlink()
    with pytest.raises(KeyError):
        train_concept(configure(**changes), killed)
    again = train_concept(configure(**changes), quiet)
    assert "resumed at step 2" in again.notes and again.path.read_bytes() == bits


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
    two = literal(words, long, 2)
    assert two[0] == chunks(words, long)[0] and len(two) == 2 and len(set(two[1].ids)) > 2
    (one,) = literal(words, long)
    assert len(one.ids) == words.context and one.ids[-2] != words.tokenizer.eos_token_id  # filled to the last column


def test_long_captions_train_whole_when_asked(configure: Configure, pictures: Path) -> None:
    (pictures / "0.txt").write_text(TAGS + ", on grass" * 15, "utf-8")
    cut = describe(configure())
    note = next(note for note in cut.notes if "are cut" in note)
    needed = int(note.split("caption_chunks ")[1].split()[0])
    assert needed > 1 and not any("are cut" in note for note in describe(configure(caption_chunks=needed)).notes)
    assert any("are cut" in note for note in describe(configure(caption_chunks=needed - 1)).notes) or needed == 2
    for changes in ({}, {"train_text": "embedding+lora"}):
        result = train_concept(configure(caption_chunks=needed, restart=True, **changes), quiet)
        assert all(loss == loss for loss in result.losses)
        assert int(read_header(result.path).metadata["ss_max_token_length"]) % needed == 0
    assert (
        train_concept(configure(restart=True), quiet).losses
        != train_concept(configure(caption_chunks=needed, restart=True), quiet).losses
    )


def test_a_learnt_trigger_takes_its_places(configure: Configure, pictures: Path) -> None:
    """A caption that is short enough as text, and too long with the vectors of the trigger."""
    for text in pictures.glob("*.txt"):
        text.write_text("zqx apple", "utf-8")
    assert not any("are cut" in note for note in describe(configure()).notes)
    told = describe(configure(train_text="embedding", tokens=14)).notes
    assert any("are cut" in note for note in told)
