"""The page of ``studio compare --vote``: two pictures of one prompt side by side, and nothing that tells their methods.

Pictures go to the browser as fresh PNG data inside the page: no file name, no address and no text of the file reaches it.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image

from pipelines.pairs import Gallery, Pair, Picture, arranged
from pipelines.votes import Side, Vote, VoteBook, next_pair
from studio.errors import RequestError, StudioError
from studio.lora.library import short_name

if TYPE_CHECKING:
    import gradio

QUESTION = "Which picture shows everything the words ask for, each once and where asked?"
SIDE = 384
"""About how many pixels the longer side of a small picture is shown with."""
LONGEST = 64
"""Letters of a voter's name."""
BUTTONS = {"left": "left (1)", "right": "right (2)", "equal": "about equal (3)", "skip": "skip (0)"}
KEYS = {"1": "left", "2": "right", "3": "equal", "0": "skip", "ArrowLeft": "left", "ArrowRight": "right", "ArrowDown": "equal"}
CSS = """
.duel { display: flex; gap: 16px; justify-content: center; flex-wrap: wrap; }
.duel figure { margin: 0; text-align: center; flex: 0 1 auto; max-width: 48%; }
.duel img { max-width: 100%; height: auto; image-rendering: pixelated; }
.duel-words { text-align: center; }
"""
LISTEN = """() => {
  const keys = %s;
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName) || !(event.key in keys)) return;
    const found = document.getElementById("vote-" + keys[event.key]);
    const button = found && (found.matches("button") ? found : found.querySelector("button"));
    if (button) { event.preventDefault(); button.click(); }
  });
}"""


@dataclass(frozen=True)
class Shown:
    """What the browser gets. ``number``: of the pair in the booth's order; "" when none is left. ``skipped``: of this visit."""

    number: str
    stage: str
    skipped: tuple[int, ...]


class Booth:
    """Shows pairs and takes votes; any number of voters at once.

    Args:
        shuffle: the seed of order and sides, noted in each vote.
    """

    def __init__(self, gallery: Gallery, book: VoteBook, shuffle: int, question: str = QUESTION) -> None:
        self.pairs: Sequence[Pair] = arranged(gallery.pairs, shuffle)
        self.book, self.shuffle, self.question = book, shuffle, question

    def show(self, voter: str, skipped: Sequence[int] = (), said: str = "") -> Shown:
        """The next pair for a voter. ``said``: a line above it."""
        try:
            name = voter_name(voter)
        except RequestError as error:
            return Shown("", _line(str(error)), tuple(skipped))
        done = len(self.book.ballots.seen_by(name) & {pair.key for pair in self.pairs})
        counter = _line(f"{done} of {len(self.pairs)} pairs done, {len(self.pairs) - done} left")
        gone = ""
        while (index := next_pair(self.pairs, self.book.ballots, name, skipped)) is not None:
            try:
                stage = stage_of(self.pairs[index], self.question)
            except OSError:
                skipped, gone = (*skipped, index), "A pair was left out: one of its pictures is gone."
                continue
            return Shown(str(index), _said(said, gone) + stage + counter, tuple(skipped))
        left = f"Only pairs that you skipped{' or that are gone' if gone else ''} are left: reload the page to see them again."
        end = "Thank you, that was all." if done == len(self.pairs) else left
        return Shown("", _said(said, gone) + _line(end) + counter, tuple(skipped))

    def choose(self, choice: str, number: str, voter: str, skipped: Sequence[int] = ()) -> Shown:
        """Take what was pressed about the pair that the browser shows, and show the next.

        Args:
            choice: a key of :data:`BUTTONS`. number: as in :class:`Shown`.
        """
        if not number.isdecimal() or int(number) >= len(self.pairs):
            return self.show(voter, skipped)
        index = int(number)
        if choice == "skip":
            return self.show(voter, (*skipped, index))
        try:
            side = next(side for side in get_args(Side) if side == choice)
            fresh = self.book.add(self._vote(self.pairs[index], side, voter_name(voter)))
        except StudioError as error:
            return self.show(voter, skipped, f"This vote was not kept: {error}")
        return self.show(voter, skipped, "" if fresh else "You had voted on this pair before; the first vote counts.")

    def _vote(self, pair: Pair, side: Side, voter: str) -> Vote:
        left, right = pair.pictures
        return Vote.of(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            voter=voter,
            question=self.question,
            shuffle=self.shuffle,
            left=left.sha256,
            right=right.sha256,
            left_label=pair.labels[0],
            right_label=pair.labels[1],
            side=side,
            winner={"left": pair.labels[0], "right": pair.labels[1], "equal": None}[side],
        )


