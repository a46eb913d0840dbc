"""``studio compare``: blind votes between methods, and the table of what they say."""

from __future__ import annotations

import getpass
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.errors import RequestError
from ui import console
from ui.console import Json

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.pairs import Gallery
    from pipelines.strength import Chance
    from pipelines.votes import Result


def compare(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Pictures this studio wrote, also in folders below; votes.jsonl is kept here.")
    ],
    vote: Annotated[bool, typer.Option("--vote", help="Open a local page that asks for votes; Ctrl-C ends it.")] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="With --vote: port of the page; by default a free one.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="With --vote: only say the page's address.")] = False,
    voter: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --vote: who votes; by default who is logged in.")
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="With --vote: what the page asks.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Also print the chances against this method, for example merge.")
    ] = None,
    json: Json = False,
) -> None:
    """Vote blindly between methods (--vote), and print which one people prefer.

    Pictures are compared when they were made alike in everything but the method: prompt, base, LoRAs, seed, size, steps, ...
    """
    with console.speaking(json) as voice:
        for_votes = {"--port": port, "--no-browser": no_browser, "--voter": voter, "--question": question}
        wrong = [name for name, value in for_votes.items() if value] if not vote else ["--against"] if against else []
        if wrong:
            raise RequestError(f"{wrong[0]} {'is for votes: add --vote' if not vote else 'is for the table: leave out --vote'}")
        from pipelines.pairs import read_gallery

        gallery = read_gallery(folder)
        for note in gallery.notes:
            voice.note(note)
        if vote:
            _ask(voice, gallery, port, not no_browser, voter, question)
        else:
            _tell(voice, gallery, against)


def _ask(
    voice: console.Voice, gallery: Gallery, port: int | None, browser: bool, voter: str | None, question: str | None
) -> None:
    from pipelines.pairs import many
    from pipelines.votes import VoteBook
    from ui.vote_page import QUESTION, Booth, launch, vote_page, voter_name

    name = voter_name(_who() if voter is None else voter)
    book = VoteBook(gallery.folder)
    for note in book.ballots.notes:
        voice.note(note)
    before = len(book.ballots.votes)
    page = vote_page(Booth(gallery, book, secrets.randbelow(2**32), question or QUESTION), name)
    address = launch(page, port, browser)
    voice.note(f"{many(len(gallery.pairs), 'pair')} to vote on at {address} (Ctrl-C ends)")
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        page.close(verbose=False)
    given = len(book.ballots.votes) - before
    words = f"{many(given, 'vote')} given, kept in {book.path}; studio compare {gallery.folder} prints the table"
    voice.answer({"file": str(book.path), "given": given, "votes": len(book.ballots.votes)}, words)


def _who() -> str:
    """The name of who is logged in, where the system knows it."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        return "voter"


def _tell(voice: console.Voice, gallery: Gallery, against: str | None) -> None:
    from pipelines.votes import count_votes, read_votes

    ballots = read_votes(gallery.folder)
    result = count_votes(gallery, ballots, against)
    notes = [*gallery.notes, *ballots.notes, *result.notes]
    for note in notes[len(gallery.notes) :]:
        voice.note(note)
    payload: dict[str, Any] = {"folder": str(gallery.folder), "against": against, **asdict(result), "notes": notes}
    voice.answer(payload, table(result, against), summary(result))


def summary(result: Result) -> str:
    """How much the table rests on."""
    from pipelines.pairs import many

    return f"{many(result.votes, 'vote')} of {many(result.voters, 'voter')} on {many(result.groups, 'group')} of pictures"


def table(result: Result, against: str | None) -> Table:
    """Chances to be preferred in per cent, with 95 % intervals, and the votes they come from."""
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("method", overflow="fold")
    rival = [f"against {against}", "95 %"] if against else []
    for title in ("against the average", "95 %", *rival, "won", "equal", "lost", "votes"):
        drawn.add_column(title, justify="right")
    for one in result.standings:
        counts = map(str, (one.won, one.equal, one.lost, one.votes))
        drawn.add_row(one.label, *_cells(one.average), *(_cells(one.against) if against else ()), *counts)
    return drawn


def _cells(chance: Chance | None) -> tuple[str, str]:
    if chance is None:
        return "-", "-"
    return f"{100 * chance.value:.0f} %", f"{100 * chance.low:.0f} - {100 * chance.high:.0f}"
