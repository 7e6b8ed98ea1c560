"""
Owns one file of the campaign and the processes on it: starts them, stops and kills them, and has the file judged.

It never opens the file itself. What the processes say comes on one pipe, and so does, from here, whom it kills: one order of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.acceptance import processes
from tests.campaign.points import POINTS
from tests.campaign.victim import Plan, live

__all__ = ["Generation", "Verdict"]

_OPENS = 40.0
"""Seconds in which a process must have opened the file, or ended."""

processes._context.set_forkserver_preload(
    [
        "tests.campaign.victim",
        "tests.acceptance.processes",
        "lash_store.store",
        "lash_store.sessions",
        "alembic.command",
        "alembic.script",
    ]
)


@dataclass
class Verdict:
    """What came of a file's life: kills by place, counts of what should sometimes happen, and what is broken."""

    kills: Counter[str] = field(default_factory=Counter)
    sometimes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)
    acknowledged: Counter[str] = field(default_factory=Counter)
    bodies: int = 0
    judged: int = 0
    kept: Path | None = None

    def add(self, other: Verdict) -> None:
        """Take in what came of another file."""
        self.kills += other.kills
        self.sometimes += other.sometimes
        self.counts += other.counts
        self.broken += other.broken
        self.acknowledged += other.acknowledged
        self.bodies += other.bodies
        self.judged += other.judged
        self.kept = self.kept or other.kept


@dataclass
class _Life:
    plan: Plan
    process: Any
    born: float
    opened: float | None = None
    owner: int | None = None
    kill_at: float | None = None
    stop_at: float | None = None
    is_stopped: bool = False
    rescuer: str | None = None
    is_going: bool = False


