"""Votes: kept whatever happens, counted once, and what they say."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from pipelines.pairs import Gallery, Pair, arranged, read_gallery
from pipelines.votes import VOTES, Side, VoteBook, count_votes, next_pair, parse_votes, read_votes
from studio.errors import FileError, UnknownNameError
from tests.vote_pictures import duels, paint, vote_on

METHODS = ("composite", "merge", "switch")


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    return read_gallery(duels(tmp_path, METHODS, seeds=3))


def of(gallery: Gallery, *labels: str) -> list[Pair]:
    return [pair for pair in gallery.pairs if pair.labels == labels]


def test_votes_survive_a_kill_in_the_middle_of_a_line(gallery: Gallery) -> None:
    first, second = of(gallery, "merge", "switch")[:2]
    assert VoteBook(gallery.folder).add(vote_on(first, "left"))
    file = gallery.folder / VOTES
    line = file.read_bytes()
    file.write_bytes(line + line[:50])
    assert read_votes(gallery.folder).notes == ["left out: the last line of votes.jsonl, which was cut short"]
    book = VoteBook(gallery.folder)
    assert book.ballots.torn
    assert book.add(vote_on(second, "equal"))
    ballots = read_votes(gallery.folder)
    assert ballots.votes == (vote_on(first, "left"), vote_on(second, "equal"))
    assert (ballots.notes, file.read_bytes().count(b"\n")) == ([], 2)


def test_a_voter_votes_once_on_a_pair(gallery: Gallery) -> None:
    pair = gallery.pairs[0]
    book, other = VoteBook(gallery.folder), VoteBook(gallery.folder)
    assert book.add(vote_on(pair, "left"))
    assert not other.add(vote_on(pair.turned, "left"))
    assert other.ballots.seen_by("ada") == {pair.key}
    assert other.add(vote_on(pair, "right", voter="bob\u2028"))
    twice = (gallery.folder / VOTES).read_bytes() * 2
    ballots = parse_votes(twice)
    assert ([vote.side for vote in ballots.votes], ballots.twice) == (["left", "right"], 2)
    assert ballots.notes == ["left out: 2 votes of a voter on a pair voted on before"]


def test_many_at_once_lose_nothing(gallery: Gallery) -> None:
    books = [VoteBook(gallery.folder) for _ in range(3)]
    votes = [vote_on(pair, "left", voter=f"voter {n}") for n in range(8) for pair in gallery.pairs]
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda task: books[task[0] % 3].add(task[1]), enumerate([*votes, *votes])))
    ballots = read_votes(gallery.folder)
    assert sum(added) == len(ballots.votes) == len(votes)
    assert (ballots.twice, ballots.unreadable) == (0, 0)


def test_lines_that_are_no_votes_are_counted(gallery: Gallery) -> None:
    good = vote_on(gallery.pairs[0], "left").model_dump(mode="json")
    lines = [good, {**good, "version": 2}, {**good, "side": "up"}, {**good, "left": "x"}, [1], {**good, "more": 1}]
    data = "".join(json.dumps(line) + "\n" for line in lines) + "{\n\n"
    ballots = parse_votes(data.encode() + b"\xff\n")
    assert (len(ballots.votes), ballots.unreadable, ballots.torn) == (1, 7, False)


def test_a_folder_that_cannot_be_written(gallery: Gallery) -> None:
    (gallery.folder / VOTES).mkdir()
    with pytest.raises(FileError, match=r"cannot write .*votes\.jsonl"):
        VoteBook(gallery.folder)
    with pytest.raises(FileError, match="cannot read"):
        read_votes(gallery.folder)


def test_the_methods_with_the_fewest_votes_come_next(gallery: Gallery) -> None:
    pairs, book = arranged(gallery.pairs, 3), VoteBook(gallery.folder)
    met = []
    for _ in range(len(pairs)):
        index = next_pair(pairs, book.ballots, "ada")
        assert index is not None
        met.append(frozenset(pairs[index].labels))
        book.add(vote_on(pairs[index], "left"))
    assert next_pair(pairs, book.ballots, "ada") is None
    for start in (0, 3, 6):  # each pair of methods once in every three votes
        assert len(set(met[start : start + 3])) == 3
    assert next_pair(pairs, book.ballots, "bob") == 0
    assert next_pair(pairs, book.ballots, "bob", [0]) not in (0, None)
    assert next_pair(pairs, book.ballots, "bob", range(len(pairs))) is None


def test_wins_count_for_the_method_on_whichever_side_it_stood(gallery: Gallery) -> None:
    book = VoteBook(gallery.folder)
    for pair, side in zip(of(gallery, "merge", "switch"), get_args(Side), strict=True):
        book.add(vote_on(pair, side))
        book.add(vote_on(pair.turned, "right", voter="bob"))  # always for merge
    result = count_votes(gallery, book.ballots, against="merge")
    merge, switch = result.standings
    assert (merge.label, merge.won, merge.equal, merge.lost, merge.votes) == ("merge", 4, 1, 1, 6)
    assert (switch.label, switch.won, switch.equal, switch.lost, switch.votes) == ("switch", 1, 1, 4, 6)
    assert (result.votes, result.voters, result.groups, result.silent) == (6, 2, 3, ("composite",))
    assert merge.against is None
    assert switch.against is not None
    assert 0.2 < switch.against.value < 0.3
    assert switch.against.low < switch.against.value < switch.against.high
    assert switch.average.value == pytest.approx(1 - merge.average.value)
    assert result.notes == ["no vote yet about: composite"]


def test_votes_about_pictures_that_changed_do_not_count(gallery: Gallery) -> None:
    book = VoteBook(gallery.folder)
    for pair in of(gallery, "merge", "switch"):
        book.add(vote_on(pair, "left"))
    paint(gallery.folder / "seed0" / "merge.png", "merge", 0, negative="blurry")
    result = count_votes(read_gallery(gallery.folder), book.ballots)
    assert (result.votes, result.gone) == (2, 1)
    assert "left out: 1 vote about pictures that changed or are gone" in result.notes
    for seed in (1, 2):
        (gallery.folder / f"seed{seed}" / "merge.png").unlink()
    with pytest.raises(FileError, match=r"no vote about the pictures .* \(3 votes about pictures that changed"):
        count_votes(read_gallery(gallery.folder), book.ballots)


def test_methods_that_were_never_compared_are_not_ranked(tmp_path: Path) -> None:
    gallery = read_gallery(duels(tmp_path, ("attend", "composite", "merge", "switch"), seeds=3))
    book = VoteBook(tmp_path)
    for pair in [*of(gallery, "attend", "composite"), *of(gallery, "merge", "switch")]:
        book.add(vote_on(pair, "left"))
    result = count_votes(gallery, book.ballots, against="merge")
    assert result.islands == (("attend", "composite"), ("merge", "switch"))
    assert result.notes[-1].endswith("cannot be ranked: attend, composite; merge, switch")
    against = {one.label: one.against for one in result.standings}
    assert [label for label, found in against.items() if found is not None] == ["switch"]
    book.add(vote_on(of(gallery, "composite", "merge")[0], "equal"))
    result = count_votes(gallery, book.ballots, against="merge")
    assert (len(result.islands), result.notes) == (1, [])


def test_a_reference_nobody_voted_about(gallery: Gallery) -> None:
    book = VoteBook(gallery.folder)
    with pytest.raises(FileError, match=r"no vote .* yet: run studio compare --vote"):
        count_votes(gallery, book.ballots)
    book.add(vote_on(of(gallery, "merge", "switch")[0], "left"))
    with pytest.raises(UnknownNameError, match="'swich': did you mean 'switch'"):
        count_votes(gallery, book.ballots, against="swich")
