"""
Owns the model of a disk: what of a record is durable at a point of it, what is not yet, and what may be left after a power cut.

A file keeps what was written before a sync of it began. Of what was written since, any part may be there, in any order, a write
torn between sectors or cut short, and what a file grew by may be anything. A name, made or changed or removed, is durable once
its folder was synced; before, each change is there or not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["BLOCK", "FRAME_HEADER", "VARIANTS", "Content", "Disk", "Node", "Record", "State", "commits", "name_of"]

SECTOR: Final = 512
BLOCK: Final = 4096
"""Contents are compared by blocks, of whatever size."""

FRAME_HEADER: Final = 24
"""Bytes: how each frame of a ``-wal`` begins, written by itself."""

VARIANTS: Final = ("prefix", "subset", "shuffled", "torn", "cut", "garbage")
"""What may be left of what was not synced, beside all of it and nothing."""


class Record:
    """The record of a store's lives, as `tests.power.record` left it."""

    def __init__(self, saved: Path) -> None:
        about = json.loads((saved / "record.json").read_text())
        self.saved = saved
        self.kind: str = about["kind"]
        self.seed: int = about["seed"]
        self.path: str = about["path"]
        self.folder: str = about["folder"]
        self.entries: list[list[Any]] = about["entries"]
        self.blob = (saved / "record.bin").read_bytes()
        self.log: list[list[Any]] = [entry[1] for entry in self.entries if entry[0] == "log"]


class Write(NamedTuple):
    """A change of a file that is not durable yet, entry *at*: *data* at *offset*, or None: cut, or grown, to *offset*."""

    at: int
    offset: int
    data: bytes | None


def commits(data: bytes | None) -> bool:
    """Say whether what is written is the header of a frame that commits: it names the size of the database after it."""
    return data is not None and len(data) == FRAME_HEADER and data[4:8] != bytes(4)


@dataclass(slots=True)
class Node:
    """A file, whatever its names: its durable content, of which ``version`` counts the changes, and what is pending."""

    number: int
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Write] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    """What names each block of the durable content."""
    commits: int = 0
    """How many of the pending writes are headers of frames that commit."""
    cuts: int = 0
    """How many of them cut the file, or make it grow by nothing."""

    def add(self, write: Write) -> None:
        """Change the file; not durable yet."""
        self.pending.append(write)
        self.commits += commits(write.data)
        self.cuts += write.data is None

    def sync(self, before: int) -> None:
        """Make durable what was noted before an index."""
        covered = [write for write in self.pending if write.at < before]
        if covered:
            size = len(self.durable)
            apply(self.durable, covered)
            self.blocks = blocks_after(self.blocks, self.durable, touched(covered, size))
            self.pending = [write for write in self.pending if write.at >= before]
            self.commits = sum(commits(write.data) for write in self.pending)
            self.cuts = sum(write.data is None for write in self.pending)

    def content(self) -> Content:
        """Return the durable content."""
        return Content(self.durable, self.blocks)


@dataclass(slots=True)
class Content:
    """What a file has, and what names each block of that."""

    data: bytes | bytearray
    blocks: list[bytes]


def name_of(content: bytes | bytearray) -> bytes:
    """Name a content, whole or of a block."""
    return hashlib.sha1(content, usedforsecurity=False).digest()[:10]


