"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from studio.errors import FileError
from studio.files import Lines, json_lines, whole


def test_a_file_appears_when_the_block_ends_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole(path) as fresh:
        fresh.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(fresh: Path) -> None:
        fresh.write_text("half")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"), whole(path) as fresh:
        fail(fresh)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*a\.txt: No space left on device"), whole(tmp_path / "a.txt") as fresh:
        fresh.write_text("half")
    assert not list(tmp_path.iterdir())


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole(path) as one, whole(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


def test_lines_survive_any_text_and_a_torn_end(tmp_path: Path) -> None:
    path, entry = tmp_path / "new" / "a.jsonl", {"said": "a \u2028 b \x85 \u732b"}
    lines = Lines(path, "busy")
    with pytest.raises(FileError, match=r"^busy$"):
        Lines(path, "busy")
    lines.add(entry)
    lines.close()
    with path.open("ab") as torn:
        torn.write(b'{"said": "\xe7\x8c')
    again = Lines(path, "busy")
    again.add(entry)
    again.close()
    assert list(json_lines(again.data)) == [entry]
    assert list(json_lines(path.read_bytes())) == [entry, entry]


def test_lines_on_a_full_disk_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    lines = Lines(tmp_path / "a.jsonl", "busy")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*a\.jsonl: No space left on device"):
        lines.add({})
    lines.close()
