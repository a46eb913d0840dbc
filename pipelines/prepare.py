"""What can be known about a request before any weight is loaded: its files, its method, its prompt. Mistakes are said here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from compose import METHODS, method_class, method_named
from compose.bank import Adapter
from compose.finder import with_triggers
from compose.regions import read_mask
from compose.run import Method
from compose.schedulers import sampler_name
from compose.tokens import learnt
from studio.embeddings import Embedding
from studio.errors import RequestError, UnknownNameError
from studio.lora.files import load_lora
from studio.lora.library import find_lora, short_name
from studio.media import open_picture
from studio.prompts import not_followed, take_tags
from studio.requests import GenerateRequest, LoraRef

if TYPE_CHECKING:
    from studio.base import Base
    from studio.lora.model import Lora

STRENGTH = 0.6
"""How much of a start picture may change where a request leaves it open."""
GLANCE = (64, 64)
"""Masks are looked at in this size before anything is loaded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A request that can be run, as far as one can tell without its base.

    ``request`` has the LoRAs its prompt named among its own; ``files`` are theirs, in order; ``start`` is its first picture.
    """

    request: GenerateRequest
    method: Method
    files: tuple[Path, ...]
    start: Image.Image | None
    notes: tuple[str, ...]


def prepare(
    request: GenerateRequest, lora_dirs: Sequence[str | Path] = (), lora_files: Mapping[str, Path] = MappingProxyType({})
) -> Prepared:
    """Check ``request`` and find its files.

    Raises:
        studio.errors.StudioError: with one sentence, the first thing that is wrong.
    """
    asked, notes = without_tags(request)
    method = method_named(asked.method, **asked.options)
    if asked.scheduler is not None:
        sampler_name(asked.scheduler)
    check_method(asked, method)
    files = tuple(find_loras(asked, lora_dirs, lora_files))
    for mask in (region.mask for region in asked.regions if region.mask is not None):
        read_mask(mask, GLANCE)
    start = None if asked.init_image is None else open_picture(asked.init_image)
    return Prepared(request=asked, method=method, files=files, start=start, notes=tuple(notes))


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


def check_method(request: GenerateRequest, method: Method) -> None:
    """Refuse a method of several LoRAs without any, and regions where they are not taken, or none where they are needed."""
    name = request.method
    if not request.loras and (name != "merge" or request.options):
        raise RequestError(f"method '{name}' composes LoRAs, but the request names none: add one, or leave the method out")
    if request.regions and method.regions == "none":
        others = " or ".join(f"'{other}'" for other in METHODS if method_class(other).regions != "none")
        raise RequestError(f"method '{name}' takes no regions: leave them out" + (f", or use {others}" if others else ""))
    if not request.regions and method.regions == "required":
        raise RequestError(
            f"method '{name}' needs to know where each LoRA acts: give regions, such as "
            f"{short_name(request.loras[0].name)}@0,0,0.5,1"
        )
    known = {name for ref in request.loras for name in (ref.name, short_name(ref.name))}
    for wanted in (ref.name for region in request.regions for ref in region.loras):
        if wanted not in known:
            raise UnknownNameError(
                "LoRA of a region", wanted, known, "(a region's LoRAs are those of the request: name it there too)"
            )


def find_loras(request: GenerateRequest, lora_dirs: Sequence[str | Path], lora_files: Mapping[str, Path]) -> Iterator[Path]:
    """The file of each LoRA, in order.

    Args:
        lora_dirs: folders that are searched first. lora_files: the files of LoRAs whose names are no longer theirs.

    Raises:
        UnknownNameError: there is none. RequestError: two names are one file.
    """
    seen: dict[Path, str] = {}
    for ref in request.loras:
        file = lora_files.get(ref.name) or find_lora(ref.name, lora_dirs)
        other = seen.setdefault(file.resolve(), ref.name)
        if other != ref.name:
            raise RequestError(
                f"LoRAs '{other}' and '{ref.name}' are the same file {file}: name it once, with the weight you want"
            )
        yield file


def load_adapters(prepared: Prepared, read: Callable[[Path], Lora] = load_lora) -> list[Adapter]:
    """Read the LoRAs, and let the method judge them.

    Raises:
        LoraFileError, UnsafeFileError: a file that is damaged or no LoRA. RequestError: the method cannot compose them.
    """
    pairs = zip(prepared.request.loras, prepared.files, strict=True)
    adapters = [Adapter(name=ref.name, lora=read(file), weight=ref.weight) for ref, file in pairs]
    prepared.method.check(adapters)
    return adapters


def worded(request: GenerateRequest, adapters: Sequence[Adapter]) -> tuple[GenerateRequest, list[str]]:
    """The request with its prompt as it will be drawn, and a note for each trigger that was added.

    LoRAs of regions are called by what those regions say, not by the whole prompt.

    Raises:
        RequestError: a trigger is missing, and the request says that it must not be.
    """
    if request.triggers == "keep":
        return request, []
    strict = request.triggers == "require"
    whole = request.options.get("prompt") == "whole"
    speaking = [region for region in request.regions if region.prompt is not None or not whole]
    local = {ref.name for region in speaking for ref in region.loras}
    prompt, notes = with_triggers(request.prompt, [a for a in adapters if not local & {*a.names}], strict=strict)
    for region in request.regions if strict else ():
        if region.prompt is not None:
            names = {ref.name for ref in region.loras}
            with_triggers(region.prompt, [a for a in adapters if names & {*a.names}], strict=True)
    return request.with_(prompt=prompt, triggers="keep"), notes


def with_words(embeddings: list[Embedding], adapters: list[Adapter]) -> tuple[Embedding, ...]:
    """All learnt words of a request: its embeddings, and those that LoRAs with a weight carry.

    Raises:
        RequestError: two of one name.
    """
    carried = [word for adapter in adapters if adapter.weight != 0 for word in adapter.words]
    taken = {call.lower(): embedding.name for embedding in embeddings for call in embedding.calls}
    for word in carried:
        other = taken.setdefault(word.calls[0].lower(), word.name)
        if other != word.name:
            raise RequestError(f"'{other}' and '{word.name}' both teach the word '{word.calls[0]}': use one of them")
    return (*embeddings, *carried)


def missing_embeddings(request: GenerateRequest, embeddings: Sequence[Embedding]) -> list[str]:
    """A note for each embedding that no prompt calls."""
    called = learnt(embeddings, request.prompt) | learnt(embeddings, request.negative)
    return [
        f"no prompt calls the embedding '{embedding.name}': write '{embedding.calls[-1]}' where it should act"
        for embedding in embeddings
        if embedding.name not in called
    ]


def check_size(base: Base, size: tuple[int, int]) -> None:
    """Refuse sizes the base cannot make, naming the nearest it can."""
    step, least = base.latent_factor, base.size_step
    if all(side % step == 0 and side >= least for side in size):
        return
    low, high = (tuple(max((side + up) // step * step, least) for side in size) for up in (0, step - 1))
    near = f"{low[0]}x{low[1]}" + (f" or {high[0]}x{high[1]}" if high != low else "")
    raise RequestError(
        f"size {size[0]}x{size[1]} does not fit base '{base.name}': width and height must be multiples of {step} "
        f"and at least {least}; nearest: {near}"
    )


def size_like(base: Base, picture: tuple[int, int]) -> tuple[int, int]:
    """The size of about the area the base is made for that is shaped like ``picture`` (width, height)."""
    step = base.size_step
    area = base.family.size[0] * base.family.size[1]
    factor = (area / (picture[0] * picture[1])) ** 0.5
    width, height = (max(1, round(side * factor / step)) * step for side in picture)
    return width, height


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``picture`` brought to ``size`` (width, height); what sticks out is cut off evenly on both sides."""
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
