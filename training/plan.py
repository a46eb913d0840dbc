"""Everything decided and checked before a training starts: pictures, captions, layers, steps. Its text is the dry run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.finder import says
from studio.errors import FileError, RequestError
from studio.prompts import article
from training.accelerators import check_device, launched, launcher_notes
from training.checks import check_settled, timesteps
from training.config import ConceptConfig
from training.dataset import Picture, bucket_of, bucket_sizes, digest, read_folder, with_trigger, without_trigger
from training.losses import Levels
from training.masks import check_masks, with_masks
from training.names import LATER, NEUTRAL
from training.optim import check_optimizer, optimizer_arguments

if TYPE_CHECKING:
    from studio.base import Base
    from training.start import Start

ENOUGH = 4
"""Fewer pictures than this are reported."""
EVERYDAY = (
    "a dog", "a cat", "a bird", "a fish", "a person", "a house", "a car", "a tree", "a flower", "an apple", "a ball", "a hat",
    "food on a plate", "an animal", "a plant", "a building", "the sky", "a picture",
)  # fmt: skip
"""Prompts whose meaning a LoRA should leave alone, on any base."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A checked run. ``captions`` belong to ``pictures``; ``sizes`` are allowed (width, height); every caption is read in
    ``chunks``; ``start`` is where the weights begin; ``notes`` are for the user."""

    config: ConceptConfig
    base: Base
    pictures: Sequence[Picture]
    captions: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    layers: dict[str, list[str]]
    steps: int
    prior_pictures: Sequence[Picture]
    prior_captions: Sequence[str]
    chunks: int
    start: Start
    notes: Sequence[str]

    @property
    def levels(self) -> Levels:
        """The noise levels that are learnt."""
        config = self.config
        return Levels(
            low=config.min_timestep,
            high=timesteps(self.base) if config.max_timestep is None else config.max_timestep,
            spread=config.sigmoid_scale if config.timestep_sampling == "sigmoid" else None,
        )

    @property
    def buckets(self) -> dict[tuple[int, int], int]:
        """Pictures per size."""
        found: dict[tuple[int, int], int] = {}
        for picture in self.pictures:
            size = bucket_of(picture.width, picture.height, self.sizes)
            found[size] = found.get(size, 0) + 1
        return found

    def identity(self) -> dict[str, Any]:
        """What makes this run the same run when it is resumed, and what its file records. Folders are given by name alone."""
        values = self.config.model_dump(mode="json", exclude=set(NEUTRAL | LATER))
        values |= self.config.model_dump(mode="json", include=set(LATER), exclude_defaults=True)
        if self.config.optimizer == "adafactor":  # runs of before had others, and state that cannot be gone on from
            values["optimizer_args"] = optimizer_arguments(self.config)
        if self.start.sha256:
            values["start_from"] = self.start.sha256
        values["data"] = self.config.data.name
        if self.config.masks is not None:
            values["masks"] = Path(self.config.masks).name
        values["prior_data"] = self.config.prior_data.name if self.config.prior_data else None
        values |= {
            "base": self.base.name,
            "base_sha256": self.base.sha256,
            "pictures": digest(self.pictures),
            "steps": self.steps,
        }
        if self.config.prior != "none":
            values["prior_rows"] = self.config.prior_rows
        if self.config.prior == "consistency" and _blind(self.config, self.base):
            values["prior_prompts"] = list(self.prior_captions)
        if self.prior_pictures:
            values["prior_pictures"] = digest(self.prior_pictures)
        return values


def check_before_loading(config: ConceptConfig) -> tuple[list[Picture], list[Picture]]:
    """The checks that need no base: pictures, prior pictures, optimiser, output.

    Raises:
        StudioError: one sentence on the first thing wrong.
    """
    check_optimizer(config)
    pictures = read_folder(config.data)
    if len(pictures) == 1 and not config.allow_one_image:
        raise RequestError(
            f"'{config.data}' holds one picture, and a LoRA of one picture copies it whole: add other views (4 or more), "
            "or set allow_one_image to true"
        )
    if config.masks is not None:
        pictures = with_masks(pictures, config.masks, config.data)
    prior = read_folder(config.prior_data) if config.prior_data else []
    check_output(config.output)
    return pictures, prior


def check_output(path: Path) -> None:
    """Refuse an output that could not be written at the end.

    Raises:
        FileError: it is a folder, or its folder is not writable.
    """
    if path.is_dir():
        raise FileError(f"output '{path}' is a folder: give the name of a .safetensors file")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileError(f"output '{path}' cannot be written ({error.strerror} in '{folder}'): choose another place") from None


def settled(config: ConceptConfig, base: Base) -> ConceptConfig:
    """``config`` with the values it leaves to the base and the kind.

    A style is learnt without cross-attention: a LoRA there ties the look to the words of the eight subjects it was shown on,
    and draws any other subject as before. A concept is held to the frozen base: without that, a second LoRA beside it vanishes.
    """
    style, small = config.kind == "style", base.family.small
    chosen: dict[str, Any] = {"learning_rate": (2e-3 if style else 1e-3) if small else 1e-4}
    if config.optimizer == "prodigy":
        chosen["learning_rate"] = 1.0
    if style:
        chosen["targets"] = "image"
    elif config.deltas:
        chosen["prior"] = "consistency"
    return config.model_copy(update={key: value for key, value in chosen.items() if key not in config.model_fields_set})


def prepare(config: ConceptConfig, base: Base | None = None, device: Any = None, processes: int = 1) -> Plan:
    """Check everything and decide what ``config`` leaves open.

    Args:
        base: a loaded base to train on instead of ``config.base``.
        device: where to load the base.
        processes: how many processes share the work; matters when ``epochs`` are given.

    Raises:
        StudioError: one sentence on the first thing wrong.
    """
    pictures, prior = check_before_loading(config)
    if base is None:
        base = _load(config, device)
    config = settled(config, base)
    from training.adapters import chosen_layers
    from training.start import start_of
    from training.text import known_words, lengths
    from training.words import check_words, full_at_start, reading_of

    if known_words(base, config.trigger) and not config.allow_known_trigger:
        raise RequestError(
            f"trigger '{config.trigger}' is already a known word of '{base.name}', so its old meaning would mix in: "
            "take a made-up word, or set allow_known_trigger to true"
        )
    layers = chosen_layers(base, config)
    captions, notes = _captions(config, pictures)
    check_settled(config, base)
    if config.words:
        check_words(base, config, captions)
    sizes = _sizes(config, base)
    for size in sizes:
        if min(size) < base.size_step:
            raise RequestError(f"resolution {config.resolution} is too small for '{base.name}': give at least {base.size_step}")
    check_masks(pictures, [bucket_of(p.width, p.height, sizes) for p in pictures])
    whole = [p for p in pictures if p.mask is None]
    if config.masks is not None and whole:
        notes.append(
            f"{len(whole)} of {len(pictures)} pictures have no mask and are learnt whole, first '{whole[0].path.name}'"
        )
    small = [p for p in pictures if p.width * p.height < 0.6 * max(sizes)[0] * max(sizes)[1]]
    if small:
        notes.append(f"{len(small)} pictures are smaller than the base's and are enlarged, first '{small[0].path.name}'")
    if len(pictures) < ENOUGH:
        notes.append(f"only {len(pictures)} pictures: {ENOUGH} or more different ones generalise better")
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        notes.append(
            f"optimizer 'prodigy' scales the rate it finds by learning_rate, here {config.learning_rate:g}: 1 is usual"
        )
    if config.repeats > 1 and not config.epochs:
        notes.append(f"repeats {config.repeats} does nothing without epochs: steps {config.steps} says how long to train")
    notes += launcher_notes(config)
    shares = sum(p.repeats for p in pictures) * config.repeats
    per_step = config.batch * config.accumulation * processes
    steps = -(-config.epochs * shares // per_step) if config.epochs else config.steps
    prior_captions = [config.fill(p.caption or (config.prior_prompts or ("a {class_word}",))[0]) for p in prior]
    if config.prior == "consistency" and not config.deltas:
        notes.append("prior 'consistency' is not needed: only words are learnt, so nothing can be forgotten")
    elif config.prior == "consistency":
        prior_captions = _prior_prompts(config, captions, blind=_blind(config, base))
    texts = list(dict.fromkeys([*captions, *prior_captions]))
    filled = lengths(base, texts, reading_of(config))
    long = [text for text, count in zip(texts, filled, strict=True) if count > config.caption_chunks]
    if long:
        notes.append(
            f"{len(long)} captions are longer than caption_chunks {config.caption_chunks} reads and are cut, first '{long[0]}'"
            f" (it would take {filled[texts.index(long[0])]})"
        )
    start = start_of(base, config, layers)
    if full_at_start(base, config, start.weights):
        notes.append(
            f"the words of start_from are as long as token_norm {config.token_norm:g} lets them grow and stay as they are: to "
            "go on learning them, raise token_norm or set it to null"
        )
    return Plan(
        config=config,
        base=base,
        pictures=pictures,
        captions=captions,
        sizes=sizes,
        layers=layers,
        steps=steps,
        prior_pictures=prior,
        prior_captions=prior_captions,
        chunks=config.caption_chunks if max(filled) > 1 else 1,
        start=start,
        notes=tuple(notes),
    )


def _load(config: ConceptConfig, device: Any) -> Base:
    import torch

    from studio.base import load_base

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    wanted = device if device is not None else (None if config.device == "auto" else config.device)
    return load_base(config.base, wanted, kinds[config.precision], memory=memory_for(wanted))


def memory_for(device: Any) -> str:
    """The memory setting for a base in training: on a card it stays there whatever is free; elsewhere it is loaded as for
    generating, so that both share one.
    """
    from studio.placement import as_device

    return "high" if as_device(device).type == "cuda" else "auto"


def _captions(config: ConceptConfig, pictures: Sequence[Picture]) -> tuple[list[str], list[str]]:
    notes, captions = [], []
    added = [p for p in pictures if p.caption is None]
    if added and len(added) < len(pictures):
        notes.append(f"{len(added)} of {len(pictures)} pictures have no caption and get '{config.fill(config.template)}'")
    lacking: list[Picture] = []
    for picture in pictures:
        text = config.fill(picture.caption if picture.caption is not None else config.template)
        whole = with_trigger(text, config.trigger, config.class_word)
        if whole != text:
            lacking.append(picture)
            text = whole if config.insert_trigger else text
        captions.append(text)
    if lacking and config.insert_trigger:
        notes.append(
            f"{len(lacking)} captions lacked the trigger; it was put in, as in '{captions[pictures.index(lacking[0])]}'"
        )
    elif lacking:
        notes.append(f"{len(lacking)} captions lack the trigger '{config.trigger}', first that of '{lacking[0].path.name}'")
    return captions, notes


def _blind(config: ConceptConfig, base: Base) -> bool:
    """Whether a made-up word means nothing to the base, and is not taught to."""
    return base.family.small and config.train_text == "none"


def _prior_prompts(config: ConceptConfig, captions: Sequence[str], *, blind: bool) -> list[str]:
    """Prompts on which LoRA and frozen base should agree: the captions without the trigger, the class, everyday things.

    ``blind``: the UNet reads captions with and without the trigger alike. To hold it to the latter would forbid the lesson:
    everyday things that are not of the class remain.
    """
    if config.prior_prompts:
        return [config.fill(text) for text in config.prior_prompts]
    everyday = [text for text in EVERYDAY if not config.calls(text)]
    if blind:
        return [text for text in everyday if not config.class_word or not says(text, config.class_word)]
    own = dict.fromkeys(without_trigger(text, config.trigger) for text in captions)
    if config.class_word:
        own[article(config.class_word)] = None
    return [*[text for text in own if text][:32], *everyday]


def _sizes(config: ConceptConfig, base: Base) -> list[tuple[int, int]]:
    side = config.resolution or int(base.unet.config.sample_size) * base.latent_factor
    side -= side % base.size_step
    return bucket_sizes(side, base.size_step) if config.buckets else [(side, side)]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a dry run shows. ``file_bytes`` and ``memory_bytes`` are estimates."""

    config: dict[str, Any]
    base: str
    family: str
    pictures: int
    captions: Sequence[str]
    buckets: dict[str, int]
    steps: int
    epochs: float
    layers: int
    parameters: int
    file_bytes: int
    memory_bytes: int
    notes: Sequence[str]

    def __str__(self) -> str:
        lines = [
            f"base        {self.base} ({self.family})",
            f"pictures    {self.pictures} in " + ", ".join(f"{size}: {count}" for size, count in self.buckets.items()),
            f"captions    {'; '.join(dict.fromkeys(self.captions[:3]))}" + ("; ..." if len(self.captions) > 3 else ""),
            f"steps       {self.steps} (each picture {self.epochs:.0f} times)",
            f"layers      {self.layers}, {self.parameters:,} parameters, file about {self.file_bytes / 1e6:.1f} MB",
            f"memory      about {self.memory_bytes / 2**30:.1f} GiB",
            *[f"note        {note}" for note in self.notes],
            *[f"{key:<27} {value}" for key, value in self.config.items()],
        ]
        return "\n".join(lines)


