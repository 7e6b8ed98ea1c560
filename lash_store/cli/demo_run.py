"""Owns the demo's run: starts the worker, watches the file beside it, kills it, starts it again, takes the figures."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click

from ..models import EventType, Scope, TaskFilter, TaskRecord, TaskState
from ..store import TaskStore
from .demo_texts import count_words, make_text, make_texts
from .reading import events_so_far

__all__ = ["Figures", "Plan", "Watcher", "conduct"]

_LOOK = 0.05
_STALLED = 30.0
"""Seconds without any change in the file after which the run is given up."""


@dataclass(frozen=True)
class Plan:
    """What a run is to do. *latency* is the seconds a fetch takes."""

    db: Path
    folder: Path
    session: str
    tasks: int
    kills: int
    latency: float = 0.08
    max_running: int = 8
    runtime: str = "demo"

    @property
    def scope(self) -> Scope:
        """The session of this run."""
        return Scope(self.runtime, self.session)

    @property
    def texts(self) -> Path:
        """The folder of the texts."""
        return self.folder / "texts"

    @property
    def effects(self) -> Path:
        """The file to which a worker adds a line for every piece it begins."""
        return self.folder / "effects.log"


@dataclass
class Figures:
    """What a run came to. Spans are seconds, one for each restart; None if nothing had been running."""

    completed: int = 0
    lost: int = 0
    correct: int = 0
    kills: int = 0
    reattached: int = 0
    most_attempts: int = 0
    pieces: int = 0
    pieces_repeated: int = 0
    reattach: list[float | None] = field(default_factory=list)
    process_start: list[float | None] = field(default_factory=list)
    seconds: float = 0.0

    def is_good(self, plan: Plan) -> bool:
        """Say whether every task completed, with the right words counted, and none was lost."""
        return self.lost == 0 and self.completed == self.correct == plan.tasks

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the figures under the names the documentation uses."""
        return {
            "tasks": plan.tasks,
            "completed": self.completed,
            "lost": self.lost,
            "correct": self.correct,
            "kills": self.kills,
            "reattached": self.reattached,
            "most_attempts": self.most_attempts,
            "pieces": self.pieces,
            "pieces_repeated": self.pieces_repeated,
            "reattach_seconds": self.reattach,
            "process_start_seconds": self.process_start,
            "seconds": round(self.seconds, 3),
            "db": str(plan.db),
            "session": str(plan.scope),
        }


class Watcher(Protocol):
    """Who is told of the run as it goes."""

    def started(self, pid: int, *, again: bool) -> None:
        """A worker process was started."""

    def killed(self, pid: int, records: Sequence[TaskRecord]) -> None:
        """It was killed; the rows as they stood."""

    def reattached(self, records: Sequence[TaskRecord], seconds: float | None, process_start: float | None) -> None:
        """Tasks go on in another attempt."""

    def update(self, records: Sequence[TaskRecord]) -> None:
        """The rows as they stand."""

    def stop(self) -> None:
        """The run has ended, well or not."""


def _same_package() -> dict[str, str]:
    """Return an environment in which a process imports this very package, whatever lies in the working folder."""
    here = str(Path(__file__).parents[2])
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": here if not others else f"{here}{os.pathsep}{others}"}


class Worker:
    """One life of the worker process, and what it told."""

    def __init__(
        self, process: asyncio.subprocess.Process, started_at: float, plan: Plan, acknowledged: set[str]
    ) -> None:
        self.process = process
        self.started_at = started_at
        self.imported_at: float | None = None
        self.error: str | None = None
        self.ready = asyncio.Event()
        self._plan = plan
        self._acknowledged = acknowledged
        self.ended = asyncio.create_task(self._listen(), name="demo worker")

    @classmethod
    async def start(cls, plan: Plan, acknowledged: set[str]) -> Worker:
        """Start a process that dies when this one does: it reads a pipe which only we hold."""
        options = ["--latency", str(plan.latency), "--max-running", str(plan.max_running)]
        started_at = time.time()
        with (plan.folder / "worker.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "lash_store.cli.demo_worker"),
                *(str(plan.db), plan.runtime, plan.session, str(plan.texts), str(plan.effects), *options),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=_same_package(),
                # Ctrl-C is for us; the worker ends when we let go of it
                start_new_session=True,
            )
        return cls(process, started_at, plan, acknowledged)

    async def _listen(self) -> int:
        """Take in what it tells, to the last line it wrote before its death."""
        assert self.process.stdout is not None
        try:
            async for line in self.process.stdout:
                if not line.endswith(b"\n"):
                    break
                match json.loads(line):
                    case {"spawned": str(task_id)}:
                        self._acknowledged.add(task_id)
                    case {"imported_at": float(at)}:
                        self.imported_at = at
                    case {"error": str(message)}:
                        self.error = message
                    case {"ready": True}:
                        self.ready.set()
            return await self.process.wait()
        finally:
            self.ready.set()

    async def kill(self) -> None:
        """End it with SIGKILL, and wait until it has ended."""
        if self.process.returncode is None:
            self.process.kill()
        await self.ended

    def check(self) -> None:
        """
        Make sure that a worker nobody killed ended well.

        Raises:
            ClickException: what it said last.
        """
        status = self.ended.result()
        if status == 0:
            return
        said = (self._plan.folder / "worker.log").read_text(errors="replace").strip().splitlines()
        because = self.error or (said[-1] if said else f"exit code {status}")
        hint = "" if self.error else f"; see {self._plan.folder / 'worker.log'}"
        raise click.ClickException(f"{because}{hint}" if self.error else f"the worker ended early: {because}{hint}")


