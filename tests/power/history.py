"""
Owns what a file was after each of its commits, the only things that may survive a power cut, and which promises each keeps.

Found by going through the record once as it was done, with nothing lost.
"""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

from tests.checker import Checker, check

from .disk import BLOCK, FRAME_HEADER, Content, Disk, Record, State, commits, name_of

__all__ = ["SUFFIXES", "History", "Place", "history_of", "look", "read_image"]

SUFFIXES: Final = ("", "-wal", "-journal")
"""What of a database's files may be left by a power cut: the ``-shm`` is made anew by whoever opens it first."""


def read_image(path: Path) -> bytes:
    """
    Return the database that a reader finds in a file and its ``-wal``.

    Raises:
        sqlite3.DatabaseError: there is none.
    """
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
    try:
        return connection.serialize()
    finally:
        connection.close()


def look(path: Path, *, mode: str = "ro") -> bytes:
    """
    Have SQLite recover a file, and return what names the state it found: what its index says of the ``-wal``.

    That is the size of the database, how many frames count, their cumulative checksum and the salt; nothing without a ``-wal``.

    Raises:
        sqlite3.DatabaseError: it cannot be read.
    """
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA user_version").fetchall()
        try:
            with open(f"{path}-shm", "rb") as shared:
                return shared.read(40)[14:]
        except FileNotFoundError:
            return b""
    finally:
        connection.close()


class Place:
    """A folder that states are written into, which knows what lies in it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.path = folder / "agent.db"
        self._there: dict[str, Content] = {}

    def write(self, state: State, paths: list[str]) -> None:
        """Make the files of a state, by writing what is another than in the last one; SQLite may have made some, too."""
        for suffix, path in zip(SUFFIXES, paths, strict=True):
            name = f"{self.path}{suffix}"
            wanted = state.files.get(path)
            if wanted is None:
                Path(name).unlink(missing_ok=True)
                self._there.pop(suffix, None)
                continue
            there = self._there.get(suffix)
            descriptor = os.open(name, os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                _make(descriptor, wanted, there)
            finally:
                os.close(descriptor)
            self._there[suffix] = Content(b"", wanted.blocks)

    def forget(self) -> None:
        """Know nothing any more: somebody else changed what lies there."""
        for suffix in SUFFIXES:
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self._there.clear()


def _make(descriptor: int, wanted: Content, there: Content | None) -> None:
    """Make a file's content what is wanted, where what is *there* differs."""
    if not os.fstat(descriptor).st_size:
        # SQLite removes the -wal of an empty file
        there = None
    if there is not None and there.blocks == wanted.blocks:
        return
    known: list[bytes] = [] if there is None else there.blocks
    count = min(len(known), len(wanted.blocks))
    differ = [number for number, pair in enumerate(zip(known, wanted.blocks, strict=False)) if pair[0] != pair[1]]
    differ += range(count, len(wanted.blocks))
    view = memoryview(wanted.data)
    # runs of neighbours have one difference to their place in the list
    for _, run in itertools.groupby(enumerate(differ), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        os.pwrite(descriptor, view[numbers[0] * BLOCK : (numbers[-1] + 1) * BLOCK], numbers[0] * BLOCK)
    os.ftruncate(descriptor, len(wanted.data))


@dataclass(slots=True)
class History:
    """The commits of a file, numbered from 0, which is its birth."""

    commits: dict[bytes, int] = field(default_factory=dict)
    """By the digest of what a reader finds."""
    at: list[int] = field(default_factory=list)
    """The entry of the record that completed each."""
    acknowledged: list[int] = field(default_factory=list)
    """The entry by which the writer's thread says that each is in the file."""
    kept_until: list[int] = field(default_factory=list)
    """How many entries of the log each holds to."""
    broken: dict[int, str] = field(default_factory=dict)
    """What is wrong with one as it was made."""
    lacks: dict[int, str] = field(default_factory=dict)
    """What is missing of what the log was told before the next one was acknowledged."""


@dataclass(slots=True)
class _Commit:
    at: int
    told: int
    image: bytes


def _commits_of(record: Record, place: Place) -> list[_Commit]:
    """Go through a record as it was done, and look at the file once it is named, and after each frame that commits."""
    paths = [record.path + suffix for suffix in SUFFIXES]
    disk, rng = Disk(record, paths), random.Random(0)
    opened: dict[int, str] = {}
    found: list[_Commit] = []
    told, is_next = 0, False
    for index, entry in enumerate(record.entries):
        disk.step(index)
        kind, is_one = entry[0], False
        if kind == "open":
            opened[entry[1]] = entry[2]
        elif kind == "log":
            told += 1
        elif kind == "rename":
            is_one = entry[2] == record.path
        elif kind == "write" and opened[entry[1]] == paths[1]:
            # a frame is written as its header, then its page
            _, _, _, start, size = entry
            is_one = is_next and size > FRAME_HEADER
            is_next = commits(record.blob[start : start + size])
        if is_one:
            place.write(disk.left("all", rng), paths)
            found.append(_Commit(index, told, read_image(place.path)))
    return found


def history_of(record: Record, place: Place) -> History:
    """
    Return the commits of a record, each judged by the checker.

    Against all that was said before the next one was acknowledged: a file in this state may be left by a cut until then. If it
    does not hold to that, how much it holds to is looked for.
    """
    commits = _commits_of(record, place)
    ends = [index for index, entry in enumerate(record.entries) if entry[0] == "committed"]
    history = History()
    for number, commit in enumerate(commits):
        history.commits[name_of(commit.image)] = number
        history.at.append(commit.at)
        history.acknowledged.append(next((end for end in ends if end > commit.at), len(record.entries)))
    told_by = [0]
    for entry in record.entries:
        told_by.append(told_by[-1] + (entry[0] == "log"))
    checker, given = Checker(), 0
    image = place.path.with_name("image.db")
    for number, commit in enumerate(commits):
        # alone, without a -wal of its own
        image.write_bytes(commit.image[:18] + b"\1\1" + commit.image[20:])
        until = told_by[history.acknowledged[number + 1]] if number + 1 < len(commits) else len(record.log)
        checker.tell(record.log[given:until])
        given = until
        wrong = checker.check(image)
        if wrong:
            history.lacks[number] = str(wrong[0])
            at_once = check(image, record.log[: commit.told])
            if at_once:
                history.broken[number] = str(at_once[0])
            until = commit.told if at_once else _kept_until(image, record, commit.told, until)
        history.kept_until.append(until)
    checker.close()
    image.unlink(missing_ok=True)
    return history


def _kept_until(image: Path, record: Record, good: int, bad: int) -> int:
    """Return how much of a log a file holds to, more than *good* and less than *bad* entries."""
    while bad - good > 1:
        middle = (good + bad) // 2
        if check(image, record.log[:middle]):
            bad = middle
        else:
            good = middle
    return good
