"""
Owns a run: starts the processes on one file, kills those that pass by, brings all to rest now and then, and measures.

It never opens the file while others have it open. At each rest the long-lived process alone is there, and does nothing: the
file is copied and judged against the log since the last rest, which begins with what the file said then, so it is bounded.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.acceptance import processes
from tests.campaign.victim import Plan
from tests.checker import outcome
from tests.soak.lives import LongPlan, make_file, pass_by, stay

__all__ = ["Run", "Soak"]

_OPENS = 90.0
"""Seconds in which a process must have opened the file, and in which everything must have come to rest."""

_PIPE = 1 << 20
"""Bytes that may wait in the pipe: nobody who speaks is to be held up."""

_MIB = 1024 * 1024

_STAY = ("tombstones", "owners", "sessions", "handoffs", "campaign_effects", "ballast")
"""Tables of which prune takes nothing away: rows that are meant to stay, and the program's own."""


@dataclass
class Run:
    """What a run has found: samples by measure, counts of what happened, and what was broken."""

    seconds: float = 0.0
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    sometimes: Counter[str] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)
    bodies: int = 0
    judged: int = 0
    grown: dict[str, Any] = field(default_factory=dict)

    def add(self, measure: str, at: float, value: float) -> None:
        """Note a value of a measure."""
        self.samples.setdefault(measure, []).append((round(at, 3), value))


@dataclass
class _Short:
    plan: Plan
    process: Any
    born: float
    kill_at: float | None
    has_opened: bool = False


