"""Where the words of a prompt stand among the text encoder's columns: triggers and nouns, for methods that read or mask them.

Positions come from the tokenizer's own offsets, so a word may be several tokens, stand in brackets, be a learnt word, or come
twice; the columns count the begin token of each chunk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compose.tokens import Words, _split, chunks
from studio.errors import RequestError
from studio.prompts import escape, parse

if TYPE_CHECKING:
    from compose.bank import Adapter


@dataclass(frozen=True)
class Found:
    """One occurrence of a phrase: its text as written and its columns, counted over all chunks."""

    text: str
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Spelling:
    """A prompt without its brackets, and for each token where it begins and ends there and which columns it takes."""

    plain: str
    spans: tuple[tuple[int, int], ...]
    columns: tuple[int, ...]


def spell(words: Words, prompt: str) -> Spelling:
    """The tokens of ``prompt`` with their places in its plain text and their columns."""
    plain = ""
    spans: list[tuple[int, int]] = []
    for index, section in enumerate(parse(prompt).sections):
        plain += "\n" if index else ""
        for piece in section:
            for embedding, text in _split(words.embeddings, piece.text):
                start = len(plain)
                plain += text
                if embedding is not None:
                    spans += [(start, len(plain))] * embedding.tokens
                elif text:
                    told = words.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                    spans += [(start + first, start + last) for first, last in told.offset_mapping]
    columns = [
        number * words.context + column
        for number, chunk in enumerate(chunks(words, prompt))
        for column in range(1, chunk.used + 1)
    ]
    if len(columns) != len(spans):
        raise RuntimeError(f"{len(spans)} tokens but {len(columns)} columns: the tokenizer reads pieces and whole differently")
    return Spelling(plain, tuple(spans), tuple(columns))


def find(words: Words, prompt: str, phrase: str) -> list[Found]:
    """Every occurrence of ``phrase`` as whole words, in order; capitals and the width of gaps do not matter."""
    spelling = spell(words, prompt)
    if not phrase.split():
        return []
    found = []
    for match in re.finditer(whole_words(phrase), spelling.plain, re.IGNORECASE):
        own = [
            column
            for (first, last), column in zip(spelling.spans, spelling.columns, strict=True)
            if first < match.end() and last > match.start()
        ]
        found.append(Found(match.group(), tuple(own)))
    return found


def locate(words: Words, prompt: str, phrase: str, occurrence: int = 0) -> Found:
    """One occurrence of ``phrase``; the second of two equal nouns is ``occurrence`` 1.

    Raises:
        RequestError: it does not occur, or not as often.
    """
    every = find(words, prompt, phrase)
    if not every:
        raise RequestError(f"'{phrase}' does not stand in the prompt '{prompt}': write it there, or name a word that does")
    if occurrence >= len(every):
        raise RequestError(f"'{phrase}' stands {len(every)} times in the prompt '{prompt}', not {occurrence + 1} times")
    return every[occurrence]


def noun_of(nouns: Sequence[Found], trigger: Found | None, taken: Collection[Found] = ()) -> Found | None:
    """Which occurrence of its noun is that of a trigger: the first that begins with it or later, else the last before it.

    Args:
        nouns: all occurrences, in order. trigger: None: not said, the first noun is meant. taken: those of other LoRAs.

    Returns:
        None where all are taken, or there is none.
    """
    free = [one for one in nouns if one.columns and one not in taken]
    start = trigger.columns[0] if trigger is not None and trigger.columns else 0
    after = [one for one in free if one.columns[0] >= start]
    return after[0] if after else free[-1] if free else None


def called(words: Words, prompt: str, adapters: Sequence[Adapter]) -> list[tuple[Found | None, Found | None]]:
    """Where ``prompt`` says the trigger and the class word of each LoRA; no two LoRAs have the same occurrence of a word.

    "trigger noun" belongs together whatever else is said, so those LoRAs choose first; then those whose trigger is said at all.
    """
    triggers = [noun_of(find(words, prompt, adapter.lora.trigger), None) for adapter in adapters]
    every = [find(words, prompt, adapter.lora.class_word) for adapter in adapters]

    def rank(index: int) -> int:
        trigger = triggers[index]
        if trigger is None:
            return 2
        reach = range(trigger.columns[0], trigger.columns[-1] + 2)
        return 0 if any(one.columns and one.columns[0] in reach for one in every[index]) else 1

    nouns: dict[int, Found | None] = {}
    taken: list[Found] = []
    for index in sorted(range(len(adapters)), key=rank):
        nouns[index] = noun_of(every[index], triggers[index], taken)
        taken += [own] if (own := nouns[index]) else []
    return [(trigger, nouns[index]) for index, trigger in enumerate(triggers)]


def with_triggers(prompt: str, adapters: Sequence[Adapter], *, strict: bool = False) -> tuple[str, list[str]]:
    """``prompt`` with the missing triggers of its LoRAs at its end, each as "trigger class", and a note for each.

    Raises:
        RequestError: ``strict``, and a trigger is missing.
    """
    notes = []
    for adapter in adapters:
        trigger = adapter.lora.trigger
        if adapter.weight == 0 or not trigger or says(prompt, trigger):
            continue
        if strict:
            raise RequestError(
                f"the prompt lacks the trigger '{trigger}' of LoRA '{adapter.name}': write it where the LoRA shall act"
            )
        added = adapter.lora.called
        prompt = f"{prompt.rstrip().removesuffix(',')}, {escape(added)}" if prompt.strip() else escape(added)
        notes.append(f"the prompt lacked the trigger '{trigger}' of LoRA '{adapter.name}': '{added}' was added at its end")
    return prompt, notes


def says(prompt: str, phrase: str) -> bool:
    """Whether ``phrase`` stands in ``prompt`` as whole words."""
    return re.search(whole_words(phrase), parse(prompt).plain, re.IGNORECASE) is not None


def whole_words(phrase: str) -> str:
    """The regular expression of ``phrase`` as whole words, with gaps of any width."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return rf"(?<!\w){words}(?!\w)"
