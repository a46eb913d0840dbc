"""Blind votes between methods: how they are kept, and how they count.

Votes are lines of ``votes.jsonl`` beside the pictures. They name pictures by the SHA-256 of their files, so a vote about a
picture that was made again since does not count.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from pydantic import Field

from pipelines.pairs import Gallery, Pair, many
from pipelines.strength import Chance, Numbers, chance, fit_strengths, islands, resampled_strengths
from studio.errors import FileError, StudioError, UnknownNameError
from studio.requests import Request

VOTES = "votes.jsonl"

Side = Literal["left", "right", "equal"]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=64)]


class Vote(Request):
    """One line of ``votes.jsonl``. ``left`` and ``right``: SHA-256 of the files; ``winner``: the label preferred, None: equal.

    Args:
        time: UTC, ISO 8601. shuffle: the seed of order and sides. side: what was pressed.
    """

    version: Literal[1] = 1
    time: str
    voter: Name
    question: str
    shuffle: int
    left: Hash
    right: Hash
    left_label: str
    right_label: str
    side: Side
    winner: str | None

    @property
    def key(self) -> frozenset[str]:
        return frozenset((self.left, self.right))

    @property
    def preferred(self) -> str | None:
        """SHA-256 of the preferred picture."""
        return {"left": self.left, "right": self.right, "equal": None}[self.side]


@dataclass(frozen=True)
class Ballots:
    """The votes of a file, the first of each voter on each pair. ``whole``: bytes up to the last whole line."""

    votes: tuple[Vote, ...] = ()
    whole: int = 0
    torn: bool = False
    unreadable: int = 0
    twice: int = 0

    def seen_by(self, voter: str) -> set[frozenset[str]]:
        """The keys of the pairs a voter has voted on."""
        return {vote.key for vote in self.votes if vote.voter == voter}

    @property
    def notes(self) -> list[str]:
        notes = [f"left out: the last line of {VOTES}, which was cut short"] if self.torn else []
        if self.unreadable:
            notes.append(f"left out: {many(self.unreadable, 'line')} of {VOTES} that cannot be read")
        if self.twice:
            notes.append(f"left out: {many(self.twice, 'vote')} of a voter on a pair voted on before")
        return notes


def parse_votes(data: bytes) -> Ballots:
    """The votes in the bytes of a ``votes.jsonl``. What is no vote is counted, never fatal."""
    whole = data.rfind(b"\n") + 1
    given: dict[tuple[str, frozenset[str]], Vote] = {}
    unreadable = twice = 0
    for line in filter(None, data[:whole].split(b"\n")):
        try:
            vote = Vote.of(**json.loads(line))
        except (ValueError, TypeError, RecursionError, StudioError):
            unreadable += 1
            continue
        twice += (vote.voter, vote.key) in given
        given.setdefault((vote.voter, vote.key), vote)
    return Ballots(tuple(given.values()), whole, whole < len(data), unreadable, twice)


def read_votes(folder: Path) -> Ballots:
    """The votes of a folder; none when nobody voted.

    Raises:
        FileError: the file cannot be read.
    """
    path = folder / VOTES
    try:
        return parse_votes(path.read_bytes()) if path.exists() else Ballots()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


class VoteBook:
    """The votes of a folder while people vote: several at once, also from several processes.

    Raises:
        FileError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VOTES
        self._guard = threading.Lock()
        with self._open() as file:
            self.ballots = parse_votes(file.read())

    def add(self, vote: Vote) -> bool:
        """Keep a vote, on the disk before this returns; False when this voter has voted on the pair.

        Raises:
            FileError: it could not be written.
        """
        with self._open() as file:
            self.ballots = parse_votes(file.read())
            file.truncate(self.ballots.whole)
            if vote.key in self.ballots.seen_by(vote.voter):
                return False
            line = json.dumps(vote.model_dump(mode="json")).encode() + b"\n"
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self.ballots = parse_votes(_all_of(file))
        return True

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, at its beginning, ours alone."""
        try:
            with self._guard, self.path.open("a+b") as file:
                _lock(file)
                file.seek(0)
                yield file
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror or error}") from error


def _all_of(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _lock(file: BinaryIO) -> None:
    """Wait until no other process has the file; closing gives it back. Where the system cannot, only threads are kept apart."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def next_pair(pairs: Sequence[Pair], ballots: Ballots, voter: str, skipped: Iterable[int] = ()) -> int | None:
    """The index of the pair to show: of the two methods with the fewest votes so far, the first in the order of ``pairs``.

    Args:
        pairs: as :func:`arranged` has them. skipped: indices not to show.

    Returns:
        None when the voter has seen all.
    """
    about = {pair.key: frozenset(pair.labels) for pair in pairs}
    given = Counter(about[vote.key] for vote in ballots.votes if vote.key in about)
    mine, out = ballots.seen_by(voter), set(skipped)
    left = (index for index, pair in enumerate(pairs) if pair.key not in mine and index not in out)
    return min(left, key=lambda index: (given[about[pairs[index].key]], index), default=None)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How one method stands.

    Args:
        average: the chance against the average of all methods that votes connect with this one, itself among them.
        against: the chance against the reference; None without one, and where no votes connect the two.
    """

    label: str
    average: Chance
    against: Chance | None
    won: int
    equal: int
    lost: int

    @property
    def votes(self) -> int:
        return self.won + self.equal + self.lost


@dataclass(frozen=True, kw_only=True)
class Result:
    """The votes of a folder, counted; the strongest method first.

    ``gone``: votes about pictures that changed or are not there. ``islands``: sets of methods no vote connects. ``silent``:
    methods without a vote.
    """

    standings: tuple[Standing, ...]
    votes: int
    voters: int
    groups: int
    gone: int
    islands: tuple[tuple[str, ...], ...]
    silent: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.gone:
            notes.append(f"left out: {many(self.gone, 'vote')} about pictures that changed or are gone")
        if self.silent:
            notes.append(f"no vote yet about: {', '.join(self.silent)}")
        if len(self.islands) > 1:
            sets = "; ".join(", ".join(names) for names in self.islands)
            notes.append(f"these were never compared with each other, directly or through others, and cannot be ranked: {sets}")
        return notes


def count_votes(gallery: Gallery, ballots: Ballots, against: str | None = None, seed: int = 0) -> Result:
    """Chances of every method with 95 % intervals over groups of pictures.

    Args:
        against: label of the method of reference. seed: of the resampling.

    Raises:
        FileError: no vote counts. UnknownNameError: no votes about ``against``.
    """
    known = {pair.key: pair for pair in gallery.pairs}
    counted = [vote for vote in ballots.votes if vote.key in known]
    gone = len(ballots.votes) - len(counted)
    if not counted:
        lost = f" ({many(gone, 'vote')} about pictures that changed or are gone)" if gone else ""
        raise FileError(f"no vote about the pictures of {gallery.folder} yet{lost}: run studio compare --vote {gallery.folder}")
    labels = sorted({label for vote in counted for label in known[vote.key].labels})
    if against is not None and against not in labels:
        raise UnknownNameError("method for --against", against, labels)
    wins, ties = tally([(vote, known[vote.key]) for vote in counted], labels)
    parts = islands((wins + ties).sum(0))
    return Result(
        standings=tuple(sorted(_standings(labels, wins, ties, against, seed), key=lambda one: -one.average.value)),
        votes=len(counted),
        voters=len({vote.voter for vote in counted}),
        groups=len(wins),
        gone=gone,
        islands=tuple(tuple(labels[index] for index in part) for part in parts),
        silent=tuple(sorted({label for pair in gallery.pairs for label in pair.labels} - set(labels))),
    )


def _standings(labels: list[str], wins: Numbers, ties: Numbers, against: str | None, seed: int) -> Iterator[Standing]:
    score = wins + ties / 2
    strengths, resampled = fit_strengths(score.sum(0)), resampled_strengths(score, seed=seed)
    won, equal, lost = wins.sum((0, 2)), ties.sum((0, 2)), wins.sum((0, 1))
    for part in islands(score.sum(0)):
        rival = next((i for i in part if labels[i] == against), None)
        for i in part:
            yield Standing(
                label=labels[i],
                average=chance(strengths, resampled, i, part),
                against=None if rival in (None, i) else chance(strengths, resampled, i, [rival]),
                won=int(won[i]),
                equal=int(equal[i]),
                lost=int(lost[i]),
            )


def tally(counted: Sequence[tuple[Vote, Pair]], labels: Sequence[str]) -> tuple[Numbers, Numbers]:
    """Wins (row over column) and ties (in both places) of each group of pictures, ``[groups, n, n]``."""
    groups = sorted({pair.pictures[0].group for _, pair in counted})
    place = {group: index for index, group in enumerate(groups)}
    wins, ties = np.zeros((2, len(place), len(labels), len(labels)))
    for vote, pair in counted:
        g, (i, j) = place[pair.pictures[0].group], (labels.index(label) for label in pair.labels)
        if vote.preferred is None:
            ties[g, i, j] += 1
            ties[g, j, i] += 1
        elif vote.preferred == pair.pictures[0].sha256:
            wins[g, i, j] += 1
        else:
            wins[g, j, i] += 1
    return wins, ties