def describe(config: ConceptConfig, base: Base | None = None) -> Description:
    """The resolved run, without training: everything a training checks beforehand, and a memory estimate.

    Raises:
        StudioError: one sentence on the first thing wrong.
    """
    from training.finished import finished, nothing_to_do
    from training.memory import estimate, parameter_count, word_count

    check_device(config)
    plan = prepare(config, base, processes=launched())
    notes = (*plan.notes, *([nothing_to_do(plan)] if finished(plan) else []))
    config = plan.config
    words = word_count(plan.base, config)
    parameters = parameter_count(plan.base, config.rank, plan.layers) + words
    size = max(plan.buckets, key=lambda s: s[0] * s[1])
    return Description(
        config=config.model_dump(mode="json") | {"steps": plan.steps, "alpha": config.strength, "caption": config.template},
        base=plan.base.name,
        family=plan.base.family.name,
        pictures=len(plan.pictures),
        captions=tuple(plan.captions),
        buckets={f"{w}x{h}": n for (w, h), n in sorted(plan.buckets.items())},
        steps=plan.steps,
        epochs=plan.steps * config.batch * config.accumulation * launched() / len(plan.pictures),
        layers=sum(len(names) for names in plan.layers.values()),
        parameters=parameters,
        file_bytes=(parameters - words) * (4 if config.save_precision == "fp32" else 2) + words * 4,
        memory_bytes=estimate(plan.base, config, plan.layers, size, plan.chunks).total,
        notes=notes,
    )
