"""
Owns the judgement of states: writes each into a folder, opens it with plain `sqlite3`, and holds what is found to the record.

What a reader finds must be, byte for byte, what the file was after one of its commits, one that is not older than the last that
was acknowledged before the cut; and each of those must keep every promise the checker knows of to all that the log had been
told by then. So a state costs a recovery by SQLite and a look-up, and none escapes the whole of the checker.

``python -m tests.power.states`` judges in a process of its own, which never imports the package; each line it is given asks
for a record.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.checker import check

from .disk import VARIANTS, Content, Disk, Record, State, name_of
from .history import SUFFIXES, History, Place, history_of, look, read_image

__all__ = ["SOMETIMES", "Report", "judge", "scratch"]

_ABSENT: Final = -1
"""Instead of a commit's number: the file is not there."""

_FEW = 5
"""Failures that are told in full."""

SOMETIMES: Final = {
    "birth": "cut before the new file had its name",
    "unnamed": "the new file's name was not durable yet",
    "born": "cut between the file's birth and its first commit",
    "second life": "cut after a killed process, in the life that recovered its file",
    "killed tail": "un-synced frames of a killed process lay in the file",
    "commit pending": "an un-synced tail of the -wal with a commit in it",
    "commit there": "an un-synced commit, in doubt, was there",
    "commit gone": "an un-synced commit, in doubt, was not there",
    "inside checkpoint": "cut inside a checkpoint, pages of the file not synced",
    "wal anew": "a -wal that was started anew, its first frames not synced",
    "wal cut": "the -wal was being cut at a close",
    "torn": "a write torn between sectors",
    "cut": "a write cut short",
    "shuffled": "writes that arrived in another order",
    "garbage": "a file that grew by what was never written",
    "old frames": "frames of an older -wal behind those that count",
    "reopened": "a store opened what was left",
    "backup": "a backup was acknowledged",
}
"""What a run must have met, by name; `judge` counts the states."""


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder to write states into, in memory if the system has such a file system; it goes with the block."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="lash-power-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass(slots=True)
class Report:
    """What was found in the states of a record, or of many."""

    records: int = 0
    states: int = 0
    distinct: int = 0
    acknowledged: int = 0
    commits: int = 0
    lost: int = 0
    most: int = 0
    corrupt: int = 0
    mixed: int = 0
    broken: int = 0
    reopened: int = 0
    refused: int = 0
    seconds: float = 0.0
    sometimes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Count another's states as well."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            if name == "most":
                self.most = max(self.most, other.most)
            elif name == "sometimes":
                self.sometimes = dict(Counter(mine) + Counter(value))
            else:
                setattr(self, name, mine + value)
        del self.failures[_FEW:]

    @property
    def wrong(self) -> int:
        """How many states broke a promise."""
        return self.lost + self.corrupt + self.mixed + self.broken + self.refused