class Generation:
    """
    One file, from its birth (or from an older revision) until so many *kills*.

    *old* is a file of an older revision to begin with; *fault* is planted in every process, for a control; *zombies* is the share
    of owners that are stopped, and go on once their work was given to another.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: str,
        kills: int,
        old: Path | None = None,
        fault: str | None = None,
        most: int = 4,
        zombies: float = 0.06,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self._chance = random.Random(seed)
        self._wanted = kills
        self._fault = fault
        self._zombies = zombies
        self._options = options or {}
        self._path = folder / "agent.db"
        self._log = folder / "log.jsonl"
        self._old = old
        self._slots = self._chance.randrange(1, most + 1)
        self._lives: dict[str, _Life] = {}
        self._number = 0
        self._said: dict[str, list[Any]] = {}
        self._asked: dict[tuple[str, int], str] = {}
        self._is_old = old is not None
        self._has_effects = False
        self._look: subprocess.Popen[str] | None = None
        self._buffer = b""
        self.verdict = Verdict()
        self._mine, self._theirs = processes._context.Pipe(duplex=False)
        self._out = self._log.open("ab")

    # --- the whole life ---

    def run(self) -> Verdict:
        """Live through it, and return what came of it."""
        if self._old is not None:
            self._begin_old(self._old)
        until = self._next_stop()
        try:
            while sum(self.verdict.kills.values()) < self._wanted and not self.verdict.broken:
                self._keep_busy()
                self._step()
                self._look_at_live_file()
                if sum(self.verdict.kills.values()) >= until:
                    self._all_die()
                    self._judge("raw")
                    if not self.verdict.broken and self._one_opens("recovered"):
                        self._judge("recovered")
                    until = sum(self.verdict.kills.values()) + self._next_stop()
            self._all_die()
            if not self.verdict.broken:
                self._judge("raw")
            if not self.verdict.broken and self._one_opens("recovered"):
                self._judge("recovered")
            if not self.verdict.broken:
                self._recover_and_judge()
        finally:
            for life in self._lives.values():
                _end(life.process)
            if self._look is not None:
                self._look.communicate()
            self._drain()
            self._out.close()
            self._mine.close()
            self._theirs.close()
        if self.verdict.broken:
            self.verdict.kept = self.folder
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.verdict

    def _next_stop(self) -> int:
        return self._chance.randrange(8, 30)

    def _begin_old(self, old: Path) -> None:
        shutil.copyfile(old, self._path)
        with contextlib.closing(sqlite3.connect(f"file:{old}?mode=ro&immutable=1", uri=True)) as db:
            asks: list[tuple[str, dict[str, Any]]] = []
            asks += [("session", {"scope": scope}) for (scope,) in db.execute("SELECT scope FROM sessions")]
            asks += [("spawn", {"id": id, "label": label}) for id, label in db.execute("SELECT id, label FROM tasks")]
            asks += [("spawn", {"id": label}) for (label,) in db.execute("SELECT label FROM tasks")]
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
            if "handoffs" in tables:
                pairs = db.execute("SELECT source, destination FROM handoffs")
                asks += [("handoff", {"scope": source, "to": to}) for source, to in pairs]
            if "signals" in tables:
                asks += [("signal", {"key": key}) for (key,) in db.execute("SELECT key FROM signals")]
        for number, (op, args) in enumerate(asks):
            self._write("S", "old", number, op, args)

    def _keep_busy(self) -> None:
        """Start lives until every slot has one; sometimes one waits for others, sometimes all begin at once."""
        alive = [life for life in self._lives.values() if not life.is_stopped]
        if not alive and self._slots > 1:
            self.verdict.sometimes["several openers found nobody alive"] += 1
        for _ in range(self._slots - len(alive)):
            self._start()
            if self._chance.random() < 0.3:
                break

    def _start(self, **how: Any) -> str:
        chance = self._chance
        self._number += 1
        who = f"p{self._number}"
        role = how.pop("role", "requester" if chance.random() < 0.15 and self._is_there() else "owner")
        plan = Plan(
            who,
            chance.randrange(2**31),
            role,
            has_effects=self._has_effects,
            fault=self._fault,
            options=self._options,
            **({**self._doom(role), **how}),
        )
        process = processes._context.Process(
            target=processes._enter, args=(live, self._theirs, (str(self._path), plan)), daemon=True
        )
        process.start()
        life = _Life(plan, process, time.monotonic())
        dies_at_random = plan.point is None and plan.closes is None and not plan.is_steady and role != "last"
        if dies_at_random and chance.random() < 0.2:
            life.kill_at = life.born + chance.uniform(0.0, 0.08)
        self._lives[who] = life
        return who

    def _is_there(self) -> bool:
        return any(life.opened is not None for life in self._lives.values())

    def _doom(self, role: str) -> dict[str, Any]:
        """Choose how a life ends: at a named point, by a kill from here, or (seldom) in order."""
        chance = self._chance
        if role == "last":
            return {}
        if role == "owner" and not self._is_old and chance.random() < self._zombies:
            return {"is_steady": True}
        if self._is_old and chance.random() < 0.6:
            return {"point": "inside a migration", "passing": chance.randrange(1, POINTS["inside a migration"] + 1)}
        if chance.random() < 0.05:
            return {"closes": chance.uniform(0.05, 0.3)}
        if chance.random() < 0.5:
            point = chance.choice([*POINTS])
            if point == "inside a migration":
                point = "inside recovery"
            # who never closes never comes by that one
            closes = {"closes": chance.uniform(0.05, 0.3)} if point == "inside a close" else {}
            return {"point": point, "passing": chance.randrange(1, POINTS[point] + 1), **closes}
        return {}

    # --- one turn ---

    def _step(self) -> None:
        """Hear what is said for a moment, and do what is due."""
        self._listen(0.005)
        now = time.monotonic()
        for who, life in [*self._lives.items()]:
            if life.process.exitcode is not None:
                self._listen(0.0)
                self._note_end(who, life)
            elif life.kill_at is not None and now >= life.kill_at:
                self._kill(who, life, "at a random moment" if life.opened else "while it opened")
            elif life.stop_at is not None and now >= life.stop_at and not life.is_stopped:
                self._stop(who, life)
            elif life.rescuer is not None:
                self._look_at_rescue(who, life, now)
            elif life.opened is None and now > life.born + _OPENS and not life.is_stopped:
                self._break("stuck", f"{who} has not opened the file in {_OPENS} s: {self._said.get(who)}")
                self._kill(who, life, "stuck")

    def _note_opened(self, life: _Life) -> None:
        chance, now = self._chance, time.monotonic()
        life.opened = now
        if life.plan.role == "last":
            return
        if life.plan.closes is None:
            # who is to die at a point may never come by it
            life.kill_at = now + (chance.uniform(0.0, 0.35) if life.plan.point is None else 0.8)
        else:
            life.kill_at = now + life.plan.closes + 5.0
        if life.plan.is_steady:
            life.stop_at, life.kill_at = now + chance.uniform(0.05, 0.3), None

    def _stop(self, who: str, life: _Life) -> None:
        self._write("P", who)
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.process.pid, signal.SIGSTOP)
        life.is_stopped = True
        life.stop_at = None
        self.verdict.sometimes["an owner was stopped"] += 1
        if life.owner is not None:
            life.rescuer = self._start(
                role="owner", gives_up=life.owner, point=None, passing=0, closes=None, is_steady=False
            )
            life.kill_at = None
            self._lives[life.rescuer].kill_at = None
            life.opened = time.monotonic()

    def _look_at_rescue(self, who: str, life: _Life, now: float) -> None:
        """Let a zombie go on once its work was taken from it; or before, if it stands in the middle of a transaction."""
        assert life.rescuer is not None
        assert life.opened is not None
        is_given_up = ["abandon_owner"] in self._said.get(life.rescuer, [])
        if not is_given_up and life.rescuer in self._lives and now < life.opened + 2.0:
            return
        self._write("C", who)
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.process.pid, signal.SIGCONT)
        woke = (
            "a zombie woke after its work was taken over"
            if is_given_up
            else "an owner went on before anybody took over"
        )
        self.verdict.sometimes[woke] += 1
        life.is_stopped, life.rescuer = False, None
        life.kill_at = now + self._chance.uniform(0.05, 0.4)

    def _kill(self, who: str, life: _Life, where: str) -> None:
        # said before it is done: whatever follows from its death comes after
        self._write("K", who, where)
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.process.pid, signal.SIGKILL)
        life.process.join(20)
        self._listen(0.0)
        self._note_end(who, life)

    def _note_end(self, who: str, life: _Life) -> None:
        code = life.process.exitcode
        if life.rescuer is not None and life.is_stopped:
            self._write("C", who)
        if code == -signal.SIGKILL:
            places = [words[1] for words in self._said.get(who, []) if words[0] == "K"]
            place = places[-1] if places else "unknown"
            self.verdict.kills[place] += 1
            if place == "inside a migration" and self._is_old:
                # another has to upgrade it, and is judged by what comes of that
                self.verdict.sometimes["a killed upgrade left the older file"] += 1
            if life.plan.role == "requester":
                self.verdict.sometimes["a requester was killed"] += 1
        elif code != 0 and life.plan.role != "last":
            self._break("died", f"{who} ended with {code}: {self._said.get(who, [])[-2:]}")
        elif ["N", "closed"] in self._said.get(who, []):
            self.verdict.sometimes["an owner closed in order"] += 1
        del self._lives[who]
        life.process.close()

    def _all_die(self) -> None:
        while self._lives:
            for who, life in [*self._lives.items()]:
                self._kill(who, life, "with all others")
        self._drain()

    # --- what is said ---

    def _write(self, *words: Any) -> None:
        os.write(self._theirs.fileno(), json.dumps(words).encode() + b"\n")

    def _listen(self, seconds: float) -> None:
        while select.select([self._mine], [], [], seconds)[0]:
            data = os.read(self._mine.fileno(), 1 << 16)
            if not data:
                return
            self._buffer += data
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                self._out.write(line + b"\n")
                self._hear(json.loads(line))
            seconds = 0.0

    def _drain(self) -> None:
        self._listen(0.05)
        self._out.flush()

    def _hear(self, words: list[Any]) -> None:
        kind, who = words[0], words[1]
        said = self._said.setdefault(who, [])
        match kind:
            case "A":
                op = self._asked.pop((who, words[2]), "?")
                self.verdict.acknowledged[op] += 1
                if op == "abandon_owner":
                    said.append(["abandon_owner"])
                if op == "check" and words[3].get("errors"):
                    self._break("check", f"{who}: check() finds in a live file: {words[3]['errors']}")
            case "S":
                self._asked[who, words[2]] = words[3]
            case "O":
                life = self._lives.get(who)
                if life is not None:
                    life.owner = words[2]
                    self._note_opened(life)
            case "N":
                said.append(["N", words[2]])
                life = self._lives.get(who)
                if words[2] == "requester" and life is not None:
                    self._note_opened(life)
                elif words[2] == "clock":
                    self.verdict.sometimes["a clock was stepped"] += 1
                elif words[2] == "upgraded":
                    self._is_old = False
                    self.verdict.sometimes["an older file was upgraded"] += 1
            case "K":
                said.append(["K", words[2]])
            case "B":
                self.verdict.bodies += 1
            case "Q":
                said.append(["N", "recovered"])
            case "died":
                # the name is not in it: whose end it is, its exit code tells
                self._break("died", " ".join(map(str, words[1:])))

    def _break(self, name: str, what: str) -> None:
        self.verdict.broken.append((name, what))

    # --- judging ---

    def _judge(self, when: str) -> None:
        """Have a copy of file and ``-wal`` judged, while no process is alive."""
        self._out.flush()
        if not self._path.exists() or self._path.stat().st_size == 0:
            return
        copy = self.folder / "copy.db"
        for suffix in ("", "-wal"):
            source = Path(f"{self._path}{suffix}")
            target = Path(f"{copy}{suffix}")
            target.unlink(missing_ok=True)
            if source.exists():
                shutil.copyfile(source, target)
                if suffix and source.stat().st_size:
                    self.verdict.sometimes["a -wal with commits was left"] += 1
        Path(f"{copy}-shm").unlink(missing_ok=True)
        answer = subprocess.run(
            [sys.executable, "-m", "tests.campaign.judge", str(copy), str(self._log)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if answer.returncode != 0:
            self._break("judge", answer.stderr[-1500:])
            return
        found = json.loads(answer.stdout)
        self.verdict.judged += 1
        for promise, what in found["broken"]:
            self._break(promise, f"{when}: {what}")
        self.verdict.counts = Counter(found["counts"])
        if found["at head"] and not self._has_effects:
            self._make_effects_table()

    def _look_at_live_file(self) -> None:
        """Now and then have the file judged, as it is at one moment, while processes write and die."""
        if self._look is None:
            if self._has_effects and self._chance.random() < 0.002:
                command = [sys.executable, "-m", "tests.campaign.judge", str(self._path)]
                self._look = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        elif self._look.poll() is not None:
            said, wrong = self._look.communicate()
            if self._look.returncode != 0:
                self._break("judge", wrong[-1500:])
            else:
                self.verdict.sometimes["the live file was judged"] += 1
                for promise, what in json.loads(said)["broken"]:
                    self._break(promise, f"live: {what}")
            self._look = None

    def _make_effects_table(self) -> None:
        """Make the table of a program beside the store's, with the shell, while nobody has the file open."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=10)) as db:
            db.execute("CREATE TABLE IF NOT EXISTS campaign_effects (task_seq INTEGER, name TEXT)")
            db.commit()
        self._has_effects = True

    def _recover_and_judge(self) -> None:
        """Let one healthy store end what is live, and another find nothing to do."""
        dumps = []
        for _ in range(2):
            if not self._one_opens("settled"):
                return
            dumps.append(_dump(self._path))
            self._judge("after recovery")
        if dumps[0] != dumps[1]:
            self._break("P11", "a second healthy store changed what the first had left")

    def _one_opens(self, until: str) -> bool:
        """Let one healthy store open the file while nobody else is alive, until it says that it is so far; then it dies, too."""
        who = self._start(role="last")
        deadline = time.monotonic() + 60
        while ["N", until] not in self._said.get(who, []):
            self._listen(0.05)
            if self._lives[who].process.exitcode is not None or time.monotonic() > deadline:
                self._break("last", f"a healthy store does not come to be {until}: {self._said.get(who)}")
                return False
        # said before it is done, as of every kill
        self._write("K", who, "the last")
        os.kill(self._lives[who].process.pid, signal.SIGKILL)
        self._lives[who].process.join(20)
        del self._lives[who]
        self._drain()
        return True


def _dump(path: Path) -> dict[str, list[Any]]:
    """Return what a file says, but for who had it open."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return {
            table: db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in (
                "sessions",
                "tasks",
                "handles",
                "events",
                "steps",
                "signals",
                "inbox",
                "handoffs",
                "tombstones",
            )
        }


def _end(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, ValueError):
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
