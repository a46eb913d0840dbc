"""Sections of a page that a command writes: only what stands between its two marks is replaced."""

from __future__ import annotations

from pathlib import Path

from studio.errors import FileError
from studio.files import whole


def replace_section(page: Path, section: str, mark: str) -> None:
    """Put ``section`` between the marks called ``mark`` of ``page``, or at its end when it has none. Nothing else is touched.

    Raises:
        FileError: the page has one of the two marks without the other.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    text = page.read_text("utf-8") if page.is_file() else ""
    if (begin in text) != (end in text) or (begin in text and text.index(begin) > text.index(end)):
        raise FileError(f"{page} has one of the marks '{begin}' and '{end}' without the other: restore both, or remove it")
    new = f"{begin}\n{section.strip()}\n{end}"
    if begin in text:
        text = text[: text.index(begin)] + new + text[text.index(end) + len(end) :]
    else:
        text = f"{text.rstrip()}\n\n{new}\n".lstrip()
    with whole(page) as fresh:
        fresh.write_text(text, "utf-8")
