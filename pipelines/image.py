"""Pictures from a prompt."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from compose import method_named
from compose.bank import Adapter, LoraBank
from compose.denoise import Event, OnStep, denoise
from compose.run import Method
from compose.schedulers import sampler_name
from compose.text import Encoded, Reading, encode_pair
from compose.tokens import learnt
from pipelines.memory import check_memory, decode_within, is_out_of_memory, out_of_memory
from pipelines.progress import Bar
from pipelines.records import Made
from studio.base import Base, load_base
from studio.embeddings import Embedding, load_embeddings
from studio.errors import RequestError
from studio.media import save_png
from studio.prompts import not_followed, parse, take_tags
from studio.requests import MAX_SEED, GenerateRequest, LoraRef, Sampling, as_request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerateResult:
    """Pictures and how they came about.

    ``request`` has nothing left open; picture ``i`` used ``seeds[i]``. ``sidecars[i]`` and ``parameters[i]`` are what
    :meth:`save` writes into it.
    """

    images: list[Image]
    request: GenerateRequest
    seeds: list[int]
    seconds: float
    notes: list[str]
    sidecars: list[dict[str, Any]] = field(repr=False)
    parameters: list[str] = field(repr=False)

    def save(self, path: str | Path) -> list[Path]:
        """Write PNGs: to ``path``, or to ``stem-1.png``, ``stem-2.png``, ... when there are several."""
        target = Path(path)
        several = len(self.images) > 1
        written = []
        for index, image in enumerate(self.images):
            place = target.with_name(f"{target.stem}-{index + 1}{target.suffix}") if several else target
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
    cancelled: Callable[[], bool] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    lora_dirs: Sequence[str | Path] = (),
    lora_files: Mapping[str, Path] | None = None,
    **fields: Any,
) -> GenerateResult:
    """Pictures for a prompt, or for a whole request.

    Args:
        request: a prompt, a request, or a mapping with its fields. ``fields`` set or change single ones, such as
            ``loras=["name:0.8"]`` or ``seed=1``.
        progress: True or False shows or hides the progress bar; None shows it on a terminal.
        on_step: called after every timestep, with lazy previews. cancelled: asked before every timestep.
        device, dtype, memory: where the base runs, see :func:`studio.placement.place`.
        lora_dirs: folders where LoRAs are looked for first.
        lora_files: the files of LoRAs whose names are no longer theirs.

    Raises:
        studio.errors.StudioError: with one sentence.
    """
    asked, notes = without_tags(as_request(request, **fields))
    method = method_named(asked.method, **asked.options)
    if asked.scheduler is not None:
        sampler_name(asked.scheduler)
    base = load_base(asked.base, device, dtype, vae=asked.vae, memory=memory)
    sampling = asked.sampling(base.family, secrets.randbelow(MAX_SEED + 1))
    full = asked.with_(**asdict(sampling))
    check_size(base, sampling.size)
    adapters = load_adapters(full, lora_dirs, lora_files or {})
    embeddings = load_embeddings(full.embeddings)
    notes += missing_triggers(full, adapters) + missing_embeddings(full, embeddings)
    seeds = [(sampling.seed + index) % (MAX_SEED + 1) for index in range(full.count)]
    reading = Reading(full.clip_skip, tuple(embeddings))
    started = time.perf_counter()
    check_method(full, method, adapters)
    with LoraBank.on(base, adapters, fuse=method.fuse) as bank:
        notes += bank.notes
        images = _sample(base, bank, full, sampling, seeds, reading, notes, Watch(progress, on_step, cancelled))
    seconds = time.perf_counter() - started
    made = Made(base=base, request=full, sampling=sampling, adapters=adapters, embeddings=embeddings, seeds=seeds, notes=notes)
    sidecars, texts = made.records()
    return GenerateResult(
        images=images, request=full, seeds=seeds, seconds=seconds, notes=notes, sidecars=sidecars, parameters=texts
    )


def without_tags(request: GenerateRequest) -> tuple[GenerateRequest, list[str]]:
    """The request with the LoRAs that its prompt asks for among its own, and notes on what was done."""
    prompt, tags = take_tags(request.prompt)
    negative, idle = take_tags(request.negative)
    notes = [f"LoRA '{tag.name}' is taken from the prompt, with the weight {tag.weight:g}" for tag in tags]
    notes += [f"LoRA '{tag.name}' in the negative prompt does nothing: name it in the prompt" for tag in idle]
    notes += not_followed(prompt) + not_followed(negative)
    if tags or idle:
        loras = (*request.loras, *(LoraRef.of(name=tag.name, weight=tag.weight) for tag in tags))
        request = request.with_(prompt=prompt, negative=negative, loras=loras)
    return request, notes


def check_method(request: GenerateRequest, method: Method, adapters: list[Adapter]) -> None:
    """Refuse a method of several LoRAs without any, and options that do not fit them."""
    if not request.loras and (request.method != "merge" or request.options):
        raise RequestError(f"method '{request.method}' composes LoRAs, but the request names none: add one, or leave it out")
    method.check(adapters)


def check_size(base: Base, size: tuple[int, int]) -> None:
    """Refuse sizes the base cannot make, naming the nearest it can."""
    step = base.size_step
    if all(side % step == 0 for side in size):
        return
    low, high = (tuple(max((side + up) // step, 1) * step for side in size) for up in (0, step - 1))
    near = f"{low[0]}x{low[1]}" + (f" or {high[0]}x{high[1]}" if high != low else "")
    raise RequestError(
        f"size {size[0]}x{size[1]} does not fit base '{base.name}': width and height must be multiples of {step}; "
        f"nearest: {near}"
    )


def load_adapters(
    request: GenerateRequest, lora_dirs: Sequence[str | Path] = (), lora_files: Mapping[str, Path] = MappingProxyType({})
) -> list[Adapter]:
    """Find and read the LoRAs of a request."""
    if not request.loras:
        return []
    from studio.lora.files import load_lora
    from studio.lora.library import find_lora

    files = [lora_files.get(ref.name) or find_lora(ref.name, lora_dirs) for ref in request.loras]
    return [
        Adapter(name=ref.name, lora=load_lora(file), weight=ref.weight) for ref, file in zip(request.loras, files, strict=True)
    ]


def missing_triggers(request: GenerateRequest, adapters: list[Adapter]) -> list[str]:
    """A note for each LoRA whose trigger the prompt lacks. The prompt is never changed silently."""
    words = f" {' '.join(parse(request.prompt).plain.lower().replace(',', ' ').replace('.', ' ').split())} "
    return [
        f"the prompt lacks the trigger '{adapter.lora.trigger}' of LoRA '{adapter.name}': "
        "add it to see what the LoRA was taught"
        for adapter in adapters
        if adapter.weight != 0 and adapter.lora.trigger and f" {' '.join(adapter.lora.trigger.lower().split())} " not in words
    ]


def missing_embeddings(request: GenerateRequest, embeddings: list[Embedding]) -> list[str]:
    """A note for each embedding that no prompt calls."""
    called = learnt(embeddings, request.prompt) | learnt(embeddings, request.negative)
    return [
        f"no prompt calls the embedding '{embedding.name}': write '{embedding.calls[-1]}' where it should act"
        for embedding in embeddings
        if embedding.name not in called
    ]


def _sample(
    base: Base,
    bank: LoraBank,
    request: GenerateRequest,
    sampling: Sampling,
    seeds: list[int],
    reading: Reading,
    notes: list[str],
    watch: Watch,
) -> list[Image]:
    """Denoise and decode in rounds of the family's batch; smaller ones when memory runs out. ``notes`` are added to."""
    halves = 2 if sampling.guidance > 1 else 1
    size = sampling.size
    room = min(base.family.batch, len(seeds))
    check_memory(base, size, halves)
    images: list[Image] = []
    said: list[str] = []

    def encoded(rows: int) -> tuple[Encoded, Encoded]:
        negative, positive = encode_pair(base, [request.prompt], [request.negative], reading)
        return negative.rows([0] * rows), positive.rows([0] * rows)

    with Bar("denoising", sampling.steps * len(seeds), watch.progress) as bar:

        def stepped(event: Event) -> None:
            bar.reach((len(images) + (event.step.index + 1) / event.step.count * len(now)) * sampling.steps)
            if watch.on_step is not None:
                watch.on_step(event)

        while len(images) < len(seeds):
            now = seeds[len(images) : len(images) + room]
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
                    method=method_named(request.method, **request.options),
                    bank=bank,
                    encode=partial(encoded, len(now)),
                    on_step=stepped,
                    cancelled=watch.cancelled,
                    notes=said,
                )
                images += decode_within(base, latents, said)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(now) == 1:
                    raise out_of_memory(base, size, halves) from error
                room = len(now) // 2
                said = [f"memory was short: the pictures were made {room} at a time"]
    notes += dict.fromkeys(said)
    return images
