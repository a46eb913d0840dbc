"""What every picture carries: a request that makes it again with the hashes of all it was made with, and A1111's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, JsonValue, ValidationError

import studio
from compose.schedulers import sampler_named
from studio.errors import FileError
from studio.hashes import MODEL_DIGITS, sha256_of
from studio.infotext import write
from studio.requests import place_of

if TYPE_CHECKING:
    from compose.bank import Adapter
    from studio.base import Base
    from studio.embeddings import Embedding
    from studio.requests import GenerateRequest, Sampling


@dataclass(frozen=True, kw_only=True)
class Made:
    """Everything pictures were made with. ``request`` has nothing left open; ``seeds`` are its own from number ``first`` on.

    ``short``: of each LoRA the hash other programs know it by (:func:`~studio.hashes.auto_v3`); "" without a file.
    """

    base: Base
    request: GenerateRequest
    sampling: Sampling
    adapters: list[Adapter]
    short: list[str]
    embeddings: list[Embedding]
    seeds: list[int]
    notes: list[str]
    first: int = 0

    def records(self) -> tuple[list[dict[str, Any]], list[str]]:
        """For each picture its record and its A1111 text."""
        indices = range(len(self.seeds))
        return [self._record(index) for index in indices], [self._infotext(index) for index in indices]

    def _record(self, index: int) -> dict[str, Any]:
        base = self.base
        record: dict[str, Any] = {
            "studio": studio.__version__,
            "request": self.request.with_(seed=self.seeds[index], count=1).model_dump(mode="json"),
            "batch": {"index": self.first + index, "count": self.request.count, "seed": self.request.seed},
            "base": {"name": base.name, "family": base.family.name, "sha256": base.sha256},
            "loras": [
                {"name": a.name, "weight": a.weight, "sha256": a.lora.sha256, "autov3": digest}
                for a, digest in zip(self.adapters, self.short, strict=True)
            ],
            "made_with": made_with(base),
            "notes": list(self.notes),
        }
        if base.vae_sha256:
            record["vae"] = {"name": base.vae_name, "sha256": base.vae_sha256}
        pictures = self.request.pictures
        if pictures:
            digests = sha256_of([path.expanduser() for path in pictures])
            record["pictures"] = [{"name": str(p), "sha256": d} for p, d in zip(pictures, digests, strict=True)]
        if self.embeddings:
            record["embeddings"] = [{"name": e.name, "sha256": e.sha256} for e in self.embeddings]
        return record

    def _infotext(self, index: int) -> str:
        base, request, sampling = self.base, self.request, self.sampling
        settings: dict[str, object] = {
            "Steps": sampling.steps,
            "Sampler": sampler_named(sampling.scheduler).title,
            "CFG scale": f"{sampling.guidance:g}",
            "Seed": self.seeds[index],
            "Size": f"{sampling.size[0]}x{sampling.size[1]}",
            "Model hash": base.sha256[:MODEL_DIGITS],
            "Model": base.name,
        }
        if base.vae_sha256:
            settings |= {"VAE hash": base.vae_sha256[:MODEL_DIGITS], "VAE": base.vae_name}
        if request.clip_skip > 1:
            settings["Clip skip"] = request.clip_skip
        if request.strength is not None:
            settings["Denoising strength"] = f"{request.strength:g}"
        if request.method != "merge":
            settings["Method"] = request.method
        settings["Version"] = f"studio {studio.__version__}"
        loras = [(a.names[1], a.weight, digest) for a, digest in zip(self.adapters, self.short, strict=True)]
        embeddings = [(e.name, e.sha256[:12]) for e in self.embeddings]
        return write(request.prompt, request.negative, loras, settings, embeddings)


def made_with(base: Base) -> dict[str, object]:
    """The programs and the machine, as far as they change a picture's bits."""
    return {
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


class _File(BaseModel):
    name: str
    sha256: str


class _Form(BaseModel):
    """What of a record is read when its picture is made again; the rest may be anything."""

    request: dict[str, JsonValue]
    base: _File | None = None
    vae: _File | None = None
    loras: list[_File] | None = None
    embeddings: list[_File] | None = None
    pictures: list[_File] | None = None
    made_with: dict[str, JsonValue] | None = None


def check_record(record: Mapping[str, Any], file: str) -> None:
    """Refuse what :class:`Made` cannot have written into ``file``: records come from pictures that anybody may have edited.

    Raises:
        FileError: it has another form.
    """
    try:
        _Form.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = place_of(first["loc"])
        raise FileError(
            f"the record in {file} is damaged: '{place}' is {'missing' if first['type'] == 'missing' else 'of another form'}; "
            "give an unedited copy of the picture"
        ) from error
