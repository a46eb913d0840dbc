"""The embedded base's tokenizer: a small CLIP-style byte-pair encoding of our own.

All 256 byte symbols are held with and without ``</w>``, because an unknown character would become the EOS id and cut the
prompt; BOS and EOS are the two last ids, because ``eos_token_id == 2`` takes a legacy branch in transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from studio.art.atlas import STYLES, concepts, splits
from studio.art.backgrounds import BASE, HELDOUT
from studio.art.captions import caption
from studio.art.clips import PHRASES as MOTION_PHRASES
from studio.art.looks import HELDOUT as LOOK_PHRASES
from studio.art.scenes import sample_scene

CONTEXT = 32
VOCABULARY = 6144
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
EXTRA = (
    "photo picture painting drawing illustration poster of the with without and or in on at by for from one two three "
    "four five wearing holding sitting standing next to above below behind front small big tiny huge cute happy sad "
    "funny old new young top bottom center middle left right corner sky ground water mountain forest city room street "
    "light dark bright colorful red orange yellow green blue purple pink brown black white gray grey golden silver "
    "hat crown bow glasses halo balloon low quality blurry ugly deformed high detailed best masterpiece sharp simple "
    "plain background style art sks ohwx running jumping flying swimming moving rising falling growing shrinking "
    "shaking bouncing spinning still slowly fast video clip"
)  # fmt: skip


def corpus(captions: int = 4000, seed: int = 3) -> list[str]:
    """Captions of base scenes, and every phrase people may use about this world."""
    from training.base.words import phrases

    rng = np.random.default_rng(seed)
    names = list(splits().named + splits().class_seen)
    lines = [
        caption(sample_scene(rng, [str(x) for x in rng.choice(names, 1 + i % 2, replace=False)], BASE + HELDOUT), rng)
        for i in range(captions)
    ]
    words = [
        *phrases(),
        *LOOK_PHRASES.values(),
        *MOTION_PHRASES.values(),
        *EXTRA.split(),
        *(p for s in STYLES.values() for p in s),
    ]
    words += [c.class_word for c in concepts().values()]
    return lines + [w for w in words for _ in range(20)]


def build() -> Any:
    """A ``transformers.CLIPTokenizer`` of :data:`VOCABULARY` ids."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # The same normaliser and splitter as CLIP's own, borrowed from a tokenizer with no merges.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = {s: i for i, s in enumerate(symbols + [s + "</w>" for s in symbols])}
    empty = CLIPTokenizer(vocab={**base, BOS: 512, EOS: 513}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([empty.backend_tokenizer.normalizer])
    learner.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=symbols, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    learner.train_from_iterator(corpus(), trainer)
    import json

    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - len(base) - 2]
    vocab = dict(base)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab[BOS], vocab[EOS] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=EOS, model_max_length=CONTEXT
    )
