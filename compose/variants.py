"""One prompt per LoRA out of one prompt for all, and which tokens of theirs speak of the same subject (CLoRA's token groups).

From "a zarn animal and a wexi dog":  p_0 "an animal and a dog",  p_1 "a zarn animal and a dog",
                                      p_2 "an animal and a wexi dog"

The class of a subject is its noun in every prompt, and its trigger in the prompt of its own. Two subjects may have the same
noun: they are told apart by which of its occurrences follows whose trigger.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.bank import Adapter
from compose.finder import Found, find, noun_of, spell, whole_words
from compose.tokens import Words, one_chunk
from studio.errors import RequestError


@dataclass(frozen=True)
class Subject:
    """What one LoRA draws, as the prompt says it.

    Args:
        name: of the LoRA. trigger: the words that go where the LoRA does not act; "" when it has none.
        noun: the words that stay. occurrence: which of the noun's occurrences is meant, from 0.
    """

    name: str
    trigger: str
    noun: str
    occurrence: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Variants:
    """Prompts ``p_0 .. p_K`` and their token sets.

    Args:
        prompts: ``p_0`` has no subject's trigger, ``p_k`` that of subject ``k`` alone.
        sets: 0 or 1 as ``[K + 1, K + 1, L]``: prompt, set, token column. Set ``s < K`` is the noun of subject ``s + 1``, the
            last one the trigger of the prompt's own subject; empty where there is none.
        maps: ``(prompt, set)`` of every map that has a class. classes: the class of each, ``0 .. K - 1``.
    """

    subjects: tuple[Subject, ...]
    prompts: tuple[str, ...]
    sets: Tensor
    maps: tuple[tuple[int, int], ...]
    classes: tuple[int, ...]

    def own(self, prompt: int) -> list[int]:
        """The sets of what prompt ``prompt`` is about: for ``p_0`` all nouns, else its noun and its trigger, if it has one."""
        count = len(self.subjects)
        if prompt == 0:
            return list(range(count))
        return [prompt - 1, *([count] if bool(self.sets[prompt, count].any()) else [])]


def subjects_of(
    words: Words,
    prompt: str,
    adapters: Sequence[Adapter],
    *,
    triggers: Mapping[str, str],
    nouns: Mapping[str, str],
) -> tuple[Subject, ...]:
    """What each LoRA draws and where ``prompt`` says it.

    Args:
        triggers, nouns: by LoRA name, where its file does not know or the prompt has other words.

    Raises:
        RequestError: a LoRA without a noun; a trigger or a noun that the prompt lacks; two LoRAs with one trigger.
    """
    taken: list[Found] = []
    found: list[Subject] = []
    for adapter in adapters:
        noun = _told(nouns, adapter) or adapter.lora.class_word
        trigger = _without(_told(triggers, adapter) or adapter.lora.trigger, noun)
        if not noun:
            raise RequestError(
                f"LoRA '{adapter.name}' does not say what it draws, and its word must have a map in every pass: "
                f'name the noun of the prompt, such as nouns={{"{adapter.names[1]}": "dog"}}'
            )
        twin = next((one for one in found if trigger and one.trigger.lower() == trigger.lower()), None)
        if twin is not None:
            raise RequestError(
                f"LoRAs '{twin.name}' and '{adapter.name}' have the same trigger '{trigger}', so the prompt cannot tell them "
                "apart: leave one out, or train it again with another word"
            )
        within = next((one for one in found if one.trigger and trigger and _holds(one.trigger, trigger)), None)
        if within is not None:
            raise RequestError(
                f"of the triggers '{within.trigger}' of LoRA '{within.name}' and '{trigger}' of '{adapter.name}' one is part "
                "of the other, so that it cannot be taken out of the prompt alone: name other words with 'triggers'"
            )
        occurrence = _noun_of(words, prompt, adapter.name, trigger, noun, taken)
        found.append(Subject(adapter.name, trigger, noun, occurrence))
    return tuple(found)


def _holds(one: str, other: str) -> bool:
    """Whether one of two triggers is part of the other, as whole words."""
    return any(re.search(whole_words(part), text, re.IGNORECASE) for part, text in ((one, other), (other, one)))


def _told(option: Mapping[str, str], adapter: Adapter) -> str:
    return next((" ".join(option[name].split()) for name in adapter.names if name in option), "")


def _without(trigger: str, noun: str) -> str:
    """A trigger such as "sks dog" without its noun: what is left can go, and the noun stays."""
    return re.sub(whole_words(noun), "", trigger, flags=re.IGNORECASE).strip() if noun else trigger


def _noun_of(words: Words, prompt: str, name: str, trigger: str, noun: str, taken: list[Found]) -> int:
    """Which occurrence of ``noun`` is that of a LoRA; it is ``taken`` from then on."""
    every = find(words, prompt, noun)
    if not every:
        raise RequestError(
            f"the noun '{noun}' of LoRA '{name}' does not stand in the prompt, so its class would have a single map: write "
            f"'{f'{trigger} {noun}'.strip()}', or name the noun that stands there with 'nouns'"
        )
    calls = find(words, prompt, trigger)
    if trigger and not calls:
        raise RequestError(
            f"the prompt lacks the trigger '{trigger}' of LoRA '{name}': write '{trigger} {noun}' where it shall stand"
        )
    own = noun_of(every, calls[0] if calls else None, taken)
    if own is None:
        raise RequestError(
            f"the prompt says '{noun}' {len(every)} times, but more LoRAs draw one: write the noun once for each of them"
        )
    taken.append(own)
    return every.index(own)


def without(prompt: str, phrase: str) -> str:
    """``prompt`` with every occurrence of ``phrase`` as whole words taken out, and the gap after it.

    An article before it is made to fit the word that follows now, by its first letter: "a animal" would be a prompt of
    another kind than those the model has learnt from.
    """
    if not phrase:
        return prompt

    def fitting(match: re.Match[str]) -> str:
        article, gap, letter = match["article"], match["gap"], match["next"]
        if not article:
            return ""
        if not letter:
            return article + gap
        return article[0] + ("n" if letter in "aeiouAEIOU" else "") + gap

    pattern = rf"(?<!\w)(?:(?P<article>an?)(?P<gap>\s+))?{whole_words(phrase)}[ \t]*(?=(?P<next>\w?))"
    return re.sub(pattern, fitting, prompt, flags=re.IGNORECASE)


def variants_of(words: Words, prompt: str, subjects: Sequence[Subject], length: int) -> Variants:
    """The prompts of all passes and their token groups, for text states of ``length`` columns.

    Raises:
        RequestError: a prompt of more than one chunk; a subject whose noun is lost when other triggers go; a trigger that stays
            because brackets or weights stand inside it.
    """
    one_chunk(words, prompt, "CLoRA")
    count = len(subjects)
    prompts = []
    for own in range(count + 1):
        variant = prompt
        for index, subject in enumerate(subjects, 1):
            variant = variant if index == own else without(variant, subject.trigger)
        kept = next((s for i, s in enumerate(subjects, 1) if i != own and s.trigger and find(words, variant, s.trigger)), None)
        if kept is not None:
            raise RequestError(
                f"the trigger '{kept.trigger}' of LoRA '{kept.name}' cannot be taken out of the prompt: write it there without "
                "brackets or weights inside it"
            )
        prompts.append(variant)
    sets = torch.zeros(count + 1, count + 1, length)
    maps: list[tuple[int, int]] = []
    classes: list[int] = []
    for number, variant in enumerate(prompts):
        for index, subject in enumerate(subjects):
            sets[number, index, list(_same(words, prompt, variant, subject).columns)] = 1
            maps.append((number, index))
            classes.append(index)
        trigger = subjects[number - 1].trigger if number else ""
        if trigger:
            sets[number, count, list(find(words, variant, trigger)[0].columns)] = 1
            maps.append((number, count))
            classes.append(number - 1)
    return Variants(subjects=tuple(subjects), prompts=tuple(prompts), sets=sets, maps=tuple(maps), classes=tuple(classes))


def _same(words: Words, prompt: str, variant: str, subject: Subject) -> Found:
    """The subject's noun in ``variant``, where other subjects' triggers are gone."""
    before, now = (find(words, each, subject.noun) for each in (prompt, variant))
    if len(before) != len(now):
        lost = spell(words, variant).plain
        raise RequestError(
            f"the noun '{subject.noun}' of LoRA '{subject.name}' is part of another LoRA's trigger: without it the prompt says "
            f"'{lost}'; name another noun with 'nouns'"
        )
    return now[subject.occurrence]