class Soak:
    """
    One run of so many *seconds* of load, with a rest every *rest* seconds.

    *leak* is what the long-lived process keeps on purpose, every *leak_every* seconds; *life* how long the others live;
    *grown* how many MiB of a program's own are in the file from the beginning.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: str,
        seconds: float,
        rest: float,
        leak: tuple[str, ...] = (),
        leak_every: float = 1.0,
        life: tuple[float, float] = (0.5, 5.0),
        sample: float = 1.0,
        grown: int = 0,
        say: Callable[[Run, float], None] | None = None,
    ) -> None:
        self.folder = folder
        self.found = Run()
        self._chance = random.Random(seed)
        self._seconds = seconds
        self._rest_every = rest
        self._life = life
        self._sample_every = sample
        self._grown = grown
        self._leak = (leak, leak_every)
        self._tell = say
        self._path = folder / "agent.db"
        self._log = folder / "log.jsonl"
        self._shorts: dict[str, _Short] = {}
        self._long: Any = None
        self._asked: dict[tuple[str, int], str] = {}
        self._opened: set[str] = set()
        self._rested: dict[str, Any] | None = None
        self._buffer = b""
        self._number = 0
        self._began = 0.0
        self._paused_at: float | None = None
        self._mine, self._theirs = processes._context.Pipe(duplex=False)
        fcntl.fcntl(self._theirs.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)
        self._commands, self._my_commands = processes._context.Pipe(duplex=False)

    # --- the whole run ---

    def run(self) -> Run:
        """Live through it, and return what was found."""
        with contextlib.ExitStack() as until:
            self._out = until.enter_context(self._log.open("ab"))
            until.callback(self._end_all)
            self._make_file()
            self._start_long()
            self._began = time.monotonic()
            while self._now() < self._seconds and not self.found.broken:
                self._one_turn()
            self.found.seconds = min(self._now(), self._seconds)
            if not self.found.broken:
                self._close_long()
        return self.found

    def _now(self) -> float:
        """Return for how many seconds there was load: the clock stands while all rests."""
        return (self._paused_at or time.monotonic()) - self._began

    def _make_file(self) -> None:
        """Have the file made, and a program's own tables beside the store's, with the shell, while nobody has it open."""
        process = self._process(make_file, (str(self._path),))
        process.join(60)
        assert process.exitcode == 0, "the file could not be made"
        with contextlib.closing(sqlite3.connect(self._path, timeout=10)) as db:
            db.execute("CREATE TABLE campaign_effects (task_seq INTEGER, name TEXT)")
            db.execute("CREATE TABLE ballast (bytes BLOB)")
            db.executemany("INSERT INTO ballast VALUES (zeroblob(?))", [(_MIB,)] * self._grown)
            db.commit()

    def _start_long(self) -> None:
        plan = Plan("long", self._chance.randrange(2**31), has_effects=True, options={"max_running": 24})
        leak, every = self._leak
        self._long = self._process(stay, (str(self._path), LongPlan(plan, self._commands, leak, every)))
        self._wait_until(lambda: "long" in self._opened, "the long-lived process has not opened the file")

    def _one_turn(self) -> None:
        """Work for a while, come to rest, measure and judge."""
        self._order("go")
        until = min(self._now() + self._rest_every, self._seconds)
        next_sample = self._now()
        while self._now() < until and not self.found.broken:
            self._listen(0.01)
            self._keep_busy()
            self._kill_due()
            if self._now() >= next_sample:
                next_sample += self._sample_every
                self._measure()
        self._paused_at = time.monotonic()
        if not self.found.broken:
            self._come_to_rest(until)
        self._began += time.monotonic() - self._paused_at
        self._paused_at = None
        if self._tell is not None:
            self._tell(self.found, self._now())

    def _come_to_rest(self, now: float) -> None:
        for who in [*self._shorts]:
            self._end(who, in_order=False)
        self._rested = None
        self._order("rest")
        if not self._wait_until(lambda: self._rested is not None, "the long-lived process has not come to rest"):
            return
        assert self._rested is not None
        rested = self._rested
        for name in ("descriptors", "descriptors of the file", "threads", "tasks", "objects", "children"):
            self.found.add(f"{name} at rest", now, rested[name])
        for name in {"traced", "allocated", "SQLite"} & rested.keys():
            self.found.add(f"{name} at rest", now, rested[name] / _MIB)
        # one whose asker was cancelled was made all the same
        self._remove_backups("long")
        self.found.add("side files at rest", now, len(self._side_files()))
        self.found.add("files at rest", now, sum(1 for _ in self.folder.iterdir()))
        self.found.grown = {
            name: rested[name] for name in ("types", "lines", "held") if name in rested
        } or self.found.grown
        self._judge(now)

    def _close_long(self) -> None:
        self._order("end")
        self._wait_until(lambda: self._long.exitcode is not None, "the long-lived process does not close")
        if self._long.exitcode != 0:
            self._break("died", f"the long-lived process ended with {self._long.exitcode}")
        elif self._side_files() and not self._leak[0]:
            self._break("side files", f"the last to close left {self._side_files()}")

    # --- processes ---

    def _process(self, main: Any, arguments: tuple[Any, ...]) -> Any:
        process = processes._context.Process(target=processes._enter, args=(main, self._theirs, arguments), daemon=True)
        process.start()
        return process

    def _order(self, word: str) -> None:
        os.write(self._my_commands.fileno(), word.encode() + b"\n")

    def _keep_busy(self) -> None:
        """Have two owners and one who only asks beside the long-lived one."""
        roles = Counter(short.plan.role for short in self._shorts.values())
        for role, wanted in (("owner", 2), ("requester", 1)):
            for _ in range(wanted - roles[role]):
                self._start(role)

    def _start(self, role: str) -> None:
        chance = self._chance
        self._number += 1
        who = f"p{self._number}"
        lasts = chance.uniform(*self._life)
        closes: float | None = None
        kill_at: float | None = time.monotonic() + lasts
        match chance.random():
            case share if share < 0.3:
                closes, kill_at = lasts, None
            case share if share < 0.45:
                # while it opens, perhaps
                kill_at = time.monotonic() + chance.uniform(0.0, 0.3)
        plan = Plan(who, chance.randrange(2**31), role, closes=closes, has_effects=True)
        process = self._process(pass_by, (str(self._path), plan))
        self._shorts[who] = _Short(plan, process, time.monotonic(), kill_at)

    def _kill_due(self) -> None:
        now = time.monotonic()
        for who, short in [*self._shorts.items()]:
            if short.process.exitcode is not None or (short.kill_at is not None and now >= short.kill_at):
                self._end(who, in_order=short.process.exitcode is not None)
            elif now > short.born + _OPENS:
                self._break("stuck", f"{who} ({short.plan.as_words()}) has neither opened nor closed in {_OPENS} s")
        if self._long.exitcode is not None:
            self._break("died", f"the long-lived process ended with {self._long.exitcode}")

    def _end(self, who: str, *, in_order: bool) -> None:
        short = self._shorts.pop(who)
        if not in_order:
            self._listen(0.0)
            # said before it is done: whatever follows from its death comes after
            os.write(self._theirs.fileno(), json.dumps(["K", who, "killed"]).encode() + b"\n")
            with contextlib.suppress(ProcessLookupError):
                os.kill(short.process.pid, signal.SIGKILL)
        short.process.join(20)
        self._listen(0.0)
        code = short.process.exitcode
        if code == -signal.SIGKILL:
            name = "an owner was killed" if short.plan.role == "owner" else "a requester was killed"
            self.found.sometimes[name if who in self._opened else "killed while it opened"] += 1
        elif code == 0:
            name = "an owner" if short.plan.role == "owner" else "a requester"
            self.found.sometimes[f"{name} closed in order"] += 1
        else:
            self._break("died", f"{who} ended with {code}")
        self._opened.discard(who)
        short.process.close()
        self.found.sometimes["killed while it made a backup"] += self._remove_backups(who)

    def _remove_backups(self, who: str) -> int:
        """Remove copies that somebody was making, or had just made, and had no time to remove."""
        left = [*self.folder.glob(f"agent.db.backup-{who}-*")]
        for one in left:
            one.unlink()
        return len(left)

    def _end_all(self) -> None:
        for short in self._shorts.values():
            _kill(short.process)
        if self._long is not None:
            _kill(self._long)
        self._listen(0.0)
        for pipe in (self._mine, self._theirs, self._commands, self._my_commands):
            pipe.close()

    def _wait_until(self, is_so: Callable[[], bool], otherwise: str) -> bool:
        deadline = time.monotonic() + _OPENS
        while not is_so():
            self._listen(0.01)
            if self.found.broken:
                return False
            if time.monotonic() > deadline:
                self._break("stuck", f"{otherwise} in {_OPENS} s")
                return False
        self._listen(0.0)
        return True

    # --- what is said ---

    def _listen(self, seconds: float) -> None:
        while select.select([self._mine], [], [], seconds)[0]:
            data = os.read(self._mine.fileno(), 1 << 18)
            if not data:
                return
            self._buffer += data
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                self._out.write(line + b"\n")
                self._hear(json.loads(line))
            seconds = 0.0

    def _hear(self, words: list[Any]) -> None:
        kind, who = words[0], words[1]
        match kind:
            case "S":
                self._asked[who, words[2]] = words[3]
            case "A" | "E":
                op = self._asked.pop((who, words[2]), "?")
                if kind == "A":
                    self.found.acknowledged[op] += 1
                    if op == "check" and words[3].get("errors"):
                        self._break("check", f"{who}: check() finds in a live file: {words[3]['errors']}")
            case "B":
                self.found.bodies += 1
            case "L":
                self.found.add(words[2], self._now(), words[3] * 1000)
            case "M":
                if words[2] == "rest":
                    self._rested = words[3]
                else:
                    self.found.add("tasks", self._now(), words[3]["tasks"])
            case "O":
                self._opened.add(who)
            case "N" if words[2] == "requester":
                self._opened.add(who)
            case "N" if words[2] == "a subscriber left":
                self.found.sometimes["a subscriber left"] += 1
            case "died":
                self._break("died", " ".join(map(str, words[1:])))

    def _break(self, name: str, what: str) -> None:
        self.found.broken.append((name, what))

    # --- measuring from outside ---

    def _measure(self) -> None:
        now, pid = self._now(), self._long.pid
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            self.found.add("descriptors", now, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            return
        told = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        self.found.add("memory", now, int(told["VmRSS"].split()[0]) / 1024)
        self.found.add("threads", now, int(told["Threads"]))
        self.found.add("-wal", now, _size(Path(f"{self._path}-wal")))
        used = in_use(Path(f"{self._path}-shm"))
        if used is not None:
            self.found.add("-wal in use", now, used)
        self.found.add("file", now, _size(self._path))
        self.found.add("side files", now, len(self._side_files()))

    def _side_files(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(one.name for one in Path(f"{self._path}-owners").iterdir())
        return []

    # --- judging ---

    def _judge(self, now: float) -> None:
        """Have a copy of file and ``-wal`` judged while all rests, and begin a log with what the file says."""
        self._out.flush()
        copy = self.folder / "copy.db"
        for suffix in ("", "-wal"):
            source = Path(f"{self._path}{suffix}")
            if source.exists():
                shutil.copyfile(source, f"{copy}{suffix}")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.judge", str(copy), str(self._log)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        answer, error = process.communicate(timeout=300)
        if process.returncode != 0:
            self._break("judge", error[-1500:])
            return
        found = json.loads(answer)
        self.found.judged += 1
        self.found.broken += [(promise, f"at {now:.0f} s: {what}") for promise, what in found["broken"]]
        self.found.sometimes.update({name: count for name, count in found["counts"].items() if count})
        with contextlib.closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True)) as db:
            for name, value in kept(db).items():
                self.found.add(name, now, value)
            if not self.found.broken:
                self._out.seek(0)
                self._out.truncate()
                for entry in _as_log(db):
                    self._out.write(json.dumps(entry).encode() + b"\n")
                self._out.flush()
        if not self.found.broken:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{copy}{suffix}").unlink(missing_ok=True)


def _kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, ValueError):
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)


def _size(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size / _MIB
    return 0.0


def in_use(shm: Path) -> float | None:
    """
    Return how many MiB of a ``-wal`` are written since it last began anew, or nothing if that is just being changed.

    Its size only tells the most that ever was. Read from its index, as sqlite.org/walformat.html lays that out: this process has
    no lock on it to lose.
    """
    try:
        index = shm.read_bytes()[:96]
    except FileNotFoundError:
        return 0.0
    # there are two copies of its header, which differ while it is written
    if len(index) < 96 or index[:48] != index[48:]:
        return None
    [page] = struct.unpack_from("=H", index, 14)
    [frames] = struct.unpack_from("=I", index, 16)
    return float(frames * (page + 24) / _MIB)


def kept(db: sqlite3.Connection) -> dict[str, float]:
    """Return how many rows there are that prune governs, how many that are meant to stay, and the room of all but these."""

    def one(query: str) -> float:
        return float(db.execute(query).fetchone()[0] or 0)

    def room(*tables: str) -> float:
        names = ",".join(f"'{table}'" for table in tables)
        of = "dbstat AS s JOIN sqlite_schema AS x USING (name)"
        return one(f"SELECT sum(s.pgsize) FROM {of} WHERE x.tbl_name IN ({names})")

    governed = ("tasks", "steps", "handles", "signals", "inbox", "updates")
    told = "events WHERE task_seq IS NOT NULL"
    of_sessions = "events WHERE task_seq IS NULL"
    found = {
        "rows": sum(one(f"SELECT count(*) FROM {table}") for table in (*governed, told)),
        "rows that stay": sum(one(f"SELECT count(*) FROM {table}") for table in (*_STAY, of_sessions)),
    }
    with contextlib.suppress(sqlite3.OperationalError):
        # not every build has this table
        in_events = "SELECT sum(60 + length(scope) + length(data)) FROM"
        # by their share of the pages: where others were pruned between them, events of sessions leave pages half empty
        share = one(f"{in_events} {of_sessions}") / max(1.0, one(f"{in_events} events"))
        size = one("SELECT sum(pgsize) FROM dbstat") - room(*_STAY) - room("events") * share
        found["file without what stays"] = size / _MIB
    return found


def _as_log(db: sqlite3.Connection) -> list[list[Any]]:
    """Return what a file says as the beginning of a log: all in it was asked for, and what has ended, or was read, stays so."""
    asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    asked += [("session", {"scope": scope}, {}) for (scope,) in db.execute("SELECT scope FROM sessions")]
    for seq, id, label, state, result, failure, completed_at in db.execute(
        "SELECT task_seq, id, label, state, result, failure, completed_at FROM tasks"
    ):
        said: dict[str, Any] = {"task_seq": seq}
        if completed_at is not None:
            message = None if failure is None else json.loads(failure)["message"]
            value = None if result is None else json.loads(result)
            said |= {"state": state, "digest": outcome(state, value, message, completed_at)}
        asked += [("get", {"id": id}, said), ("get", {"label": label}, {})]
    for key, seq in db.execute("SELECT key, task_seq FROM signals"):
        asked.append(("signal", {"key": key}, {"task_seq": seq}))
    for source, to, id in db.execute("SELECT source, destination, handoff_id FROM handoffs"):
        asked.append(("handoff", {"scope": source, "to": to}, {"handoff_id": id}))
    notes = [seq for (seq,) in db.execute("SELECT note_seq FROM inbox WHERE acknowledged_at IS NOT NULL")]
    asked += [("inbox", {}, {"notes": notes[n : n + 100]}) for n in range(0, len(notes), 100)]
    log: list[list[Any]] = []
    for number, (op, args, said) in enumerate(asked):
        log += [["S", "old", number, op, args], ["A", "old", number, said]]
    return log
