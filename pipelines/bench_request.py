"""What a comparison of methods is asked for, and how the LoRAs of a user are called in prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from studio.errors import FileError, RequestError, UnknownNameError
from studio.lora.files import read_header
from studio.lora.identity import LoraHeader
from studio.lora.library import find_lora, lora_files
from studio.paths import EMBEDDED
from studio.prompts import escape
from studio.requests import MAX_SEED, Finite, LoraRef, Request

SUFFIX = ", white background"
"""What prompts end with: on a plain ground an encoder compares subjects, not backgrounds."""
Least1 = Annotated[int, Field(ge=1)]


class BenchRequest(Request):
    """One comparison.

    Args:
        loras: by name or file. folder: of LoRA files, all taken beside ``loras``.
        methods: as on the command line; none: all there are.
        sizes: subjects in a picture, 2 or 3. combinations: of each size. seeds: pictures of each combination and method.
        seed: decides combinations, their orders and the seeds of pictures.
        references: pictures of each LoRA alone that others are compared with; or
        reference_images: a folder with the user's own, ``NAME/*.png``.
        prompt: with ``{1}``, ``{2}`` where the subjects are said; None: their places first. prefix, suffix: what is said
            before and behind every prompt.
        words: how LoRAs are called whose files do not say it, by name. styles: LoRAs in every picture.
        encoder: "base" or the folder of a CLIP or DINOv2 vision model.
        steps, guidance, size, scheduler: None: the base's own.
    """

    base: str = EMBEDDED
    loras: tuple[LoraRef, ...] = ()
    folder: Path | None = None
    methods: tuple[str, ...] = ()
    sizes: tuple[Annotated[int, Field(ge=2, le=3)], ...] = (2,)
    combinations: Least1 = 6
    seeds: Least1 = 2
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    references: Annotated[int, Field(ge=2)] = 4
    reference_images: Path | None = None
    prompt: str | None = None
    prefix: str = ""
    suffix: str = SUFFIX
    negative: str = ""
    words: Mapping[str, str] = Field(default_factory=dict)
    styles: tuple[str, ...] = ()
    encoder: str = "base"
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[Finite, Field(ge=1, le=100)] | None = None
    size: str | None = None
    scheduler: str | None = None

    @field_validator("sizes")
    @classmethod
    def _once(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes:
            raise ValueError("must name at least one, 2 or 3")
        return tuple(dict.fromkeys(sizes))

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: str | None) -> str | None:
        if prompt is not None and not ("{1}" in prompt and "{2}" in prompt):
            raise ValueError("must say where the subjects stand, as {1} and {2}")
        return prompt


@dataclass(frozen=True)
class Subject:
    """One LoRA of a comparison.

    Args:
        name: the stem of its file, by which everything here calls it.
        phrase: how a prompt calls what it draws: trigger and class word. told: by the user or
            modelspec, so that its noun is only our reading.
    """

    name: str
    file: Path
    phrase: str
    weight: float = 1.0
    told: bool = False
    is_style: bool = False

    @property
    def said(self) -> str:
        """``phrase`` as a prompt has it: brackets in it do not act."""
        return escape(self.phrase)

    @property
    def trigger(self) -> str:
        """All but the last word of several: ``zqx`` of ``zqx cat``."""
        return self.phrase.rpartition(" ")[0] or self.phrase

    @property
    def noun(self) -> str:
        """The last word of several: ``cat`` of ``zqx cat``; "" of one."""
        return self.phrase.rpartition(" ")[2] if " " in self.phrase else ""

    def at(self, weight: float) -> Subject:
        return replace(self, weight=weight)


def read_subjects(request: BenchRequest, family: str, lora_dirs: Sequence[Path] = ()) -> tuple[list[Subject], list[str]]:
    """Every LoRA of a comparison, styles too, and notes on those of the folder that were left out.

    Args:
        family: of the base.

    Raises:
        FileError: no such folder, or a file that cannot be read. UnknownNameError: a name nobody has.
        RequestError: fewer than two LoRAs, two of one name, or one without words.
    """
    files: dict[Path, float] = {}
    notes: list[str] = []
    if request.folder is not None:
        if not request.folder.is_dir():
            raise FileError(
                f"--loras {request.folder} is no folder: give one with .safetensors files, or name LoRAs with --lora"
            )
        files = dict.fromkeys(lora_files(request.folder), 1.0)
        if not files:
            raise FileError(f"--loras {request.folder} holds no .safetensors file")
    asked = [(find_lora(ref.name, _dirs(request, lora_dirs)), ref.weight) for ref in request.loras]
    drawn = [(find_lora(name, _dirs(request, lora_dirs)), 1.0) for name in request.styles]
    _once([file for file, _ in (*asked, *drawn)])
    named, styles = dict(asked), dict(drawn)
    inside = {file.resolve() for file in (*named, *styles)}
    files = {**{file: weight for file, weight in files.items() if file.resolve() not in inside}, **named, **styles}
    found: dict[str, Subject] = {}
    nameless: list[str] = []
    for file, weight in files.items():
        header = read_header(file)
        stem = file.stem
        if header.family not in (family, "unknown") and file not in named and file not in styles:
            notes.append(f"LoRA '{stem}' is left out: it is of the family {header.family}, the base of {family}")
            continue
        if header.metadata.get("studio.kind") == "style" and file not in styles:
            notes.append(
                f"LoRA '{stem}' is left out: it was taught a style, which has no place (--style {stem} puts it everywhere)"
            )
            continue
        if stem in found:
            raise RequestError(f"two LoRAs are called '{stem}' ({found[stem].file} and {file}): rename one of them")
        phrase, told = _phrase(stem, header, request.words)
        if not phrase:
            guess = f" (its training data suggest '{', '.join(header.triggers)}')" if header.triggers else ""
            nameless.append(f'--words {stem}="zqx cat"{guess}')
        found[stem] = Subject(stem, file, phrase, weight, told, file in styles)
    if nameless:
        raise RequestError(f"LoRAs that record no trigger: say how prompts call what they draw with {', '.join(nameless)}")
    for name in request.words:
        if name not in found:
            raise UnknownNameError("LoRA of --words", name, found)
    count = sum(not one.is_style for one in found.values())
    if count < max(request.sizes):
        raise RequestError(f"combinations of {max(request.sizes)} need as many LoRAs with a subject, and there are {count}: "
                           "add some with --loras or --lora, or ask for smaller --sizes")  # fmt: skip
    return list(found.values()), notes


def _dirs(request: BenchRequest, lora_dirs: Sequence[Path]) -> tuple[Path, ...]:
    return (*([request.folder] if request.folder is not None else []), *lora_dirs)


def _phrase(name: str, header: LoraHeader, words: Mapping[str, str]) -> tuple[str, bool]:
    """How a prompt calls it, and whether its noun is the last word only by our reading; "" where nobody says it: what other
    trainers leave behind (commonest tags) is only a guess.
    """
    if words.get(name, "").strip():
        return " ".join(words[name].split()), True
    trigger, word = (header.metadata.get(f"studio.{key}", "").strip() for key in ("trigger", "class_word"))
    if trigger:
        return (trigger if not word or word.lower() in trigger.lower().split() else f"{trigger} {word}"), False
    return header.metadata.get("modelspec.trigger_phrase", "").strip(), True


def _once(files: Sequence[Path]) -> None:
    """Refuse a LoRA that is named twice: only one of its weights could count."""
    for index, file in enumerate(files):
        if file.resolve() in {other.resolve() for other in files[:index]}:
            raise RequestError(f"LoRA '{file.stem}' is named twice: name it once, with one weight, or as a style")
