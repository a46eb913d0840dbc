"""A page that shows what a method did: the words it found, and what it says of itself (:meth:`compose.run.Method.explain`)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from compose.figures import Boxes, Figure, Maps, Words
from compose.finder import called, spell
from compose.regions import read_mask
from pipelines.figures import draw
from studio.errors import FileError
from studio.lora.library import short_name

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.bank import Adapter
    from compose.tokens import Words as Reader
    from pipelines.image import GenerateResult
    from studio.requests import GenerateRequest, LoraRef

PAGE = "index.html"
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#1e1e1e}"
    "img{max-width:100%}.made img{width:16em;image-rendering:pixelated;margin-right:.6em}"
    "code{background:#f0f0f0;padding:.1em .3em}"
)


def writable(folder: Path) -> None:
    """Make ``folder``, before any work is spent on what goes there.

    Raises:
        FileError: it is a file, or may not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise FileError(f"cannot write to the folder {folder}: it is read-only")


def words_shown(reader: Reader, request: GenerateRequest, adapters: Sequence[Adapter]) -> Figure:
    """The tokens of the prompt and which of them are the LoRAs' words.

    Of a class word that stands several times, the occurrence is shown that the methods take for that LoRA's.
    """
    spelling = spell(reader, request.prompt)
    found: dict[str, list[int]] = {}
    for adapter, (trigger, noun) in zip(adapters, called(reader, request.prompt, adapters), strict=True):
        for word, one in ((adapter.lora.trigger, trigger), (adapter.lora.class_word, noun)):
            if word:
                columns = one.columns if one else ()
                found[f"{adapter.names[1]}: {word}"] = [i for i, c in enumerate(spelling.columns) if c in columns]
    tokens = [spelling.plain[first:last].strip() for first, last in spelling.spans]
    text = "The prompt as the text encoder has it, and where the words of the LoRAs stand."
    return Words(title="Words", text=text, tokens=tokens, found=found)


def regions_shown(request: GenerateRequest) -> list[Figure]:
    """The regions of a request, for methods that do not show them themselves."""
    shown: list[Figure] = []
    boxes = {f"{n + 1} {_called(r.loras)}": r.box for n, r in enumerate(request.regions) if r.box is not None}
    if boxes:
        shown.append(Boxes(title="Boxes", text="Where each LoRA was asked to act, on the finished picture.", boxes=boxes))
    size = request.size or (64, 64)
    masks = {
        f"{n + 1} {_called(r.loras)}": [read_mask(r.mask, size)] for n, r in enumerate(request.regions) if r.mask is not None
    }
    if masks:
        shown.append(Maps(title="Masks", text="Where each LoRA was asked to act.", rows=masks))
    return shown


def _called(loras: Sequence[LoraRef]) -> str:
    return " + ".join(short_name(ref.name) for ref in loras)


def report(folder: Path, result: GenerateResult, figures: Sequence[Figure]) -> Path:
    """Write the pictures of a result, each figure as a PNG, and a page that shows them all; returns the page.

    Raises:
        FileError: something cannot be written.
    """
    if not any(isinstance(figure, Boxes) for figure in figures):
        figures = [*regions_shown(result.request), *figures]
    made = result.save(folder / "picture.png")
    parts = []
    for index, figure in enumerate(figures):
        name = f"{index + 1}-{re.sub(r'[^a-z0-9]+', '-', figure.title.lower()).strip('-') or 'figure'}.png"
        _write(folder / name, draw(figure, result.images[0]))
        parts.append(f"<h2>{escape(figure.title)}</h2>\n<p>{escape(figure.text)}</p>\n<img src='{name}' alt=''>")
    request = result.request
    told = [
        ("prompt", request.prompt),
        ("negative", request.negative),
        ("LoRAs", ", ".join(f"{short_name(ref.name)}:{ref.weight:g}" for ref in request.loras)),
        ("method", " ".join([request.method, *(f"{key}={json.dumps(value)}" for key, value in request.options.items())])),
        ("sampling", f"{request.scheduler}, {request.steps} steps, guidance {request.guidance:g}, seed {request.seed}"),
        *(("note", note) for note in result.notes),
    ]
    head = "".join(f"<p>{name}: <code>{escape(value)}</code></p>\n" for name, value in told if value)
    shown = "".join(f"<img src='{escape(path.name)}' alt=''>" for path in made)
    page = (
        f"<!doctype html><meta charset='utf-8'><title>{escape(request.prompt)}</title><style>{STYLE}</style>\n"
        f"<h1>{escape(request.method)}</h1>\n{head}<p class='made'>{shown}</p>\n" + "\n".join(parts) + "\n"
    )
    try:
        (folder / PAGE).write_text(page, "utf-8")
    except OSError as error:
        raise FileError(f"cannot write {folder / PAGE}: {error.strerror or error}") from error
    return folder / PAGE


def _write(path: Path, image: Image) -> None:
    try:
        image.save(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
