"""Which pictures make a pair for a blind vote.

Two pictures are a pair when they were made alike in everything but the method, its options and regions (a *group*), and their
methods differ, or the options of one method do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from studio.errors import FileError, RequestError, StudioError
from studio.requests import GenerateRequest

FREE = ("method", "options", "regions", "triggers", "count")
"""Fields of a request in which pictures of one group may differ."""
EXAMPLE = (
    "draw the same thing with two methods, for example studio generate PROMPT --lora A --lora B --seed 1 --compose merge, "
    "then the same line with --compose switch"
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG of this studio. ``loras``: names and weights. ``group``: what it shares with those it can be compared to."""

    path: Path
    sha256: str
    method: str
    options: Mapping[str, Any]
    group: str
    prompt: str
    loras: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Pair:
    """Two pictures of one group with different labels; ``labels`` and ``pictures`` have the same order."""

    pictures: tuple[Picture, Picture]
    labels: tuple[str, str]

    @property
    def key(self) -> frozenset[str]:
        """The hashes of both, whatever their order."""
        return frozenset(picture.sha256 for picture in self.pictures)

    @property
    def turned(self) -> Pair:
        """The same with the sides exchanged."""
        return Pair(self.pictures[::-1], self.labels[::-1])


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures of a folder. Left out and counted: ``foreign`` without a request that can be read, and ``copies``."""

    folder: Path
    pictures: tuple[Picture, ...]
    foreign: int = 0
    copies: int = 0

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair, in an order that follows from the pictures alone."""
        labels = labels_of(self.pictures)
        groups: dict[str, list[Picture]] = {}
        for picture in self.pictures:
            groups.setdefault(picture.group, []).append(picture)
        return tuple(
            Pair((a, b), (labels[a.sha256], labels[b.sha256]))
            for group in groups.values()
            for a, b in combinations(sorted(group, key=lambda p: (labels[p.sha256], p.sha256)), 2)
            if labels[a.sha256] != labels[b.sha256]
        )

    @property
    def notes(self) -> list[str]:
        """What was left out, in words."""
        told = ((self.foreign, "without a request of this studio"), (self.copies, "again in another file"))
        return [f"left out: {many(count, 'picture')} {why}" for count, why in told if count]


def read_gallery(folder: Path) -> Gallery:
    """Every PNG below ``folder``.

    Raises:
        FileError: no such folder. RequestError: no two pictures make a pair.
    """
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder: name one with pictures that this studio wrote")
    found: dict[str, Picture] = {}
    foreign = copies = 0
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".png" and path.is_file()):
        picture = read_picture(path)
        foreign += picture is None
        if picture is not None:
            copies += picture.sha256 in found
            found.setdefault(picture.sha256, picture)
    gallery = Gallery(folder=folder, pictures=tuple(found.values()), foreign=foreign, copies=copies)
    if not gallery.pairs:
        others = f"; {'; '.join(gallery.notes)}" if gallery.notes else ""
        raise RequestError(
            f"{folder} holds no two pictures that differ in their method alone (of {many(len(found), 'picture')} of this "
            f"studio{others}): {EXAMPLE}"
        )
    return gallery


def read_picture(path: Path) -> Picture | None:
    """A picture of this studio; None for any other file."""
    from studio.media import read_carried

    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        record = read_carried(path).record or {}
        request = GenerateRequest.of(**record["request"])
        shared = common(request, record)
    except (OSError, StudioError, TypeError, KeyError, AttributeError):  # a stranger's record may hold anything
        return None
    return Picture(
        path=path,
        sha256=digest,
        method=request.method,
        options=request.options,
        group=hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest(),
        prompt=request.prompt,
        loras=tuple((ref.name, ref.weight) for ref in request.loras),
    )


def common(request: GenerateRequest, record: Mapping[str, Any]) -> dict[str, Any]:
    """What all pictures of a group agree in: files by their hashes where the record has them, otherwise by name.

    Args:
        request: with the seed of this very picture. record: what the PNG carries.
    """
    shared = {name: value for name, value in request.model_dump(mode="json").items() if name not in FREE}
    digests = {
        part: {str(entry["name"]): str(entry["sha256"]) for entry in record.get(part) or [] if entry.get("sha256")}
        for part in ("loras", "embeddings", "pictures")
    }
    shared["prompt"] = " ".join(request.prompt.split())
    shared["base"] = (record.get("base") or {}).get("sha256") or request.base
    shared["vae"] = (record.get("vae") or {}).get("sha256") or request.vae
    shared["loras"] = [[digests["loras"].get(ref.name, ref.name), ref.weight] for ref in request.loras]
    shared["embeddings"] = sorted(digests["embeddings"].values()) or list(request.embeddings)
    if request.init_image is not None:
        shared["init_image"] = digests["pictures"].get(str(request.init_image), str(request.init_image))
    return shared


def labels_of(pictures: Iterable[Picture]) -> dict[str, str]:
    """SHA-256 -> label: the method, with those options that tell its variants apart when there are several.

    Only within a group do options tell variants apart: from group to group some follow from prompt and LoRAs.
    """
    pictures = list(pictures)
    variants: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for picture in pictures:
        variants.setdefault((picture.method, picture.group), []).append(picture.options)
    telling: dict[str, list[str]] = {picture.method: [] for picture in pictures}
    for (method, _), several in variants.items():
        names = {name for each in several for name in each if any(_said(each, name) != _said(o, name) for o in several)}
        telling[method] = sorted({*telling[method], *names})
    labels = {}
    for picture in pictures:
        said = [f"{name}={_said(picture.options, name)}" for name in telling[picture.method] if name in picture.options]
        labels[picture.sha256] = f"{picture.method} ({', '.join(said)})" if said else picture.method
    return labels


def _said(options: Mapping[str, Any], name: str) -> str | None:
    if name not in options:
        return None
    value = options[name]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def arranged(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """All pairs in a random order with random sides; of two methods each is on the left as often as the other, or once more."""
    random = Random(seed)
    order = random.sample(list(pairs), len(pairs))
    turns = {labels: random.random() < 0.5 for labels in sorted({pair.labels for pair in pairs})}
    placed = []
    for pair in order:
        turns[pair.labels] = not turns[pair.labels]
        placed.append(pair.turned if turns[pair.labels] else pair)
    return placed


def many(count: int, what: str) -> str:
    """``1 vote``, ``2 votes``."""
    return f"{count} {what}{'' if count == 1 else 's'}"
