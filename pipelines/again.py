"""Pictures again, from what a picture carries: our own record, or the infotext of A1111 and Forge.

Files are known by their hashes, so one that was renamed is found; whatever differs from then is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import studio
from compose import method_named
from compose.schedulers import sampler_name
from pipelines.image import GenerateResult, generate
from pipelines.records import check_record
from studio.base import base_sha256, known_bases, read_json
from studio.errors import FileError, MissingDependencyError, RequestError, UnknownNameError
from studio.hashes import MODEL_DIGITS, auto_v3, sha256_of
from studio.infotext import Infotext, hashes, parse
from studio.lora.library import find_lora, list_loras
from studio.media import read_carried
from studio.paths import EMBEDDED, assets
from studio.prompts import take_tags
from studio.requests import GenerateRequest

if TYPE_CHECKING:
    import torch

SAME = 2
"""Levels of 255 that machines may differ by."""

# A1111's own choice where the schedule is left to it.
_AUTOMATIC = {
    "dpmpp_2m": "Karras", "dpmpp_sde": "Karras", "dpmpp_2s": "Karras", "dpm2": "Karras", "dpm2_a": "Karras",
    "dpmpp_2m_sde": "Exponential", "dpmpp_2m_sde_heun": "Exponential", "dpmpp_3m_sde": "Exponential",
}  # fmt: skip
_FIELDS = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Size": "size", "Clip skip": "clip_skip"}
_TOLD = {
    "Sampler",
    "Schedule type",
    "Model",
    "Model hash",
    "VAE",
    "VAE hash",
    "Lora hashes",
    "TI hashes",
    "TI",
    "Version",
    "RNG",
}


def rerun(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    lora_dirs: Sequence[str | Path] = (),
    progress: bool | None = None,
    explain: str | Path | None = None,
    **changes: Any,
) -> GenerateResult:
    """Make a picture again from what it carries.

    Args:
        path: a picture of this studio; or a picture or ``.txt`` with the infotext of A1111 or Forge.
        device, dtype, memory, lora_dirs, progress, explain: those of :func:`pipelines.generate`.
        changes: fields of the request to use instead, such as ``base="FILE"``. A ``method`` that takes no regions leaves those
            of the picture out.

    The notes say what has another name or other contents than then, and whether the picture is the same.

    Raises:
        studio.errors.StudioError: nothing to run in the file, or something it needs is not here.
    """
    carried = read_carried(path)
    file = Path(path)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "memory": memory, "lora_dirs": lora_dirs}
    how |= {"progress": progress, "explain": explain}
    record = carried.record
    if record is None:
        found = foreign(parse(carried.parameters), file.name, lora_dirs, changes)
    else:
        check_record(record, file.name)
        found = located(record, file, lora_dirs, changes)
    result = generate({**found.fields, **changes}, lora_files=found.files, **how)
    result.notes[:0] = found.notes
    if record is None:
        return result
    result.notes.extend(differences(record, result.sidecars[0], file.name))
    result.notes.extend([] if changes else _compared(file, result.images[0]))
    return result


@dataclass
class Found:
    """What is to be run: ``fields`` of a request, the ``files`` of LoRAs that are called otherwise now, and notes on both."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def located(record: Mapping[str, Any], file: Path, lora_dirs: Sequence[str | Path], changes: Mapping[str, Any]) -> Found:
    """The request that ``file`` carries, and where its files are now: those that were renamed are found by their hashes."""
    request = GenerateRequest.of(**record["request"])
    found = Found()
    triggers = "keep"
    if request.regions and _other_regions(request, file.name, changes, found.notes):
        # What the regions said is gone, and with it the triggers that the prompt did not have to have.
        request, triggers = request.with_(regions=()), "add"
    digests = {entry["name"]: entry["sha256"] for entry in record.get("loras") or []}
    for ref in request.loras if "loras" not in changes else ():
        _locate(ref.name, digests.get(ref.name, ""), lora_dirs, found)
    base = request.base
    if "base" not in changes:
        base = _locate_base(base, (record.get("base") or {}).get("sha256", ""), found.notes)
    found.fields = {**_beside(request, record, file, found.notes).model_dump(mode="json"), "base": base, "triggers": triggers}
    return found