def voter_name(text: str) -> str:
    """A name as it is kept: printable, on one line.

    Raises:
        RequestError: none, or too long a one.
    """
    name = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not 0 < len(name) <= LONGEST:
        raise RequestError(f"a voter's name has 1 to {LONGEST} letters, got {len(name)}: give another one")
    return name


def stage_of(pair: Pair, question: str) -> str:
    """The words and both pictures as HTML. What a file says is a stranger's: it stays text.

    Raises:
        OSError: a picture cannot be read.
    """
    figures = "".join(
        f'<figure><img alt="picture on the {side}" src="{data_of(picture.path)}"><figcaption>{side}</figcaption></figure>'
        for side, picture in zip(("left", "right"), pair.pictures, strict=True)
    )
    words = f'<div class="duel-words"><h3>{plain(pair.pictures[0].prompt)}</h3>{_loras(pair.pictures[0])}</div>'
    return f'{words}<div class="duel">{figures}</div>{_line(question)}'


def plain(text: str) -> str:
    """``text`` as HTML that shows it, also where a page reads ``{{ }}`` and ``${ }`` as its own."""
    speakable = text.encode("utf-8", "replace").decode()  # half a surrogate would stop the whole page
    return "".join(f"&#{ord(c)};" if c in "{}$`\\@" else c for c in html.escape(speakable))


def data_of(path: Path) -> str:
    """The pixels of a picture as a PNG in a ``data:`` address; small ones are enlarged crisply, to about :data:`SIDE`."""
    with Image.open(path) as file:
        pixels = file.convert("RGB")
    factor = max(1, round(SIDE / max(pixels.size)))
    fresh = Image.new("RGB", pixels.size)  # a copy would carry the file's texts along
    fresh.paste(pixels)
    stream = io.BytesIO()
    fresh.resize((pixels.width * factor, pixels.height * factor), Image.Resampling.NEAREST).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _loras(picture: Picture) -> str:
    told = [f"{short_name(name)} {weight:g}{_calls(name)}" for name, weight in picture.loras]
    return f"<p>LoRAs: {plain(', '.join(told))}</p>" if told else ""


@cache
def _calls(lora: str) -> str:
    """What a LoRA is called by in prompts, where its file is known and says so."""
    from studio.lora.files import read_header
    from studio.lora.library import find_lora

    try:
        metadata = read_header(find_lora(lora)).metadata
    except (StudioError, RuntimeError, ValueError):  # a stranger's name may be any text, "~nobody" too
        return ""
    words = f"{metadata.get('studio.trigger', '')} {metadata.get('studio.class_word', '')}".strip()
    return f" ('{words}')" if words else ""


def _said(*lines: str) -> str:
    return _line(" ".join(filter(None, lines))) if any(lines) else ""


def _line(text: str) -> str:
    return f'<p class="duel-words">{plain(text)}</p>'


def vote_page(booth: Booth, voter: str) -> gradio.Blocks:
    """The page; nothing of it says anything before a browser asks."""
    # Before the library is read: nothing is reported to its makers, and browsers keep no history of what was shown.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    import gradio as gr

    def listed(shown: Shown) -> tuple[str, str, tuple[int, ...]]:
        return shown.number, shown.stage, shown.skipped

    def begin(name: str, skipped: tuple[int, ...]) -> tuple[Any, ...]:
        return listed(booth.show(name, skipped))

    def pressing(choice: str) -> Any:
        def press(number: str, name: str, skipped: tuple[int, ...]) -> tuple[Any, ...]:
            return listed(booth.choose(choice, number, name, skipped))

        return press

    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="Blind votes", analytics_enabled=False) as page:
        skipped = gr.State(())
        number = gr.Textbox(visible="hidden", elem_id="vote-number")
        stage = gr.HTML()
        out = [number, stage, skipped]
        with gr.Row():
            pressed = {choice: gr.Button(text, elem_id=f"vote-{choice}") for choice, text in BUTTONS.items()}
        name = gr.Textbox(voter, label="Your name (Enter to change)", max_length=LONGEST)
        for choice, button in pressed.items():
            button.click(pressing(choice), [number, name, skipped], out, **quiet)
        name.submit(begin, [name, skipped], out, **quiet)
        page.load(begin, [name, skipped], out, **quiet)
    return page


def launch(page: gradio.Blocks, port: int | None, browser: bool) -> str:
    """Serve the page to this machine alone, and return its address.

    Raises:
        RequestError: the port is taken.
    """
    import json

    import gradio as gr

    fonts = ["system-ui", "sans-serif"]  # the library's own would be fetched from a network
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
            css=CSS,
            js=LISTEN % json.dumps(KEYS),
        )
    except OSError as error:
        raise RequestError(f"cannot serve on port {port or 'any'}: {error}; choose another with --port") from error
    return address