def touched(writes: Iterable[Write], size: int) -> set[int]:
    """Return the numbers of the blocks that writes to a file of *size* bytes change."""
    numbers: set[int] = set()
    for _, offset, data in writes:
        first, end = (offset, offset + len(data)) if data is not None else (min(offset, size), max(offset, size))
        # a gap is filled with zeros
        numbers.update(range(min(first, size) // BLOCK, (end + BLOCK - 1) // BLOCK))
        size = end if data is None else max(size, end)
    return numbers


def blocks_after(blocks: list[bytes], content: bytes | bytearray, changed: set[int]) -> list[bytes]:
    """Name the blocks of a content that differs in some from the one whose *blocks* are known."""
    count = (len(content) + BLOCK - 1) // BLOCK
    after = blocks[:count] + [b""] * (count - len(blocks))
    for number in changed:
        if number < count:
            after[number] = name_of(content[number * BLOCK : (number + 1) * BLOCK])
    return after


def apply(content: bytearray, writes: Iterable[Write]) -> bytearray:
    """Do writes to a content, in their order."""
    for _, offset, data in writes:
        size = len(content)
        if data is None:
            if offset < size:
                del content[offset:]
            else:
                content.extend(bytes(offset - size))
            continue
        if offset > size:
            content.extend(bytes(offset - size))
        content[offset : offset + len(data)] = data
    return content


class _Renamed(NamedTuple):
    at: int
    folder: str
    names: dict[str, Node | None]


class State(NamedTuple):
    """A state the disk may be in: the files by name, and what was chosen to get there."""

    files: dict[str, Content]
    """What there is, by name."""
    chosen: dict[str, str]
    """What became of the pending writes, by name."""


class Disk:
    """A disk that goes through a record, entry by entry; *paths* are the names whose states are asked for."""

    def __init__(self, record: Record, paths: Sequence[str]) -> None:
        self._record = record
        self._paths = paths
        self._count = 0
        self._open: dict[int, Node] = {}
        self.names: dict[str, Node] = {}
        self._durable_names: dict[str, Node] = {}
        self._pending_names: list[_Renamed] = []
        self._ours: list[_Renamed] = []

    def step(self, index: int) -> bool:
        """Take the next entry in; say whether it changed what is on the disk, or what of it is durable."""
        kind, *words = self._record.entries[index]
        if kind == "write":
            file, offset, start, size = words
            self._open[file].add(Write(index, offset, self._record.blob[start : start + size]))
        elif kind == "truncate":
            self._open[words[0]].add(Write(index, words[1], None))
        elif kind == "ftruncate":
            self.names[words[0]].add(Write(index, words[1], None))
        elif kind == "sync":
            self._open[words[0]].sync(words[1])
        elif kind == "fsync":
            self.names[words[0]].sync(words[1])
        elif kind == "open":
            self._open[words[0]] = self._named(index, words[1])
        elif kind == "create":
            self._named(index, words[0])
        elif kind == "rename":
            self._rename(index, {words[0]: None, words[1]: self.names[words[0]]})
        elif kind == "link":
            self._rename(index, {words[1]: self.names[words[0]]})
        elif kind == "unlink":
            self._rename(index, {words[0]: None})
        elif kind == "folder":
            self._sync_folder(*words)
        else:
            return False
        return True

    def _named(self, index: int, path: str) -> Node:
        node = self.names.get(path)
        if node is None:
            self._count += 1
            node = Node(self._count)
            self._rename(index, {path: node})
        return node

    def _rename(self, index: int, names: dict[str, Node | None]) -> None:
        self._pending_names.append(_Renamed(index, os.path.dirname(next(iter(names))), names))  # noqa: PTH120
        _rename(self.names, names)
        self._find_ours()

    def _find_ours(self) -> None:
        """Find the pending changes of the names that are asked for, among those of very many side files."""
        self._ours = [change for change in self._pending_names if any(path in change.names for path in self._paths)]

    def _sync_folder(self, folder: str, before: int) -> None:
        left = []
        for change in self._pending_names:
            if change.folder == folder and change.at < before:
                _rename(self._durable_names, change.names)
            else:
                left.append(change)
        self._pending_names = left
        self._find_ours()

    # --- what may be left ---

    def has_pending(self) -> bool:
        """Say whether something of the names that are asked for is not durable."""
        return bool(self._ours) or any(path in self.names and self.names[path].pending for path in self._paths)

    def since_names(self, index: int) -> int | None:
        """Return how many entries ago a name that is asked for was changed, if that is not durable yet."""
        return index - self._ours[-1].at if self._ours else None

    def is_durable(self, path: str) -> bool:
        """Say whether a file, with all that was written to it, outlives any cut from here on."""
        node = self._durable_names.get(path)
        return node is not None and node is self.names.get(path) and not node.pending

    def with_others(self, state: State, rng: random.Random) -> dict[str, Content]:
        """Add to a state of the names that are asked for the other files, each as it may be left."""
        files = dict(state.files)
        for path in {**self._durable_names, **self.names}:
            if path in self._paths:
                continue
            chosen = rng.choice((self.names.get(path), self._durable_names.get(path)))
            if chosen is not None:
                files[path] = left_of(chosen, rng.choice(("all", "nothing", *VARIANTS)), rng)
        return files

    def name_changes(self, most: int) -> Iterator[list[_Renamed]]:
        """Give every part of what is pending of the names that are asked for; of the newest *most* changes, if there are more."""
        older, newest = self._ours[:-most], self._ours[-most:]
        for count in range(len(newest) + 1):
            for kept in itertools.combinations(newest, count):
                yield [*older, *kept]

    def left(self, how: str, rng: random.Random, changes: list[_Renamed] | None = None) -> State:
        """
        Choose a state of the names that are asked for: *how* is "all", "nothing", or one of `VARIANTS`.

        With *changes*, these are what came of the names.
        """
        names = {path: self._durable_names[path] for path in self._paths if path in self._durable_names}
        for change in self._changes_left(how, rng) if changes is None else changes:
            _rename(names, change.names)
        files: dict[str, Content] = {}
        chosen: dict[str, str] = {}
        for path in self._paths:
            node = names.get(path)
            if node is None:
                continue
            # files that are written at once need not share a fate
            fate = how if how in ("all", "nothing") or rng.random() < 0.7 else rng.choice(("all", "nothing", *VARIANTS))
            files[path] = left_of(node, fate, rng)
            if node.pending:
                chosen[path] = fate
        return State(files, chosen)

    def _changes_left(self, how: str, rng: random.Random) -> list[_Renamed]:
        if how == "all":
            return self._ours
        if how == "nothing" or not self._ours:
            return []
        if how == "prefix":
            return self._ours[: rng.randint(0, len(self._ours))]
        return [change for change in self._ours if rng.random() < 0.5]


def _rename(names: dict[str, Node], changes: dict[str, Node | None]) -> None:
    for path, node in changes.items():
        if node is None:
            names.pop(path, None)
        else:
            names[path] = node


def left_of(node: Node, how: str, rng: random.Random) -> Content:
    """Return what may be left of a file."""
    pending = node.pending
    if how == "nothing" or not pending:
        return node.content()
    if how == "all":
        writes = pending
    elif how == "prefix":
        writes = pending[: rng.randint(1, len(pending))]
    else:
        keep = rng.choice((0.3, 0.5, 0.8, 0.95))
        writes = [write for write in pending if rng.random() < keep] or [rng.choice(pending)]
        if how == "shuffled":
            rng.shuffle(writes)
        elif how in ("torn", "cut"):
            at = rng.randrange(len(writes))
            writes = [*writes[:at], *(torn if how == "torn" else cut)(writes[at], rng), *writes[at + 1 :]]
    content = apply(bytearray(node.durable), writes)
    changed = touched(writes, len(node.durable))
    if how == "garbage":
        _fill_growth(content, node, writes, rng)
        changed = touched([*pending, *writes], len(node.durable))
    return Content(content, blocks_after(node.blocks, content, changed))


def torn(write: Write, rng: random.Random) -> list[Write]:
    """Tear a write: some of its sectors are there."""
    index, offset, data = write
    if data is None:
        return []
    first = SECTOR - offset % SECTOR
    edges = [0, *range(first, len(data), SECTOR), len(data)]
    parts = [Write(index, offset + a, data[a:b]) for a, b in itertools.pairwise(edges)]
    if len(parts) == 1:
        return cut(write, rng)
    kept = [part for part in parts if rng.random() < 0.5]
    return kept if len(kept) < len(parts) else parts[:-1]


def cut(write: Write, rng: random.Random) -> list[Write]:
    """Cut a write short."""
    index, offset, data = write
    if data is None:
        return []
    return [Write(index, offset, data[: rng.randrange(len(data))])]


def _fill_growth(content: bytearray, node: Node, writes: list[Write], rng: random.Random) -> None:
    """Put anything where a file grew and its data did not arrive: the size of a file may be durable before what is in it."""
    there = {write.at for write in writes}
    for index, offset, data in node.pending:
        if data is None or index in there or offset < len(node.durable):
            continue
        end = offset + len(data)
        if end <= len(content):
            content[offset:end] = rng.randbytes(len(data))
        else:
            content.extend(bytes(offset - len(content)) if offset > len(content) else b"")
            content[offset:end] = rng.randbytes(len(data))
    # … but not over what did arrive
    apply(content, [write for write in writes if write.data is not None])