class Reopener:
    """A process that opens what was left with a real store, which it alone imports."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.power.reopen"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, path: Path) -> None:
        """Have it open, recover and close a file."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()

    def answer(self) -> str | None:
        """Return what a store said against the file that was asked for, or None if nothing."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that opens stores ended")
        said: str | None = json.loads(line)
        return said

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


@dataclass(slots=True)
class _Cut:
    """A point of a record at which the power may go: after so many entries."""

    index: int
    told: int
    must: int
    """The newest commit that was acknowledged."""
    newest: int
    """The newest commit that was written, synced or not."""
    life: int


def _may_cut(changed: bool, entry: list[Any]) -> bool:
    """Say whether a cut after an entry is another than before: on the disk, or in what was acknowledged."""
    return changed or entry[0] == "committed" or (entry[0] == "log" and entry[1][0] == "A")


def _name(content: Content | None) -> bytes:
    return b"" if content is None else name_of(b"%d" % len(content.data) + b"".join(content.blocks))


class _Judge:
    def __init__(self, record: Record, folder: Path, reopener: Reopener | None, every: int) -> None:
        self._record = record
        self._place = Place(folder / "state")
        self._reopening = folder / "reopened"
        self._reopener = reopener
        self._every = every
        self._paths = [record.path + suffix for suffix in SUFFIXES]
        self._disk = Disk(record, self._paths)
        self._met: Counter[str] = Counter()
        self._at_cut: set[str] = set()
        self._at_index = -1
        self._seen: dict[tuple[bytes, ...], int | str] = {}
        self._found: dict[tuple[bytes, bytes], int | str] = {}
        self._asked: tuple[Path, _Cut, str] | None = None
        self.report = Report(records=1, acknowledged=sum(entry[0] == "A" for entry in record.log))
        self.history: History = history_of(record, Place(folder / "history"))
        self.report.commits = len(self.history.at)

    # --- choosing ---

    def run(self, states: int, seed: int, progress: Callable[[int], object]) -> Report:
        began = time.monotonic()
        rng = random.Random(f"{seed} {self._record.kind} {self._record.seed}")
        whole, pending = self._shares(states)
        cut = _Cut(0, 0, _ABSENT, _ABSENT, 0)
        owed_whole = owed = 0.0
        for index, entry in enumerate(self._record.entries):
            changed = self._disk.step(index)
            self._move(cut, index, entry)
            if not _may_cut(changed, entry):
                continue
            if entry[0] == "log":
                self._look_for_backup(entry[1], cut)
            if not self._disk.has_pending():
                owed_whole += whole
                if owed_whole >= 1:
                    owed_whole -= 1
                    self._judge(cut, "all", rng)
                continue
            owed += pending * self._weight(self._disk, index)
            for _ in range(int(owed)):
                self._judge(cut, rng.choice(("all", "nothing", *VARIANTS)), rng)
            owed -= int(owed)
            progress(self.report.states)
        self._hear()
        self._look_at_the_end()
        self.report.distinct = len(self._seen) + 1
        self.report.sometimes = dict(self._met)
        self.report.seconds = time.monotonic() - began
        return self.report

    def _look_at_the_end(self) -> None:
        """
        Make sure that the record, done in full, gives the files that are there: else it has not seen all that was written.

        Raises:
            RuntimeError: it does not.
        """
        state = self._disk.left("all", random.Random(0))
        for path in self._paths:
            content = state.files.get(path)
            file = self._record.saved / "file" / os.path.relpath(path, self._record.folder)
            there = file.read_bytes() if file.exists() else None
            if there != (None if content is None else bytes(content.data)):
                raise RuntimeError(
                    f"the record of {path} does not give that file: something was written past the recorder"
                )

    def _shares(self, states: int) -> tuple[float, float]:
        """Return how many states a cut is worth where nothing is pending, at most one, and one of weight 1 where something is."""
        disk = Disk(self._record, self._paths)
        whole = pending = 0
        for index, entry in enumerate(self._record.entries):
            if _may_cut(disk.step(index), entry):
                if disk.has_pending():
                    pending += self._weight(disk, index)
                else:
                    whole += 1
        share = min(1.0, states / 5 / max(1, whole))
        return share, (states - share * whole) / max(1, pending)

    def _weight(self, disk: Disk, index: int) -> int:
        """Return how many states a cut is worth beside others: most is decided where a commit, or a checkpoint, is not synced."""
        database, wal = (disk.names.get(path) for path in self._paths[:2])
        since = disk.since_names(index)
        if (since is not None and since < 3) or (wal is not None and wal.pending and wal.pending[-1].data is None):
            # a few times in a life
            return 30
        if wal is not None and wal.commits:
            return 8
        return 2 if database is not None and database.pending else 1

    def _move(self, cut: _Cut, index: int, entry: list[Any]) -> None:
        history = self.history
        cut.index = index + 1
        if entry[0] == "log":
            cut.told += 1
            cut.life += entry[1][0] == "K"
        while cut.newest + 1 < len(history.at) and history.at[cut.newest + 1] < cut.index:
            cut.newest += 1
        while cut.must + 1 < len(history.at) and history.acknowledged[cut.must + 1] < cut.index:
            cut.must += 1

    # --- judging ---

    def _judge(self, cut: _Cut, how: str, rng: random.Random) -> None:
        self.report.states += 1
        state = self._disk.left(how, rng)
        self._meet(cut, state)
        if self._paths[0] not in state.files:
            found: int | str = _ABSENT
        else:
            key = tuple(_name(state.files.get(path)) for path in self._paths)
            if key not in self._seen:
                self._seen[key] = self._open(state, key)
            found = self._seen[key]
        self._hold(cut, found, state)
        if self._reopener is not None and self.report.states % self._every == 0:
            self._reopen(cut, state, rng)

    def _open(self, state: State, key: tuple[bytes, ...]) -> int | str:
        """Return the number of the commit that SQLite finds in a state, or what is wrong with it."""
        self._place.write(state, self._paths)
        path = self._place.path
        try:
            # a journal is rolled back by who may write
            known = key[0], look(path, mode="rw" if key[2] else "ro") + key[2]
            if known not in self._found:
                self._found[known] = self._recognise(path)
        except sqlite3.DatabaseError as error:
            return f"corrupt: it cannot be read: {error}"
        finally:
            if key[2]:
                self._place.forget()
        return self._found[known]

    def _recognise(self, path: Path) -> int | str:
        image = read_image(path)
        number = self.history.commits.get(name_of(image))
        if number is not None:
            return number
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            whole = connection.execute("PRAGMA integrity_check(1)").fetchall()
            if whole != [("ok",)]:
                return f"corrupt: {whole[0][0]}"
            orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
        return f"mixed: whole, but what no commit left{', with orphans' if orphans else ''}"

    def _hold(self, cut: _Cut, found: int | str, state: State) -> None:
        report, history = self.report, self.history
        if isinstance(found, str):
            if found.startswith("corrupt"):
                report.corrupt += 1
            else:
                report.mixed += 1
            self._fail(cut, state, found)
            return
        if found < cut.must:
            report.lost += 1
            report.most = max(report.most, cut.must - found)
            self._fail(cut, state, f"lost: commit {found} is there, {cut.must} was acknowledged")
        elif found == _ABSENT:
            if any(entry[0] == "A" for entry in self._record.log[: cut.told]):
                report.lost += 1
                self._fail(cut, state, "lost: the file is not there")
        elif found in history.broken:
            report.broken += 1
            self._fail(cut, state, f"broken: commit {found}: {history.broken[found]}")
        elif cut.told > history.kept_until[found]:
            # what was acknowledged is not in the commit that is there, although no later one was said to be
            report.lost += 1
            report.most = max(report.most, 1)
            self._fail(cut, state, f"lost: commit {found} lacks {history.lacks.get(found)}")
        if cut.newest > cut.must:
            self._met["commit there" if found == cut.newest else "commit gone"] += 1

    def _fail(self, cut: _Cut, state: State, what: str) -> None:
        if len(self.report.failures) < _FEW:
            record = self._record
            self.report.failures.append(f"{record.kind} {record.seed}, cut at {cut.index}, {state.chosen}: {what}")

    def _look_for_backup(self, entry: list[Any], cut: _Cut) -> None:
        made = entry[3].get("path") if entry[0] == "A" else None
        if made is None:
            return
        self._met["backup"] += 1
        if not self._disk.is_durable(made):
            self.report.lost += 1
            self._fail(cut, State({}, {}), f"lost: the backup {made} is not durable")

    # --- what was met ---

    def _meet(self, cut: _Cut, state: State) -> None:
        """Count what a state is an example of."""
        if self._at_index != cut.index:
            self._at_index, self._at_cut = cut.index, set(self._met_at(cut))
        self._met.update(self._at_cut)
        if self._paths[0] not in state.files and self._paths[0] in self._disk.names:
            self._met["unnamed"] += 1
        self._met.update(set(state.chosen.values()))

    def _met_at(self, cut: _Cut) -> Iterator[str]:
        """Say what a cut is an example of, whatever is left."""
        database, wal = (self._disk.names.get(path) for path in self._paths[:2])
        if database is None:
            yield "birth"
            return
        if cut.newest == 0:
            yield "born"
        if cut.life:
            yield "second life"
        if database.pending:
            yield "inside checkpoint"
        if wal is None or not wal.pending:
            return
        if wal.commits:
            yield "commit pending"
        if cut.life and wal.pending[0].at < self._life_began(cut):
            yield "killed tail"
        if any(write.offset == 0 and write.data is not None for write in wal.pending):
            yield "wal anew"
        if wal.cuts:
            yield "wal cut"
        if len(wal.durable) > max(write.offset + len(write.data or b"") for write in wal.pending):
            yield "old frames"

    def _life_began(self, cut: _Cut) -> int:
        entries = self._record.entries
        return next(
            index
            for index in range(cut.index - 1, -1, -1)
            if entries[index][0] == "log" and entries[index][1][0] == "K"
        )

    # --- a real store ---

    def _reopen(self, cut: _Cut, state: State, rng: random.Random) -> None:
        """Have a store open a state, once it has done with the last one."""
        assert self._reopener is not None
        self._hear()
        self._reopening.mkdir()
        path = self._reopening / "agent.db"
        for name, content in self._disk.with_others(state, rng).items():
            target = self._reopening / os.path.relpath(name, self._record.folder)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            target.write_bytes(content.data)
            target.chmod(0o600)
        self._asked = path, _Cut(cut.index, cut.told, cut.must, cut.newest, cut.life), str(state.chosen)
        self._reopener.ask(path)

    def _hear(self) -> None:
        """Take in what the store said that opened a state, and look at what it made of that."""
        if self._asked is None or self._reopener is None:
            return
        (path, cut, chosen), self._asked = self._asked, None
        said = self._reopener.answer()
        self.report.reopened += 1
        self._met["reopened"] += 1
        if said is None:
            log = [*self._record.log[: cut.told], ["K", f"life{cut.life}"], ["Q", "reopened"]]
            broken = check(path, log)
            said = f"after a recovery: {broken[0]}" if broken else None
        if said is not None:
            self.report.refused += 1
            self._fail(cut, State({}, {"chosen": chosen}), said)
        shutil.rmtree(self._reopening)


def judge(
    saved: Path,
    states: int,
    seed: int,
    *,
    reopener: Reopener | None = None,
    every: int = 400,
    progress: Callable[[int], object] = lambda _: None,
) -> Report:
    """Judge about so many states of a record; every so manieth is opened by a store, too."""
    with scratch() as folder:
        return _Judge(Record(saved), folder, reopener, every).run(states, seed, progress)


def main() -> int:
    """Judge the records that are asked for on standard input, and say what was found, a line each."""
    # which is judged with what stands here
    from . import exchanges

    # what is written into memory goes with whoever ends this, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as closing_at_end:
        reopener: Reopener | None = None
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["every"] and reopener is None:
                reopener = Reopener()
                closing_at_end.callback(reopener.close)
            told = time.monotonic()

            def progress(states: int) -> None:
                nonlocal told
                if time.monotonic() - told > 1:
                    told = time.monotonic()
                    print(json.dumps({"progress": states}), flush=True)

            saved, states, seed, every = Path(asked["saved"]), asked["states"], asked["seed"], asked["every"]
            if asked["kind"] in exchanges.EXCHANGES:
                report = exchanges.judge(saved, states, seed)
            else:
                opening = reopener if every else None
                report = judge(saved, states, seed, reopener=opening, every=every, progress=progress)
            imported = sorted(name for name in sys.modules if name.partition(".")[0] == "lash_store")
            assert not imported, imported
            print(json.dumps({"report": asdict(report)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
