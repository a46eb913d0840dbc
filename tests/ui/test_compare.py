"""``studio compare``: the page tells no methods, votes are kept, the table and its JSON, and mistakes in one sentence."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.pairs import read_gallery
from pipelines.votes import VOTES, VoteBook, read_votes
from studio.errors import RequestError
from tests.vote_pictures import duels, paint, vote_on
from ui import cli, console
from ui.vote_page import SIDE, Booth, Shown, launch, plain, vote_page, voter_name

TELLING = re.compile(r"merge|switch|tau|seed\d|\.png|votes\.jsonl", re.IGNORECASE)


def studio(*arguments: str | Path) -> int:
    return console.run(cli.app, ["compare", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return duels(tmp_path / "pictures", ("merge", "switch"), seeds=4)


@pytest.fixture
def booth(folder: Path) -> Booth:
    return Booth(read_gallery(folder), VoteBook(folder), shuffle=5)


def images(stage: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', stage)
    ]


def words_of(stage: str) -> str:
    """All that is shown but the pixels."""
    return re.sub('base64,[^"]*', "", stage)


def test_what_is_shown_tells_no_method(booth: Booth) -> None:
    shown = booth.show("ada")
    assert "a cat and a dog" in shown.stage
    assert "LoRAs: cat 1, dog 0.5" in shown.stage
    assert "0 of 4 pairs done, 4 left" in shown.stage
    assert not TELLING.search(f"{shown.number} {words_of(shown.stage)} {shown.skipped}")
    found = images(shown.stage)
    assert [image.size for image in found] == [(SIDE, SIDE * 6 // 8)] * 2
    for image, picture in zip(found, booth.pairs[int(shown.number)].pictures, strict=True):
        image.load()
        assert (image.info, image.getcolors()) == ({}, [(SIDE * SIDE * 6 // 8, Image.open(picture.path).getpixel((0, 0)))])


def test_votes_follow_what_was_shown(booth: Booth, folder: Path) -> None:
    shown = booth.show("ada")
    for choice in ("left", "right", "equal"):
        pair = booth.pairs[int(shown.number)]
        shown = booth.choose(choice, shown.number, "ada")
        vote = read_votes(folder).votes[-1]
        assert (vote.left, vote.right) == tuple(picture.sha256 for picture in pair.pictures)
        assert (vote.side, vote.shuffle, vote.voter) == (choice, 5, "ada")
        assert vote.winner == {"left": pair.labels[0], "right": pair.labels[1], "equal": None}[choice]
    assert "3 of 4 pairs done, 1 left" in shown.stage
    skipped = booth.choose("skip", shown.number, "ada")
    assert (skipped.number, skipped.skipped) == ("", (int(shown.number),))
    assert "Only pairs that you skipped are left" in skipped.stage
    assert booth.choose("left", shown.number, "ada").stage.count("Thank you") == 1
    assert len(read_votes(folder).votes) == 4


def test_a_second_click_is_no_second_vote(booth: Booth, folder: Path) -> None:
    number = booth.show("ada").number
    booth.choose("left", number, "ada")
    again = booth.choose("right", number, "ada")
    assert "the first vote counts" in again.stage
    assert again.number not in ("", number)
    assert [vote.side for vote in read_votes(folder).votes] == ["left"]
    booth.choose("right", number, " bob\n")
    assert [vote.voter for vote in read_votes(folder).votes] == ["ada", "bob"]
    for odd in ("", "-1", "99", "x", "²"):
        assert booth.choose("left", odd, "ada").number == again.number
    assert len(read_votes(folder).votes) == 2


def test_trouble_is_said_on_the_page(booth: Booth, folder: Path) -> None:
    nameless = booth.choose("left", booth.show("ada").number, "  ")
    assert "1 to 64 letters, got 0" in nameless.stage
    number = booth.show("ada").number
    booth.pairs[int(number)].pictures[0].path.unlink()
    moved = booth.show("ada")
    assert moved.number != number
    assert "one of its pictures is gone" in moved.stage
    (folder / VOTES).unlink()
    (folder / VOTES).mkdir()
    failed = booth.choose("left", moved.number, "ada", moved.skipped)
    assert "This vote was not kept: cannot write" in failed.stage
    assert failed.number == moved.number


def test_what_a_file_says_stays_text(tmp_path: Path) -> None:
    for method in ("merge", "switch"):
        paint(tmp_path / f"{method}.png", method, prompt="<b>${alert(1)}</b> {{x}} `@children`")
    stage = Booth(read_gallery(tmp_path), VoteBook(tmp_path), 1).show("ada").stage
    for mark in ("<b>", "${", "{{", "`", "@children"):
        assert mark not in words_of(stage)
    assert plain("a $ b \ud800") == "a &#36; b ?"
    with pytest.raises(RequestError, match="1 to 64 letters, got 65"):
        voter_name("x" * 65)
    assert voter_name(" Ada\u2028 \x1b L. ") == "Ada L."


def test_the_page_itself_knows_nothing(booth: Booth) -> None:
    page = vote_page(booth, "ada")
    config = page.get_config_file()
    assert not TELLING.search(json.dumps(config, default=str))
    labels = {c["props"].get("value") for c in config["components"] if c["type"] == "button"}
    assert labels == {"left (1)", "right (2)", "about equal (3)", "skip (0)"}
    pressed = [fn.fn for fn in page.fns.values() if fn.name == "press"]
    (begin, _) = [fn.fn for fn in page.fns.values() if fn.name == "begin"]
    shown = Shown(*begin("ada", ()))
    assert shown == booth.show("ada")
    pressed[1](shown.number, "ada", ())
    assert [vote.side for vote in booth.book.ballots.votes] == ["right"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"cannot serve on port {port}.*choose another with --port"):
            launch(page, port, browser=False)


def test_the_table_and_its_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = VoteBook(folder)
    for pair in read_gallery(folder).pairs:
        book.add(vote_on(pair, "right"))
    Image.new("RGB", (4, 4)).save(folder / "plain.png")
    assert studio(folder, "--against", "merge") == 0
    printed = capsys.readouterr()
    assert printed.err == "left out: 1 picture without a request of this studio\n"
    assert "4 votes of 1 voter on 4 groups of pictures" in printed.out
    assert re.search(r"switch +\d\d % +\d\d - \d\d +9\d % +\d\d - 100 +4 +0 +0 +4 *\n", printed.out)
    assert studio(folder, "--against", "merge", "--json") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in told["standings"]] == ["switch", "merge"]
    first = told["standings"][0]
    assert (first["won"], first["equal"], first["lost"]) == (4, 0, 0)
    assert 0.5 < first["against"]["low"] < first["against"]["value"] < first["against"]["high"] < 1
    assert (told["votes"], told["voters"], told["groups"], told["islands"]) == (4, 1, 4, [["merge", "switch"]])
    assert told["notes"] == ["left out: 1 picture without a request of this studio"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{}", "--port", "80"], 2, "--port is for votes: add --vote"),
        (["{}", "--voter", "ada"], 2, "--voter is for votes: add --vote"),
        (["{}", "--vote", "--against", "merge"], 2, "--against is for the table: leave out --vote"),
        (["{}", "--vote", "--port", "0"], 2, "Invalid value for '--port'"),
        (["{}", "--vote", "--voter", " "], 2, "a voter's name has 1 to 64 letters"),
        (["{}/none"], 4, "is not a folder"),
        (["{}/seed0"], 4, "run studio compare --vote"),
        (["{}/alone"], 2, "no two pictures that differ in their method alone (of 1 picture of this studio)"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    paint(folder / "alone" / "merge.png", seed=99)
    assert studio(*(argument.format(folder) for argument in arguments)) == code
    printed = capsys.readouterr()
    assert said in printed.err.splitlines()[-1]
    assert printed.out == ""
    assert not (folder / VOTES).exists()
