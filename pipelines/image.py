"""Pictures from a prompt."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compose import method_named
from compose.bank import Adapter, Fuse, Layer, LoraBank
from compose.denoise import Event, OnStep, Start, denoise
from compose.run import Method
from compose.text import Encoded, Reading, Wording, encode_pair, words_of
from pipelines.explain import report, words_shown, writable
from pipelines.memory import check_memory, decode_within, is_out_of_memory, out_of_memory
from pipelines.prepare import (
    STRENGTH,
    Prepared,
    check_size,
    fitted,
    load_adapters,
    missing_embeddings,
    prepare,
    size_like,
    with_words,
    worded,
)
from pipelines.progress import Bar
from pipelines.records import Made
from studio.base import Base, load_base
from studio.embeddings import load_embeddings
from studio.errors import CancelledError, OutOfMemoryError
from studio.hashes import auto_v3
from studio.media import encode, save_png
from studio.requests import MAX_SEED, GenerateRequest, Sampling, as_request

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.figures import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerateResult:
    """Pictures and how they came about: all that were asked for, or those of one round (``on_round`` of :func:`generate`).

    ``request`` has nothing left open; ``images[i]`` is its picture number ``first + i`` and used ``seeds[i]``. ``sidecars[i]``
    and ``parameters[i]`` are what :meth:`save` writes into it.
    """

    images: list[Image]
    request: GenerateRequest
    seeds: list[int]
    seconds: float
    notes: list[str]
    sidecars: list[dict[str, Any]] = field(repr=False)
    parameters: list[str] = field(repr=False)
    first: int = 0

    def save(self, path: str | Path) -> list[Path]:
        """Write PNGs: to ``path``, or to ``stem-1.png``, ``stem-2.png``, ... when several were asked for."""
        target = Path(path)
        several = self.request.count > 1
        written = []
        for index, image in enumerate(self.images):
            place = target.with_name(f"{target.stem}-{self.first + index + 1}{target.suffix}") if several else target
            save_png(place, image, self.sidecars[index], self.parameters[index])
            written.append(place)
        return written


@dataclass(frozen=True)
class Watch:
    """Who looks on: see :func:`generate`."""

    progress: bool | None = None
    on_step: OnStep | None = None
    cancelled: Callable[[], bool] | None = None


def generate(
    request: GenerateRequest | Mapping[str, Any] | str,
    *,
    progress: bool | None = None,
    on_step: OnStep | None = None,
    on_round: Callable[[GenerateResult], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    lora_dirs: Sequence[str | Path] = (),
    lora_files: Mapping[str, Path] | None = None,
    explain: str | Path | None = None,
    **fields: Any,
) -> GenerateResult:
    """Pictures for a prompt, or for a whole request.

    Args:
        request: a prompt, a request, or a mapping with its fields. ``fields`` set or change single ones, such as
            ``loras=["name:0.8"]`` or ``seed=1``.
        progress: True or False shows or hides the progress bar; None shows it on a terminal.
        on_step: called after every timestep, with lazy previews. cancelled: asked before every timestep.
        on_round: called with the pictures of each round as soon as they are there, so that they can be saved whatever
            becomes of the rest; a round has as many pictures as are denoised together.
        device, dtype, memory: where the base runs, see :func:`studio.placement.place`.
        lora_dirs: folders where LoRAs are looked for first.
        lora_files: the files of LoRAs whose names are no longer theirs.
        explain: a folder for pictures of what the method did (:mod:`pipelines.explain`).

    Raises:
        studio.errors.StudioError: with one sentence.
    """
    prepared = prepare(as_request(request, **fields), lora_dirs, lora_files or {})
    if explain is not None:
        writable(Path(explain))
    asked, notes = prepared.request, list(prepared.notes)
    adapters = load_adapters(prepared)
    base = load_base(asked.base, device, dtype, vae=asked.vae, memory=memory)
    if prepared.start is not None:
        like = asked.size or size_like(base, prepared.start.size)
        asked = asked.with_(size=like, strength=STRENGTH if asked.strength is None else asked.strength)
    sampling = asked.sampling(base.family, secrets.randbelow(MAX_SEED + 1))
    check_size(base, sampling.size)
    full, added = worded(asked.with_(**asdict(sampling)), adapters)
    embeddings = load_embeddings(full.embeddings)
    spoken = with_words(embeddings, adapters)
    notes += added + missing_embeddings(full, embeddings)
    seeds = [(sampling.seed + index) % (MAX_SEED + 1) for index in range(full.count)]
    started = time.perf_counter()
    figures: list[Figure] | None = None if explain is None else []
    watch = Watch(progress, on_step, cancelled)
    made = Made(
        base=base,
        request=full,
        sampling=sampling,
        adapters=adapters,
        short=[auto_v3(a.lora.source) if a.lora.source else "" for a in adapters],
        embeddings=embeddings,
        seeds=seeds,
        notes=notes,
    )
    images: list[Image] = []
    said: list[str] = []

    def result(first: int) -> GenerateResult:
        now = replace(made, seeds=seeds[first : len(images)], first=first, notes=[*notes, *dict.fromkeys(said)])
        sidecars, texts = now.records()
        return GenerateResult(
            images=images[first:],
            request=full,
            seeds=now.seeds,
            seconds=time.perf_counter() - started,
            notes=now.notes,
            sidecars=sidecars,
            parameters=texts,
            first=first,
        )

    with LoraBank.on(base, adapters, fuse=_merging(base, prepared.method, watch, notes)) as bank:
        notes += bank.notes
        work = _Work(
            base=base,
            bank=bank,
            request=full,
            sampling=sampling,
            seeds=seeds,
            reading=Reading(full.clip_skip, spoken),
            start=_start(base, full, prepared),
            watch=watch,
            figures=figures,
        )
        for fresh in _rounds(work, said):
            images += fresh
            if on_round is not None:
                on_round(result(len(images) - len(fresh)))
    whole = result(0)
    if explain is not None:
        words = words_shown(words_of(base, work.reading)["text_encoder"], full, adapters)
        report(Path(explain), whole, [words, *(figures or [])])
    return whole


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """All that sampling needs to know. ``figures``: what the method shows of the first round is appended here."""

    base: Base
    bank: LoraBank
    request: GenerateRequest
    sampling: Sampling
    seeds: list[int]
    reading: Reading
    start: Start | None
    watch: Watch
    figures: list[Figure] | None


def _merging(base: Base, method: Method, watch: Watch, notes: list[str]) -> Fuse:
    """The method's own merging of weights, with bars, and stopped when the user cancels; ``notes`` are added to."""

    def fuse(adapters: Sequence[Adapter], layers: Mapping[str, Layer]) -> Sequence[Adapter]:
        with Bar("looking at layers", 1, watch.progress) as bar:
            try:
                notes.extend(method.survey(base, adapters, layers, partial(_advanced, bar, watch)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"memory ran out while each LoRA drew alone, which this way of merging needs ({error}): take another 'how'"
                ) from error
        with Bar("merging weights", 1, watch.progress) as bar:
            return method.fuse(adapters, layers, partial(_advanced, bar, watch))

    return fuse


def _advanced(bar: Bar, watch: Watch, done: int, total: int) -> None:
    if watch.cancelled is not None and watch.cancelled():
        raise CancelledError("cancelled")
    bar.total = total
    bar.reach(done)


def _start(base: Base, request: GenerateRequest, prepared: Prepared) -> Start | None:
    if prepared.start is None or request.size is None or request.strength is None:
        return None
    return Start(latents=encode(base.vae, [fitted(prepared.start, request.size)]), strength=request.strength)


def _rounds(work: _Work, said: list[str]) -> Iterator[list[Image]]:
    """Denoise and decode in rounds of the family's batch; smaller ones when memory runs out. Notes are added to ``said``."""
    base, request, sampling, seeds, watch = work.base, work.request, work.sampling, work.seeds, work.watch
    halves = 2 if sampling.guidance > 1 else 1
    size = sampling.size
    method = partial(method_named, request.method, **request.options)
    room = base.family.batch
    check_memory(base, size, halves)
    done = 0

    def encoded(rows: int) -> tuple[Encoded, Encoded]:
        negative, positive = encode_pair(base, [request.prompt], [request.negative], work.reading)
        return negative.rows([0] * rows), positive.rows([0] * rows)

    with Bar("denoising", sampling.steps * len(seeds), watch.progress) as bar:

        def stepped(event: Event) -> None:
            bar.reach((done + (event.step.index + 1) / event.step.count * len(now)) * sampling.steps)
            if watch.on_step is not None:
                watch.on_step(event)

        while done < len(seeds):
            now = seeds[done : done + room]
            try:
                negative, positive = encoded(len(now))
                latents = denoise(
                    base,
                    negative,
                    positive,
                    seeds=now,
                    size=size,
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    scheduler=sampling.scheduler,
                    method=method(),
                    bank=work.bank,
                    start=work.start,
                    encode=partial(encoded, len(now)),
                    wording=Wording(prompt=request.prompt, negative=request.negative, reading=work.reading),
                    on_step=stepped,
                    cancelled=watch.cancelled,
                    notes=said,
                    regions=request.regions,
                    figures=None if done else work.figures,
                    room=room,
                )
                images = decode_within(base, latents, said)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(now) == 1 and (room == 1 or not method().divisible):
                    raise out_of_memory(base, size, halves) from error
                room = max(len(now) // 2, 1)
                what = f"the pictures were made {room} at a time" if len(now) > 1 else "forwards had one pass at a time"
                said[:] = [f"memory was short: {what}"]
                if work.figures is not None and not done:
                    work.figures.clear()
                continue
            done += len(now)
            yield images
