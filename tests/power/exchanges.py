"""
Owns what takes a whole file's place: an upgrade, and a backup put back over a file that is sound, damaged, empty, or not there.

Each is recorded once, in a process of its own, from files that are durable when it begins. After a cut the path must name the old
file or the new one, whole, with no ``-wal`` of the one beside the other; once it returned, the new one; and wherever the new one
is, what is said to be kept of the old one is there as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .disk import VARIANTS, Content, Disk, Record, State, name_of
from .history import SUFFIXES, Place, look, read_image
from .states import Report, scratch

__all__ = ["EXCHANGES", "judge", "prepare", "run"]

EXCHANGES: Final = {
    "upgrade": "an older file is upgraded, with a backup",
    "restore": "a backup is put back over a file that is sound",
    "restore damaged": "a backup is put back over a damaged file, beside which its last commits are",
    "restore emptied": "a backup is put back over an empty file, beside which its last commits are",
    "restore again": "the same, after a kill that left the empty file with two names",
    "restore missing": "a backup is put back where there is none",
    "birth": "a file is made where somebody removed one, but not its journal",
}

_WORTH: Final = dict.fromkeys(("rename", "link", "unlink", "folder", "sync", "fsync"), 20)
"""How many states a cut is worth beside others: what happens to names is little, and it decides."""

_NAMES: Final = 5
"""Pending changes of names of which every part is looked at."""

_EMPTIED: Final = ("restore emptied", "restore again")
"""Those in which the only thing of worth is a ``-wal``, which must stay beside the file that it belongs to."""

_OLD: Final = Path(__file__).parents[1] / "data" / "0003.db"


# --- done in processes of their own ---------------------------------------------------------------------------------


def prepare(path: Path, kind: str) -> None:
    """Make the files an exchange begins with, and end this process as a kill would: what is in the ``-wal`` stays there."""
    if kind == "upgrade":
        shutil.copy(_OLD, path)
        return
    if kind == "birth":
        _leave_a_journal(path)
        return
    asyncio.run(_fill(path, kind))


def _leave_a_journal(path: Path) -> None:
    """Leave the journal of a database that was killed in a transaction, and then removed."""
    pid = os.fork()
    if pid == 0:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA cache_size=1").fetchall()
        connection.execute(
            "CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100) "
            "SELECT i, randomblob(3000) AS b FROM n"
        )
        connection.execute("BEGIN")
        connection.execute("UPDATE t SET b = randomblob(3000)")
        os._exit(0)
    os.waitpid(pid, 0)
    assert Path(f"{path}-journal").stat().st_size > 0
    path.unlink()


async def _fill(path: Path, kind: str) -> None:
    from lash_store import Recovery, TaskContext, TaskStore

    store = TaskStore(path, runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> int:
        return number

    await store.open()
    try:
        await _work(store, work, path)
    finally:
        if kind == "restore":
            await store.close()
    if kind != "restore":
        _die_and_break(path, kind)


async def _work(store: Any, work: Any, path: Path) -> None:
    session = await store.session("s1")
    for number in range(4):
        await (await session.spawn(work, number, id=f"before-{number}"))
    await store.backup(path.with_name("backup.db"))
    for number in range(4):
        await (await session.spawn(work, number, id=f"after-{number}"))


def _die_and_break(path: Path, kind: str) -> None:
    """End this process with commits in the ``-wal``, and then break the file."""
    size = path.stat().st_size
    wal = Path(f"{path}-wal")
    assert wal.stat().st_size > 0
    # the file is nobody's to open while SQLite has it open here; what happens to it happens after the end
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    if kind == "restore damaged":
        rng = random.Random(size)
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(rng.randbytes(size - 4096))
    elif kind in _EMPTIED:
        os.truncate(path, 0)
        if kind == "restore again":
            for one in (path, wal):
                os.link(one, str(one).replace("agent.db", "agent.db-replaced"))
            wal.unlink()
    else:
        path.unlink()
        wal.unlink()
    os._exit(0)


def run(path: Path, kind: str) -> str | None:
    """Do an exchange; return where what was there is kept."""
    from lash_store import TaskStore, migrate

    if kind == "upgrade":
        change = migrate.upgrade(path)
        assert change is not None
        assert change.backup is not None
        return str(change.backup)
    if kind == "birth":
        migrate.prepare(path)
        return None
    report = asyncio.run(TaskStore.restore(path.with_name("backup.db"), path))
    return None if report.kept is None else str(report.kept)


# --- judged without the package -------------------------------------------------------------------------------------


class _Exchange:
    def __init__(self, record: Record, folder: Path) -> None:
        self._record = record
        self._place = Place(folder / "state")
        self._sides = [record.path + suffix for suffix in SUFFIXES]
        [done] = [entry for entry in record.log if entry[0] == "A"]
        kept = done[3]["kept"]
        self._kept = [] if kept is None else [kept, *(kept.removesuffix(suffix) + suffix for suffix in SUFFIXES[1:])]
        self._paths = [*self._sides, *dict.fromkeys(self._kept)]
        self.report = Report(records=1)
        self._seen: dict[tuple[bytes, ...], str] = {}
        self._begins = 1 + max(index for index, entry in enumerate(record.entries) if entry == ["mark", "begin"])
        disk, rng = Disk(record, self._paths), random.Random(0)
        for index in range(self._begins):
            disk.step(index)
        # a state is one only until the disk goes on
        old = disk.left("all", rng)
        self._old, self._old_image = self._names(old), self._image(old)
        for index in range(self._begins, len(record.entries)):
            disk.step(index)
        new = disk.left("all", rng)
        self._final, self._new_image = self._names(new), self._image(new)
        self._last_commits = self._final.get(f"{self._kept[0]}-wal") if self._kept else None
        if self._new_image == self._old_image:
            raise ValueError("nothing was exchanged")

    def _names(self, state: State) -> dict[str, bytes]:
        return {path: _name(state.files[path]) for path in self._paths if path in state.files}

    def _image(self, state: State) -> str:
        """Say what a reader finds: the name of a content, or why there is none."""
        if self._sides[0] not in state.files:
            return "absent"
        self._place.write(
            State({path: state.files[path] for path in self._sides if path in state.files}, {}), self._sides
        )
        path = self._place.path
        has_journal = self._sides[2] in state.files
        try:
            look(path, mode="rw" if has_journal else "ro")
            image = read_image(path)
            connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            try:
                whole = connection.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
            finally:
                connection.close()
            # the header says whether, and by whom it was last written
            return name_of(image[:18] + image[20:24] + image[28:92] + image[100:]).hex() if whole else "corrupt"
        except sqlite3.DatabaseError:
            return "corrupt"
        finally:
            if has_journal:
                self._place.forget()

    def run(self, states: int, seed: int) -> Report:
        rng = random.Random(f"{seed} {self._record.seed}")
        disk = Disk(self._record, self._paths)
        entries = self._record.entries
        worth = [0 if index < self._begins else _WORTH.get(entry[0], 1) for index, entry in enumerate(entries)]
        each, owed, acknowledged = states / sum(worth), 0.0, False
        for index, entry in enumerate(entries):
            disk.step(index)
            acknowledged = acknowledged or (entry[0] == "log" and entry[1][0] == "A")
            if worth[index] > 1:
                for changes in disk.name_changes(_NAMES):
                    self._judge(disk.left("all", rng, changes), index + 1, acknowledged=acknowledged)
            owed += each * worth[index]
            for _ in range(int(owed)):
                self._judge(
                    disk.left(rng.choice(("all", "nothing", *VARIANTS)), rng), index + 1, acknowledged=acknowledged
                )
            owed -= int(owed)
        self.report.distinct = len(self._seen)
        return self.report

    def _judge(self, state: State, cut: int, *, acknowledged: bool) -> None:
        self.report.states += 1
        key = tuple(_name(state.files.get(path)) for path in self._sides)
        if key not in self._seen:
            self._seen[key] = self._image(state)
        found, names = self._seen[key], self._names(state)
        what = None
        if found == self._new_image:
            if any(names.get(path) != self._final.get(path) for path in self._kept):
                self.report.lost += 1
                what = f"lost: the new file is there, {self._kept[0]} is not what was kept"
        elif acknowledged:
            self.report.lost += 1
            what = f"lost: it returned, and {'the old file' if found == self._old_image else found} is there"
        elif (
            found == "corrupt" and self._old_image == "corrupt" and names[self._sides[0]] != self._final[self._sides[0]]
        ):
            # SQLite may have copied the old -wal into the old file: that is damaged still
            pass
        elif found == "corrupt":
            self.report.corrupt += 1
            what = f"corrupt: {self._what_is_there(names)}"
        elif found != self._old_image:
            self.report.mixed += 1
            what = f"mixed: neither the old file nor the new one ({found}; {self._what_is_there(names)})"
        if what is None and self._record.kind in _EMPTIED and not self._has_last_commits(names):
            self.report.lost += 1
            what = (
                f"lost: the last commits are not beside their file ({', '.join(map(os.path.basename, sorted(names)))})"
            )
        if what is not None and len(self.report.failures) < 5:
            self.report.failures.append(f"{self._record.kind}, cut at {cut}, {state.chosen}: {what}")

    def _has_last_commits(self, names: dict[str, bytes]) -> bool:
        empty = name_of(b"0")
        files = (self._sides[0], self._kept[0])
        return any(names.get(file) == empty and names.get(f"{file}-wal") == self._last_commits for file in files)

    def _what_is_there(self, names: dict[str, bytes]) -> str:
        said = []
        for path in self._sides:
            if path in names:
                whose = {self._final.get(path): "new", self._old.get(path): "old"}.get(names[path], "other")
                said.append(f"{whose} {os.path.basename(path)}")  # noqa: PTH119
        return ", ".join(said)


def _name(content: Content | None) -> bytes:
    return b"" if content is None else name_of(b"%d" % len(content.data) + b"".join(content.blocks))


def judge(saved: Path, states: int, seed: int) -> Report:
    """Judge about so many states of the record of an exchange."""
    with scratch() as folder:
        return _Exchange(Record(saved), folder).run(states, seed)


def note_files(folder: Path, entries: list[list[Any]], blob: bytearray) -> None:
    """Note in a record the files of a folder, durable."""
    number = 0
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith("-shm"):
            number -= 1
            data = path.read_bytes()
            entries += [["open", number, str(path)], ["write", number, 0, len(blob), len(data)]]
            blob += data
            entries += [["sync", number, len(entries)], ["folder", str(path.parent), len(entries) + 1]]
    entries.append(["mark", "begin"])


def record(saved: Path, kind: str, fork: Callable[[Callable[[], None]], int], begin: Callable[[Path], Any]) -> None:
    """Record an exchange in *saved*; *fork* runs a function in a process of its own, *begin* begins to record there."""
    place = saved / "file"
    place.mkdir(parents=True)
    path = place / "agent.db"
    if fork(lambda: prepare(path, kind)) != 0:
        raise RuntimeError(f"{kind} cannot be prepared")

    def exchanged() -> None:
        recorder = begin(place)
        note_files(place, recorder.entries, recorder.blob)
        recorder.log(["S", "exchange", 1, kind, {}])
        kept = run(path, kind)
        recorder.log(["A", "exchange", 1, {"kept": kept}])
        (saved / "record.bin").write_bytes(bytes(recorder.blob))
        about = {"kind": kind, "seed": 0, "path": str(path), "folder": str(place), "entries": recorder.entries}
        (saved / "record.json").write_text(json.dumps(about))

    if fork(exchanged) != 0:
        raise RuntimeError(f"{kind} failed")