async def conduct(plan: Plan, watcher: Watcher) -> Figures:
    """
    Run the demo and return its figures; no worker is left behind, however this ends.

    Raises:
        ClickException: the file cannot be used, or the worker ended by itself.
    """
    begun = time.monotonic()
    plan.texts.mkdir()
    make_texts(plan.texts, plan.tasks)
    figures = Figures()
    acknowledged: set[str] = set()
    restarts: list[Worker] = []
    try:
        while True:
            worker = await Worker.start(plan, acknowledged)
            watcher.started(worker.process.pid, again=bool(restarts or figures.kills))
            if figures.kills:
                restarts.append(worker)
            try:
                was_killed = await _one_life(plan, watcher, worker, figures)
            finally:
                await asyncio.shield(worker.kill())
            if not was_killed:
                worker.check()
                break
            figures.kills += 1
    finally:
        watcher.stop()
    figures.seconds = time.monotonic() - begun
    await _take(plan, figures, acknowledged, restarts)
    return figures


async def _one_life(plan: Plan, watcher: Watcher, worker: Worker, figures: Figures) -> bool:
    """Watch one worker to its end, or to the moment for the next kill; say whether it was killed."""
    await worker.ready.wait()
    if worker.ended.done() or worker.error is not None:
        await worker.ended
        return False
    async with TaskStore.open_readonly(plan.db) as store:
        reattachment = _Reattachment(watcher, worker)
        stalled = _Stall()
        while True:
            records = await store.list(TaskFilter(scope=plan.scope))
            watcher.update(records)
            if figures.kills:
                reattachment.look(records)
            if figures.kills < plan.kills and _is_moment(plan, worker, records, figures.kills):
                await worker.kill()
                watcher.killed(worker.process.pid, await store.list(TaskFilter(scope=plan.scope)))
                return True
            if worker.ended.done():
                return False
            stalled.check(records)
            await asyncio.wait({worker.ended}, timeout=_LOOK)


def _is_moment(plan: Plan, worker: Worker, records: Sequence[TaskRecord], kills: int) -> bool:
    """Say whether the next kill is due: far enough in the whole, and in the middle of what this worker has begun."""
    done = sum(_done(record) for record in records)
    if done < plan.tasks * (kills + 1) / (plan.kills + 1):
        return False
    return any(
        record.state is TaskState.RUNNING
        and 0.0 < (record.fraction or 0.0) < 1.0
        and record.started_at is not None
        and record.started_at.timestamp() >= worker.started_at
        for record in records
    )


def _done(record: TaskRecord) -> float:
    return 1.0 if record.is_terminal else record.fraction or 0.0


class _Reattachment:
    """Tells once, of each restarted worker, what it took up again and when."""

    def __init__(self, watcher: Watcher, worker: Worker) -> None:
        self._watcher = watcher
        self._worker = worker
        self._is_told = False

    def look(self, records: Sequence[TaskRecord]) -> None:
        if self._is_told:
            return
        since = self._worker.started_at
        taken = [
            record
            for record in records
            if record.attempt > 1 and record.started_at is not None and record.started_at.timestamp() >= since
        ]
        if taken:
            self._is_told = True
            first = min(record.started_at.timestamp() for record in taken if record.started_at is not None)
            imported_at = self._worker.imported_at
            self._watcher.reattached(taken, first - since, None if imported_at is None else imported_at - since)


class _Stall:
    def __init__(self) -> None:
        self._last: object = None
        self._since = time.monotonic()

    def check(self, records: Sequence[TaskRecord]) -> None:
        now = (len(records), max((record.updated_at for record in records), default=None))
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        elif time.monotonic() - self._since > _STALLED:
            raise click.ClickException(f"nothing has changed for {_STALLED:g} s: the run is given up")


async def _take(plan: Plan, figures: Figures, acknowledged: set[str], restarts: Sequence[Worker]) -> None:
    """Ask the file, and the log of what was really done, how it went."""
    async with TaskStore.open_readonly(plan.db) as store:
        records = await store.list(TaskFilter(scope=plan.scope))
        wanted = events_so_far(store, scope=plan.scope, types=[EventType.REATTACHED])
        # a task that had only been waiting for its turn goes on too, but in its first attempt
        moments = [(event.at.timestamp(), event.task_id) async for event in wanted if (event.attempt or 0) > 1]
    completed = {record.id for record in records if record.state is TaskState.COMPLETED}
    figures.completed = len(completed)
    figures.lost = len(acknowledged - completed)
    figures.correct = sum(_is_correct(record) for record in records)
    figures.reattached = len({task_id for _, task_id in moments})
    figures.most_attempts = max((record.attempt for record in records), default=0)
    begun = Counter(line.rsplit(" ", 1)[0] for line in plan.effects.read_text().splitlines())
    begun = Counter({piece: times for piece, times in begun.items() if piece.startswith(f"{plan.scope} ")})
    figures.pieces = len(begun)
    figures.pieces_repeated = begun.total() - len(begun)
    ends = [worker.started_at for worker in restarts[1:]] + [float("inf")]
    for worker, end in zip(restarts, ends, strict=False):
        first = min((at for at, _ in moments if worker.started_at <= at < end), default=None)
        figures.reattach.append(None if first is None else round(first - worker.started_at, 3))
        start = worker.imported_at
        figures.process_start.append(None if start is None else round(start - worker.started_at, 3))


def _is_correct(record: TaskRecord) -> bool:
    """Say whether a task that went through kills counted each word of its text once."""
    counts = count_words(make_text(int(record.id.removeprefix("text-"))))
    return isinstance(record.result, dict) and record.result.get("words") == counts.total()