def _other_regions(request: GenerateRequest, name: str, changes: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether the picture's regions are not to be used: others are given, or the method that is asked for takes none."""
    if "regions" in changes:
        return True
    method = str(changes.get("method", request.method))
    options = changes.get("options", request.options if method == request.method else {})
    if method_named(method, **options).regions != "none":  # of a method around another, it depends on that one
        return False
    notes.append(f"method '{method}' takes no regions: those of {name} are left out")
    return True


def _locate_base(name: str, digest: str, notes: list[str]) -> str:
    """Where the base ``name`` is now, if not under its own name; when its weights are nowhere, its name decides."""
    if name == EMBEDDED or not digest:
        return name
    known = known_bases()
    here = Path(name).expanduser()
    here = here if here.exists() else known.get(name.removesuffix(".safetensors"), here)
    if here.exists() and base_sha256(here) == digest:
        return name
    beside = sorted(here.parent.glob("*.safetensors")) if here.suffix == ".safetensors" else []
    place = _with_hash([*known.values(), *beside], digest, base_sha256)
    if place is None:
        return name
    notes.append(f"the base '{name}' is '{place.name}' now: found by its hash")
    return str(place)


def _beside(request: GenerateRequest, record: Mapping[str, Any], file: Path, notes: list[str]) -> GenerateRequest:
    """The request; pictures that are gone are taken from beside ``file``, where they have the contents they had."""
    told = {entry["name"]: entry["sha256"] for entry in record.get("pictures") or []}

    def place(path: Path) -> Path:
        near = file.parent / path.name
        if path.expanduser().is_file() or _file_sha256(near) not in ("", told.get(str(path), "")):
            return path
        if near.is_file():
            notes.append(f"the picture '{path}' is taken from {near}")
            return near
        return path

    regions = [r if r.mask is None else r.with_(mask=place(r.mask)) for r in request.regions]
    start = request.init_image
    return request.with_(regions=regions, init_image=None if start is None else place(start), strength=request.strength)


def _locate(name: str, digest: str, lora_dirs: Sequence[str | Path], found: Found) -> None:
    """Where the LoRA ``name`` is now, if not under its own name; when its contents are nowhere, its name decides."""
    try:
        here: Path | None = find_lora(name, lora_dirs)
    except UnknownNameError:
        here = None
    if not digest or (here is not None and _file_sha256(here) == digest):
        return
    file = _with_hash(list_loras(lora_dirs).values(), digest, _file_sha256)
    if file is None:
        if here is None:
            raise UnknownNameError(
                "LoRA", name, list_loras(lora_dirs), f"(nor is there any with its contents, sha256 {digest[:12]}...)"
            )
        return
    found.files[name] = file
    found.notes.append(f"LoRA '{name}' is '{file}' now: found by its hash")


def differences(record: Mapping[str, Any], now: Mapping[str, Any], name: str) -> list[str]:
    """What is other than when ``name`` was made: contents of files, programs, machine."""
    notes = []
    for part in ("base", "vae"):
        before, after = ((told.get(part) or {}) for told in (record, now))
        if before.get("sha256") != after.get("sha256"):
            title = f"the base '{after.get('name')}'" if part == "base" else "the VAE"
            notes.append(f"{title} has other weights than when {name} was made: the picture differs")
    for part, title in (("loras", "LoRA"), ("embeddings", "embedding"), ("pictures", "the picture")):
        known = [entry["sha256"] for entry in record.get(part) or []]
        notes += [
            f"{title} '{entry['name']}' has changed since {name} was made: the picture differs"
            for entry in now.get(part) or []
            if entry["sha256"] not in known
        ]
    then, today = (told.get("made_with") or {} for told in (record, now))
    other = [f"{key} {then[key]} (now {today[key]})" for key in today if key in then and then[key] != today[key]]
    if record.get("studio") != studio.__version__:
        other.insert(0, f"studio {record.get('studio')} (now {studio.__version__})")
    return notes + ([f"{name} was made with {', '.join(other)}"] if other else [])


def _compared(path: Path, image: Image.Image) -> list[str]:
    """Whether the pixels are those of the file."""
    with Image.open(path) as file:
        before, after = (np.asarray(one.convert("RGB")).astype(int) for one in (file, image))
    if before.shape != after.shape:
        return [f"the picture has another size than {path.name}"]
    most = int(np.abs(before - after).max())
    return [f"the picture differs from {path.name} by up to {most} of 255 levels"] if most > SAME else []


def foreign(told: Infotext, name: str, lora_dirs: Sequence[str | Path], changes: Mapping[str, Any]) -> Found:
    """A request from the text of another program, with notes on what cannot be followed.

    Raises:
        UnknownNameError: its checkpoint or a LoRA is not here. RequestError: no settings in the text.
    """
    if not told.settings:
        raise RequestError(f"{name} carries a text without settings (Steps, Sampler, Seed, ...): nothing can be run from it")
    settings = told.settings
    program = settings.get("Version", "another program")
    found = Found()
    notes, fields = found.notes, found.fields
    if not program.startswith("studio"):
        notes.append(f"{name} was made by another program ({program}): expect a picture close to it, not the same pixels")
    prompt, tags = take_tags(told.prompt)
    known = hashes(settings.get("Lora hashes", ""))
    for tag in tags if "loras" not in changes else ():
        _locate_tagged(tag.name, known.get(tag.name, ""), name, lora_dirs, found)
    fields |= {"prompt": prompt, "negative": told.negative, "loras": [(tag.name, tag.weight) for tag in tags]}
    fields |= {ours: settings[theirs] for theirs, ours in _FIELDS.items() if theirs in settings}
    fields |= {"triggers": "keep", **_scheduler(settings, notes)}
    if "base" not in changes:
        fields["base"] = _foreign_base(settings, name, notes)
    if "vae" not in changes and settings.get("VAE", "Automatic") not in ("Automatic", "None"):
        stem = Path(settings["VAE"]).stem
        fields["vae"] = str(known_bases()[stem]) if stem in known_bases() else None
        if fields["vae"] is None:
            notes.append(f"the VAE '{settings['VAE']}' is not here: the base's own is used, or give one with --vae")
    if "embeddings" not in changes:
        notes += [
            f"the embedding '{word}' is not here, so its name is read as words: give its file with --embedding"
            for word in hashes(settings.get("TI hashes", ""))
        ]
    ignored = [f"{key}: {value}" for key, value in settings.items() if key not in _FIELDS and key not in _TOLD]
    if ignored:
        notes.append(f"not followed: {', '.join(ignored)[:400]}")
    return found


def _scheduler(settings: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    sampler, schedule = settings.get("Sampler", ""), settings.get("Schedule type", "")
    if not sampler:
        return {}
    try:
        plain = sampler_name(sampler)
        if schedule == "Automatic":
            schedule = _AUTOMATIC.get(plain, "")
        return {"scheduler": sampler_name(f"{sampler} {schedule}")}
    except (UnknownNameError, MissingDependencyError) as error:
        notes.append(f"its sampler '{f'{sampler} {schedule}'.strip()}' is not here, so the base's default is used ({error})")
        return {}


def _locate_tagged(name: str, digest: str, told_by: str, lora_dirs: Sequence[str | Path], found: Found) -> None:
    """The LoRA of a tag goes by its name where that has the short hash that the text gives, or else by that hash."""
    unknown: UnknownNameError | None = None
    try:
        here = find_lora(name, lora_dirs)
        if not _is_other(here, digest, auto_v3, _file_sha256):
            return
    except UnknownNameError as error:
        unknown = error
    file = _with_hash(list_loras(lora_dirs).values(), digest, auto_v3, _file_sha256)
    if file is not None:
        found.files[name] = file
        found.notes.append(f"LoRA '{name}' is '{file}' here: found by its hash")
    elif unknown is not None:
        told = f" (nor is there any with its hash {digest})" if digest else ""
        raise UnknownNameError("LoRA", name, list_loras(lora_dirs), told.strip()) from unknown
    else:
        found.notes.append(f"LoRA '{name}' has other contents than when {told_by} was made: the picture differs")


def _foreign_base(settings: Mapping[str, str], told_by: str, notes: list[str]) -> str:
    """The base of a text, by its name where that has the hash that the text gives, or else by that hash."""
    model, digest = settings.get("Model", ""), settings.get("Model hash", "").lower()
    own = assets() / "base" / "studio.json"
    facts = read_json(own) if own.is_file() else {}
    if model in (EMBEDDED, facts.get("name")) or (digest and str(facts.get("sha256", "")).startswith(digest)):
        return EMBEDDED
    known = known_bases()
    here = known.get(model)
    # Others hash a single file; only our own texts name a folder by the hash of its weights.
    comparable = here is not None and (here.is_file() or settings.get("Version", "").startswith("studio"))
    if here is not None and not (comparable and _is_other(here, digest, base_sha256)):
        return model
    found = _with_hash(known.values(), digest, base_sha256)
    if found is not None:
        notes.append(f"the base '{model}' is '{found.name}' here: found by its hash")
        return str(found)
    if here is not None:
        notes.append(f"the base '{model}' has other contents than when {told_by} was made: the picture differs")
        return model
    raise UnknownNameError(
        "base", model or "(not named)", known, hint=f"(its hash is {digest or 'not told'}): give its file with --base"
    )


def _file_sha256(path: Path) -> str:
    return sha256_of([path])[0] if path.is_file() else ""


def _is_other(file: Path, digest: str, *ways: Callable[[Path], str]) -> bool:
    """Whether ``digest`` is none of the file's hashes. Shorter ones tell nothing: old programs computed them otherwise."""
    return len(digest) >= MODEL_DIGITS and _with_hash([file], digest, *ways) is None


def _with_hash(files: Iterable[Path], digest: str, *ways: Callable[[Path], str]) -> Path | None:
    """The first file whose hash, taken in one of the ``ways``, begins as ``digest`` does. Unreadable files are passed over."""
    if len(digest) < 8:
        return None
    for file in files:
        for way in ways:
            try:
                full = way(file)
            except FileError:
                continue
            if full and (full.startswith(digest) or digest.startswith(full)):
                return file
    return None
