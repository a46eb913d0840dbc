"""What a line of a job file can ask for. A kind of job is a class here; its name is what the line's ``kind`` says."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compose.bank import Adapter, LoraBank
from pipelines.prepare import check_size, load_adapters, prepare, worded
from studio.base import base_sha256, load_base, locate, locate_vae
from studio.embeddings import load_embeddings
from studio.errors import FileError
from studio.hashes import sha256_of
from studio.lora.files import load_lora
from studio.media import read_carried
from studio.requests import MAX_SEED, GenerateRequest, Request

if TYPE_CHECKING:
    from studio.base import Base
    from studio.lora.model import Lora

MARK = "job"
"""What a picture's record calls the digest of the job that wrote it."""
Reach = Callable[[float], None]
"""Told how many of a job's pictures are done, in fractions."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where files are looked for and where models run, the same for all lines: see :func:`pipelines.generate`."""

    lora_dirs: tuple[Path, ...] = ()
    device: str | None = None
    dtype: str | None = None
    memory: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a job left behind: its files, and what is worth keeping about how."""

    files: list[Path]
    facts: Mapping[str, Any]


class Job(ABC):
    """One line, checked.

    Attributes:
        request: with every random choice made, so that it always gives the same.
        model: what has to be loaded for it; jobs of one model are run one after the other.
    """

    takes: ClassVar[type[Request]]
    request: Request
    model: tuple[str, ...]

    @abstractmethod
    def __init__(self, request: Any, name: str, machine: Machine) -> None:
        """Check all that can be checked without a model; ``name`` is what the line calls its result, "" if nothing."""

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """SHA-256 of everything beside the request that the result follows from, by ``kind:`` and what the request calls it."""

    @abstractmethod
    def title(self) -> str:
        """A few words for the names of files."""

    @abstractmethod
    def outputs(self, name: str) -> list[str]:
        """Names of the files it will write when called ``name``."""

    @abstractmethod
    def amount(self) -> int:
        """How many pictures it makes."""

    @abstractmethod
    def fits(self) -> None:
        """Load the model and check what depends on it."""

    @abstractmethod
    def run(self, folder: Path, name: str, mark: str, reach: Reach) -> Written:
        """Do it; every file appears whole or not at all, and carries ``mark``, which is not empty."""

    @abstractmethod
    def marked(self, file: Path) -> str:
        """The mark that ``file`` carries; "" when no job of this kind wrote it."""


class GenerateJob(Job):
    """Pictures of one prompt."""

    takes = GenerateRequest
    request: GenerateRequest

    def __init__(self, request: GenerateRequest, name: str, machine: Machine) -> None:
        self.machine = machine
        self.request = request if request.seed is not None else request.with_(seed=_seed_for(request, name))
        self.prepared = prepare(self.request, machine.lora_dirs)
        worded(self.prepared.request, load_adapters(self.prepared, _read))
        load_embeddings(self.request.embeddings)
        self.model = (str(locate(request.base)), "" if request.vae is None else str(locate_vae(request.vae)))

    def inputs(self) -> dict[str, str]:
        names = [f"lora:{ref.name}" for ref in self.prepared.request.loras]
        files = dict(zip(names, self.prepared.files, strict=True))
        files |= {f"picture:{path}": path.expanduser() for path in self.request.pictures}
        files |= {f"embedding:{name}": Path(name).expanduser() for name in self.request.embeddings}
        base, vae = map(Path, self.model)
        if self.request.vae is not None:
            parts = sorted(vae.glob("*.safetensors")) if vae.is_dir() else [vae]
            files |= {f"vae:{self.request.vae}/{part.name}": part for part in parts}
        return {
            f"base:{self.request.base}": base_sha256(base),
            **dict(zip(files, sha256_of(list(files.values())), strict=True)),
        }

    def title(self) -> str:
        return self.prepared.request.prompt

    def outputs(self, name: str) -> list[str]:
        count = self.request.count
        return [f"{name}.png"] if count == 1 else [f"{name}-{index + 1}.png" for index in range(count)]

    def amount(self) -> int:
        return self.request.count

    def fits(self) -> None:
        base = self._base()
        if self.request.size is not None:
            check_size(base, self.request.size)
        for ref, file in zip(self.prepared.request.loras, self.prepared.files, strict=True):
            _fits(base, ref.name, file)

    def run(self, folder: Path, name: str, mark: str, reach: Reach) -> Written:
        from pipelines.image import generate

        machine = self.machine
        done = 0.0

        def stepped(event: Any) -> None:
            nonlocal done
            done += len(event.latents) / event.step.count
            reach(min(done, self.request.count))

        result = generate(
            self.request,
            progress=False,
            on_step=stepped,
            lora_dirs=machine.lora_dirs,
            device=machine.device,
            dtype=machine.dtype,
            memory=machine.memory,
        )
        for record in result.sidecars:
            record[MARK] = mark
        facts = {"seeds": result.seeds, "seconds": round(result.seconds, 3), "notes": result.notes}
        return Written(files=result.save(folder / f"{name}.png"), facts=facts)

    def marked(self, file: Path) -> str:
        try:
            return str((read_carried(file).record or {}).get(MARK, ""))
        except FileError:
            return ""

    def _base(self) -> Base:
        machine, request = self.machine, self.request
        return load_base(request.base, machine.device, machine.dtype, vae=request.vae, memory=machine.memory)


KINDS: Mapping[str, type[Job]] = {"generate": GenerateJob}
"""Kinds of jobs by name."""


def canonical(value: Any) -> str:
    """The same text for the same values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(*values: Any) -> str:
    """SHA-256 of values as JSON."""
    return sha256(canonical(values).encode()).hexdigest()


def _seed_for(request: GenerateRequest, name: str) -> int:
    """A seed that follows from what the line says, so that running it again finds what was done."""
    return int(digest(request.model_dump(mode="json"), name)[:8], 16) % (MAX_SEED + 1)


@lru_cache(maxsize=8)
def _read(file: Path) -> Lora:
    return load_lora(file)


_FITTING: set[tuple[str, Path]] = set()


def _fits(base: Base, name: str, file: Path) -> None:
    """Refuse a LoRA that is not for this base; each is tried once."""
    key = (base.sha256, file)
    if key not in _FITTING:
        with LoraBank.on(base, [Adapter(name=name, lora=_read(file))]):
            _FITTING.add(key)
