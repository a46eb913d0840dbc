"""Pack a LoRA for others: the file, a preview picture, a card, and A1111's notes, in one zip."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from studio.errors import FileError, RequestError
from studio.files import whole
from studio.hashes import auto_v3, sha256_of
from studio.infotext import parse
from studio.lora.card import a1111_notes, card
from studio.lora.files import read_header
from studio.lora.identity import LoraHeader
from studio.lora.library import find_lora
from studio.media import A1111_CHUNK
from studio.paths import EMBEDDED

LARGEST_PREVIEW = 1024
"""Longer side of the preview picture in pixels."""
NO_DATE = (1980, 1, 1, 0, 0, 0)
"""The same parts make the same archive, whenever it is packed."""


@dataclass(frozen=True)
class Shared:
    """An archive and what is in it."""

    path: Path
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def share(
    name: str,
    out: str | Path | None = None,
    *,
    preview: str | Path | None = None,
    prompt: str | None = None,
    base: str = EMBEDDED,
    seed: int = 0,
    lora_dirs: Sequence[str | Path] = (),
    device: str | None = None,
) -> Shared:
    """Pack the LoRA ``name`` into a zip.

    Args:
        out: the zip; by default beside the working directory, called after the LoRA.
        preview: a picture to show; None draws one.
        prompt: of the drawn preview; by default the trigger and the class word.
        base, seed, device: of the drawn preview.

    No path of this machine goes into the archive.

    Raises:
        RequestError: nothing to draw from, or an ``out`` that is no zip. StudioError: as reading and drawing do.
    """
    source = find_lora(name, lora_dirs)
    header = read_header(source)
    title = source.stem
    target = Path(out) if out is not None else Path(f"{title}.zip")
    if target.suffix != ".zip":
        raise RequestError(f"a LoRA is packed as a .zip file, not as '{target.name}': change the ending")
    notes: list[str] = []
    if preview is not None:
        picture, parameters = _opened(Path(preview)), ""
    else:
        picture, parameters = _drawn(source, header, prompt, base, seed, device, notes)
    told = parse(parameters)
    made = [("prompt", told.prompt), *((key, told.settings.get(key, "")) for key in ("Seed", "Sampler", "Steps", "Model"))]
    text = card(
        header,
        name=title,
        sha256=sha256_of([source])[0],
        autov3=auto_v3(source),
        picture=f"{title}.png",
        made=made if parameters else (),
    )
    parts = {
        f"{title}.safetensors": source.read_bytes(),
        f"{title}.png": _png(picture, parameters),
        f"{title}.json": json.dumps(a1111_notes(header, title), indent=2, ensure_ascii=False).encode(),
        "README.md": text.encode(),
    }
    _write(target, parts)
    return Shared(target, tuple(parts), tuple(notes))


def _drawn(
    source: Path, header: LoraHeader, prompt: str | None, base: str, seed: int, device: str | None, notes: list[str]
) -> tuple[Image.Image, str]:
    from pipelines.image import generate

    words = prompt or _own_words(header)
    if not words:
        raise RequestError(f"LoRA '{source.stem}' names no trigger to draw a preview with: give --prompt or --preview")
    result = generate(words, loras=[(str(source), 1.0)], base=base, seed=seed, device=device)
    notes += result.notes
    return result.images[0], result.parameters[0]


def _own_words(header: LoraHeader) -> str:
    """The trigger, with the class word behind it where it lacks it."""
    trigger = header.triggers[0] if header.triggers else ""
    kind = header.metadata.get("studio.class_word", "")
    return f"{trigger} {kind}".strip() if trigger and kind not in trigger else trigger


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise FileError(f"cannot read the picture {path}: {error}") from error
    picture.thumbnail((LARGEST_PREVIEW, LARGEST_PREVIEW))
    return picture


def _png(picture: Image.Image, parameters: str) -> bytes:
    """A PNG with A1111's text alone: our own record may hold paths of this machine."""
    texts = PngInfo()
    if parameters:
        texts.add_text(A1111_CHUNK, parameters)
    stream = io.BytesIO()
    picture.save(stream, "PNG", pnginfo=texts)
    return stream.getvalue()


def _write(target: Path, parts: dict[str, bytes]) -> None:
    """The archive, whole or not at all."""
    with whole(target) as fresh, zipfile.ZipFile(fresh, "w") as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name, NO_DATE), data, zipfile.ZIP_STORED)
