"""Pictures from a prompt, and again from a picture."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import studio
from compose import method_named
from compose.bank import Adapter, LoraBank
from compose.denoise import Event, OnStep, denoise
from compose.schedulers import SAMPLERS, sampler_name
from compose.text import encode_pair
from pipelines.memory import check_memory, is_out_of_memory, out_of_memory
from pipelines.progress import Bar
from studio.base import Base, load_base
from studio.errors import RequestError
from studio.media import auto_v3, decode, infotext, read_request, save_png
from studio.requests import MAX_SEED, GenerateRequest, Sampling, as_request

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


def generate(
    request: GenerateRequest | Mapping[str, Any] | str,
    *,
    progress: bool | None = None,
    on_step: OnStep | None = None,
    cancelled: Callable[[], bool] | None = None,
    device: str | torch.device | None = None,
    **fields: Any,
) -> GenerateResult:
    """Pictures for a prompt, or for a whole request.

    Args:
        request: a prompt, a request, or a mapping with its fields. ``fields`` set or change single ones, such as
            ``loras=["name:0.8"]`` or ``seed=1``.
        progress: True or False shows or hides the progress bar; None shows it on a terminal.
        on_step: called after every timestep, with lazy previews. cancelled: asked before every timestep.

    Raises:
        studio.errors.StudioError: with one sentence.
    """
    asked = as_request(request, **fields)
    method_named(asked.method)
    if asked.scheduler is not None:
        sampler_name(asked.scheduler)
    base = load_base(asked.base, device=device)
    sampling = asked.sampling(base.family, secrets.randbelow(MAX_SEED + 1))
    full = asked.with_(**asdict(sampling))
    check_size(base, sampling.size)
    adapters = load_adapters(full)
    notes = missing_triggers(full, adapters)
    seeds = [(sampling.seed + index) % (MAX_SEED + 1) for index in range(full.count)]
    started = time.perf_counter()
    with LoraBank.on(base, adapters) as bank:
        images, more = _sample(base, bank, full, sampling, seeds, progress, on_step, cancelled)
        notes += bank.notes + more
    seconds = time.perf_counter() - started
    sidecars = [sidecar(base, full, adapters, seeds, index, notes) for index in range(full.count)]
    texts = [a1111(base, full, sampling, adapters, seed) for seed in seeds]
    return GenerateResult(
        images=images, request=full, seeds=seeds, seconds=seconds, notes=notes, sidecars=sidecars, parameters=texts
    )


def rerun(path: str | Path, **options: Any) -> GenerateResult:
    """Make a picture again from the request it carries. ``options`` are those of :func:`generate`.

    A base or LoRA that has changed since is said in the notes.
    """
    told = read_request(path)
    result = generate(told["request"], **options)
    now = result.sidecars[0]
    if told.get("base", {}).get("sha256") != now["base"]["sha256"]:
        result.notes.append(
            f"the base '{result.request.base}' has other weights than when {Path(path).name} was made: the picture differs"
        )
    before = {lora["name"]: lora["sha256"] for lora in told.get("loras", [])}
    for lora in now["loras"]:
        if before.get(lora["name"]) != lora["sha256"]:
            result.notes.append(f"LoRA '{lora['name']}' has changed since {Path(path).name} was made: the picture differs")
    return result


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


def load_adapters(request: GenerateRequest) -> list[Adapter]:
    """Find and read the LoRAs of a request."""
    if not request.loras:
        return []
    from studio.lora.files import load_lora
    from studio.lora.library import find_lora

    return [Adapter(name=ref.name, lora=load_lora(find_lora(ref.name)), weight=ref.weight) for ref in request.loras]


def missing_triggers(request: GenerateRequest, adapters: list[Adapter]) -> list[str]:
    """A note for each LoRA whose trigger the prompt lacks. The prompt is never changed silently."""
    words = f" {' '.join(request.prompt.lower().replace(',', ' ').replace('.', ' ').split())} "
    return [
        f"the prompt lacks the trigger '{adapter.lora.trigger}' of LoRA '{adapter.name}': "
        "add it to see what the LoRA was taught"
        for adapter in adapters
        if adapter.weight != 0 and adapter.lora.trigger and f" {' '.join(adapter.lora.trigger.lower().split())} " not in words
    ]


def _sample(
    base: Base,
    bank: LoraBank,
    request: GenerateRequest,
    sampling: Sampling,
    seeds: list[int],
    progress: bool | None,
    on_step: OnStep | None,
    cancelled: Callable[[], bool] | None,
) -> tuple[list[Image], list[str]]:
    """Denoise and decode in rounds of the family's batch; smaller ones when memory runs out."""
    halves = 2 if sampling.guidance > 1 else 1
    size = sampling.size
    notes: list[str] = []
    room = min(base.family.batch, len(seeds))
    check_memory(base, size, halves)
    images: list[Image] = []
    with Bar("denoising", sampling.steps * len(seeds), progress) as bar:

        def stepped(event: Event) -> None:
            bar.reach((len(images) + (event.step.index + 1) / event.step.count * len(now)) * sampling.steps)
            if on_step is not None:
                on_step(event)

        while len(images) < len(seeds):
            now = seeds[len(images) : len(images) + room]
            try:
                negative, positive = encode_pair(base, [request.prompt], [request.negative])
                latents = denoise(
                    base,
                    negative.rows([0] * len(now)),
                    positive.rows([0] * len(now)),
                    seeds=now,
                    size=size,
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    scheduler=sampling.scheduler,
                    method=method_named(request.method),
                    bank=bank,
                    on_step=stepped,
                    cancelled=cancelled,
                )
                images += decode(base.vae, latents)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(now) == 1:
                    raise out_of_memory(base, size, halves) from error
                room = len(now) // 2
                notes = [f"memory was short: the pictures were made {room} at a time"]
    return images, notes


def sidecar(
    base: Base, request: GenerateRequest, adapters: list[Adapter], seeds: list[int], index: int, notes: list[str]
) -> dict[str, Any]:
    """What picture ``index`` of a result carries: a request that makes this one picture again, and what it was made with."""
    own = request.with_(seed=seeds[index], count=1)
    return {
        "studio": studio.__version__,
        "request": own.model_dump(mode="json"),
        "batch": {"index": index, "count": request.count, "seed": request.seed},
        "base": {"name": base.name, "family": base.family.name, "sha256": base.sha256},
        "loras": [{"name": a.name, "weight": a.weight, "sha256": a.lora.sha256} for a in adapters],
        "made_with": {
            **{name: version(name) for name in ("torch", "diffusers", "transformers")},
            "device": str(base.device),
            "dtype": str(base.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "notes": list(notes),
    }


def a1111(base: Base, request: GenerateRequest, sampling: Sampling, adapters: list[Adapter], seed: int) -> str:
    """The ``parameters`` text of one picture."""
    loras = [(Path(a.name).stem, a.weight, auto_v3(a.lora.source) if a.lora.source else "") for a in adapters]
    settings = {
        "Steps": sampling.steps,
        "Sampler": SAMPLERS[sampler_name(sampling.scheduler)].title,
        "CFG scale": f"{sampling.guidance:g}",
        "Seed": seed,
        "Size": f"{sampling.size[0]}x{sampling.size[1]}",
        "Model hash": base.sha256[:10],
        "Model": base.name,
        "Version": f"studio {studio.__version__}",
    }
    return infotext(request.prompt, request.negative, loras, settings)
