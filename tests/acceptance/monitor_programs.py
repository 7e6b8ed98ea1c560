"""What worker processes of the monitor tests run: owners of monitors that die at named places, and what they supervise."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lash_store import (
    MonitorSpec,
    StoreError,
    TaskStore,
    launching,
    leftovers,
    monitoring,
    outcomes,
    processes,
    recovery,
    runner,
    supervising,
)
from tests.acceptance.processes import Report

RUNTIME = "desktop"
MARK = "LASH_TEST_MARK"
"""The variable by which all that the monitors of a test start is known."""

OWNER = "LASH_TEST_OWNER"
"""The variable by which what has not become a monitor's program yet is known: it has the environment of its owner."""

# --- what is supervised ---------------------------------------------------------------------------------------------

_BEGIN = """
{ignore}
echo $$ >> "$1"
exec 9>"$1.lock"
flock -n 9 || echo $$ >> "$1.overlap"
"""

_BODIES = {
    # it does not mind that nobody reads what it writes
    "lines": 'n=0; while :; do n=$((n+1)); echo "$$ $n" 2> /dev/null || :; sleep 0.03; done',
    "short": 'echo "$$ 1"; echo "$$ 2"; exit 0',
    "fails": 'echo "$$ 1"; exit 3',
    "tree": '(echo member; while :; do sleep 1000; done) & echo "$! member" >> "$1.members"; wait',
    "stranger": """
        env -i /bin/sh -c 'echo $$ member >> "$1.members"; while :; do sleep 1000; done' "$0" "$1" &
        while :; do sleep 1000; done
    """,
}


def spec(path: str, monitor_id: str, does: str = "lines", *, stubborn: bool = False, **columns: Any) -> MonitorSpec:
    """
    Say what to supervise: it appends its pid to *path*, notes if another runs beside it, and writes numbered lines.

    A *stubborn* one, and all it starts, does not mind SIGTERM.
    """
    script = _BEGIN.format(ignore="trap '' TERM PIPE" if stubborn else "trap '' PIPE") + _BODIES[does]
    mark = columns.pop("mark", path)
    columns = {"wake_policy": "notify", **columns}
    return MonitorSpec(id=monitor_id, command=["/bin/sh", "-c", script, mark, path], env={MARK: mark}, **columns)


class Process(NamedTuple):
    """One process of the test that lives: its number, its group, and whose it says it is."""

    pid: int
    group: int
    token: str


def living(mark: str, variable: str = MARK) -> list[Process]:
    """Return the processes that live and carry a mark, in their environment or as a whole argument."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] in {"Z", "X"}:
            continue
        if f"{variable}={mark}".encode() in environment or (variable == MARK and mark.encode() in arguments):
            name = f"{processes.TOKEN}=".encode()
            tokens = [value[len(name) :].decode() for value in environment if value.startswith(name)]
            found.append(Process(int(folder.name), int(fields[2]), "".join(tokens)))
    return found


def clean_up(mark: str) -> None:
    """Kill whatever carries a mark, and its group."""
    for _ in range(100):
        left = [*living(mark), *living(mark, OWNER)]
        if not left:
            return
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                if process.group not in {os.getpgrp(), 0, 1}:
                    os.killpg(process.group, signal.SIGKILL)
                os.kill(process.pid, signal.SIGKILL)


# --- owners that die at a place -------------------------------------------------------------------------------------


def die() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


class Fate:
    """
    Where an owner is to die, and where before that the cancel of its monitor is requested.

    The places are passed in the loop, on the writer's thread within a transaction, and on threads of the supervisor.
    """

    def __init__(self, report: Report, dies_at: str, cancels_at: str | None = None) -> None:
        self._report = report
        self._dies_at = dies_at
        self._cancels_at = cancels_at
        self._loop = asyncio.get_running_loop()
        self.cancel: Callable[[], Any] | None = None

    def passes(self, place: str) -> None:
        """Pass a place on a thread that may wait for the loop, or on none that need ask for the cancel."""
        if self._cancels_at == place:
            self._cancels_at = None
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(20)
        self.may_die(place)

    async def reaches(self, place: str) -> None:
        """Pass a place in the loop, and be cancelled there at most once it has been passed."""
        cancelled: asyncio.CancelledError | None = None
        if self._cancels_at == place:
            self._cancels_at = None
            asking = asyncio.create_task(self._cancel())
            while not asking.done():
                try:
                    await asyncio.wait({asking})
                except asyncio.CancelledError as error:
                    cancelled = error
            asking.result()
        self.may_die(place)
        if cancelled is not None:
            raise cancelled

    def cancels_unnoticed(self, path: str) -> None:
        """Pass a place in the loop at which another store requests the cancel, of which this one hears later."""

        async def from_outside() -> None:
            async with TaskStore.connect(path, runtime=RUNTIME) as store:
                await (await store.session("s1")).cancel("monitor:m", "unnoticed", timeout=0)

        if self._cancels_at == "unnoticed":
            self._cancels_at = None
            outside = threading.Thread(target=lambda: asyncio.run(from_outside()))
            outside.start()
            outside.join()

    def may_die(self, place: str) -> None:
        """Die, if it is here, and what was to be requested before was."""
        if self._dies_at == place and self._cancels_at is None:
            self._report("dies", place)
            die()

    async def _cancel(self) -> None:
        assert self.cancel is not None
        await self.cancel()

    def watch(self) -> None:
        """Pass the places of a monitor's life in this process, and of a recovery."""
        self._watch_start()
        self._watch_output()
        self._watch_end()
        self._watch_recovery()

    def _watch_start(self) -> None:
        launch, write = launching.launch, launching.Launched._write
        open_gate = launching.Launched.open_gate
        unit, record = monitoring.record_process, supervising.Supervisor._record

        def launching_(*arguments: Any) -> Any:
            self.passes("launching")
            launched = launch(*arguments)
            self.passes("launched")
            return launched

        def recording(*arguments: Any) -> Any:
            found = unit(*arguments)
            self.may_die("recording")
            return found

        async def recorded(supervisor: Any, *arguments: Any) -> None:
            self.cancels_unnoticed(str(supervisor._core.path))
            await record(supervisor, *arguments)
            await self.reaches("recorded")

        def writing(launched: Any, data: bytes, *arguments: Any) -> None:
            if self._dies_at == "half told":
                os.write(launched._gate, data[: len(data) // 2])
                self.passes("half told")
            write(launched, data, *arguments)
            self.passes("told")

        def opening(launched: Any, *arguments: Any) -> None:
            open_gate(launched, *arguments)
            self.passes("opened")

        launching.launch = launching_
        monitoring.record_process = recording
        supervising.Supervisor._record = recorded  # type: ignore[method-assign]
        launching.Launched._write = writing  # type: ignore[method-assign]
        launching.Launched.open_gate = opening  # type: ignore[method-assign]

    def _watch_output(self) -> None:
        store, commit = monitoring.store_lines, supervising.Supervisor._commit

        def storing(tx: Any, task: Any, fence: Any, spec: Any, batch: Any, *rest: Any) -> Any:
            found = store(tx, task, fence, spec, batch, *rest)
            if batch.lines:
                self.may_die("storing")
            return found

        async def stored(supervisor: Any, *rest: Any) -> None:
            batch = supervisor._unstored
            await commit(supervisor, *rest)
            if batch is not None and batch.lines:
                await self.reaches("stored")

        monitoring.store_lines = storing
        supervising.Supervisor._commit = stored  # type: ignore[method-assign]

    def _watch_end(self) -> None:
        finish, send, end_group = supervising.Supervisor._finish, processes._signal, processes.end_group
        end, committed = outcomes.end, runner.Runner._stored

        async def finishing(*arguments: Any, **named: Any) -> Any:
            await self.reaches("exited")
            return await finish(*arguments, **named)

        def sending(process: Any, members: Any, what: signal.Signals) -> bool:
            allowed = send(process, members, what)
            if what != signal.SIGCONT:
                self.passes(f"{what.name} sent")
            return allowed

        def ending_group(*arguments: Any, **named: Any) -> Any:
            fate = end_group(*arguments, **named)
            self.passes("gone")
            return fate

        def ending(*arguments: Any) -> Any:
            found = end(*arguments)
            self.may_die("ending")
            return found

        def ended(*arguments: Any) -> None:
            self.may_die("ended")
            committed(*arguments)

        supervising.Supervisor._finish = finishing  # type: ignore[method-assign]
        processes._signal = sending
        processes.end_group = ending_group
        outcomes.end = ending
        runner.Runner._stored = ended  # type: ignore[method-assign]

    def _watch_recovery(self) -> None:
        end, in_one, recover = leftovers.end, recovery.Recoverer._in_one, recovery.Recoverer._recover

        async def ending(*arguments: Any) -> Any:
            self.may_die("left-over found")
            fates = await end(*arguments)
            self.may_die("left-over ended")
            return fates

        def recovering(recoverer: Any, tx: Any, dead: Any, slots: int, fates: Any) -> Any:
            found = recover(recoverer, tx, dead, slots, fates)
            if dead:
                self.may_die("noting the dead")
            elif fates:
                self.may_die("taking over")
            return found

        async def recovered(recoverer: Any, dead: Any, fates: Any) -> Any:
            found = await in_one(recoverer, dead, fates)
            if dead:
                self.may_die("dead noted")
            elif fates:
                self.may_die("taken over")
            return found

        leftovers.end = ending
        recovery.Recoverer._recover = recovering  # type: ignore[method-assign]
        recovery.Recoverer._in_one = recovered  # type: ignore[method-assign]


async def keep(report: Report, path: str, what: dict[str, Any], fate: dict[str, Any], options: dict[str, Any]) -> None:
    """Start a monitor, and die where it is said, or stay until killed."""
    pids = f"{path}.pids"
    os.environ[OWNER] = what.get("mark", pids)
    ends = Fate(report, fate.get("dies_at", "nowhere"), fate.get("cancels_at"))
    ends.watch()
    store = TaskStore(path, runtime=RUNTIME, **options)
    async with store:
        session = await store.session("s1")

        async def cancel() -> None:
            await session.cancel("monitor:m", "asked before the end", timeout=0)

        ends.cancel = cancel
        handle = await session.start_monitor(spec(pids, "m", **what))
        report("started", handle.task_seq)
        while not (await session.updates()):
            if (await handle.record()).is_terminal:
                break
            await asyncio.sleep(0.005)
        report("writes")
        await ends.reaches("running")
        report("stays")
        await asyncio.Event().wait()


async def reopen(report: Report, path: str, fate: dict[str, Any], options: dict[str, Any]) -> None:
    """Open a store, once it may, and die where it is said, or stay until killed."""
    os.environ[OWNER] = f"{path}.pids"
    Fate(report, fate.get("dies_at", "nowhere")).watch()
    store = TaskStore(path, runtime=RUNTIME, **options)
    report("ready")
    while fate.get("waits_for") is not None and not Path(fate["waits_for"]).exists():
        await asyncio.sleep(0.001)
    async with store:
        report("open", [[task.id, str(task.state), task.attempt] for task in await store.list()])
        await asyncio.Event().wait()


async def ask(report: Report, path: str, fate: dict[str, Any], options: dict[str, Any]) -> None:
    """Cancel the monitor as somebody who owns nothing would, and die where it is said."""
    Fate(report, fate.get("dies_at", "nowhere")).watch()
    store = TaskStore.connect(path, runtime=RUNTIME)
    store._cancel_grace = options.get("cancel_grace", 5.0)
    async with store:
        session = await store.session("s1")
        record = await session.cancel("monitor:m", "from outside", timeout=20)
        report("cancelled", str(record.state), len(living(f"{path}.pids")))


async def give_up(report: Report, path: str, fate: dict[str, Any], options: dict[str, Any]) -> None:
    """Give up the monitor of an owner that is stuck, as a person would, and die where it is said."""
    Fate(report, fate.get("dies_at", "nowhere")).watch()
    store = TaskStore.connect(path, runtime=RUNTIME)
    store._cancel_grace = options.get("cancel_grace", 5.0)
    async with store:
        record = await (await store.session("s1")).abandon("monitor:m", "stuck")
        report("given up", str(record.state), len(living(f"{path}.pids")))


async def fork_and_die(report: Report, path: str, until: str) -> None:
    """Start a monitor, and die before it is recorded, but leave a forked child that lives until a file is there."""
    pids = f"{path}.pids"
    os.environ[OWNER] = pids
    launch = launching.launch

    def launching_(*arguments: Any) -> Any:
        launch(*arguments)
        if os.fork() == 0:
            while not Path(until).exists():
                time.sleep(0.01)
            os._exit(0)
        report("dies")
        die()

    launching.launch = launching_
    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        await session.start_monitor(spec(pids, "m"))
        await asyncio.Event().wait()


# --- an owner at random ---------------------------------------------------------------------------------------------


async def life(report: Report, path: str, folder: str, seed: int, number: int) -> None:
    """Start, stop, hand over and read monitors at random, saying what was acknowledged, for as long as it may."""
    chance = random.Random(seed * 1_000 + number)
    report("born", number)
    store = TaskStore(path, runtime=RUNTIME, cancel_grace=0.2, durability="normal")
    async with store:
        sessions = [await store.session(f"s{index}") for index in (1, 2, 3)]
        report("open")
        go = Path(folder, f"go{number}")
        while not go.exists():
            await asyncio.sleep(0.002)
        for count in range(sys.maxsize):
            for act in _turn(chance, folder, f"{number}-{count}", sessions):
                try:
                    await act(report)
                except StoreError as error:
                    # a lost race between two of our own: it must not be more
                    report("refused", type(error).__name__)
            await asyncio.sleep(chance.uniform(0.0, 0.03))


def _turn(chance: random.Random, folder: str, name: str, sessions: list[Any]) -> Iterator[Callable[[Report], Any]]:
    session = chance.choice(sessions)

    async def begin(report: Report) -> None:
        live = [one for each in sessions for one in await each.monitors() if not one.task.is_terminal]
        if len(live) >= 6:
            return
        does = chance.choice(["lines", "lines", "lines", "short", "fails"])
        pids = str(Path(folder, f"{name}.pids"))
        handle = await session.start_monitor(
            spec(
                pids,
                name,
                does,
                stubborn=chance.random() < 0.3,
                mark=folder,
                restart_on_restore=chance.random() < 0.5,
                wake_policy=chance.choice(["notify", "queue_turn"]),
                keep_lines=chance.choice([20, 1000]),
            )
        )
        report("begun", handle.task_seq, name)

    async def stop(report: Report) -> None:
        live = [one for one in await session.monitors() if not one.task.is_terminal]
        if live:
            chosen = chance.choice(live)
            record = await session.stop_monitor(chosen.id, "no")
            report("stopped", record.task_seq, str(record.state))

    async def hand_over(report: Report) -> None:
        to = chance.choice([one for one in sessions if one is not session])
        live = [one for one in await session.monitors() if not one.task.is_terminal]
        keep = [one.task.id for one in live if chance.random() < 0.8]
        handoff = await session.handoff(str(to.scope.session_id), keep, id=name)
        report("handed over", [record.task_seq for record in handoff.moved])

    async def read(report: Report) -> None:
        async with session.take_updates(100) as updates:
            taken = [update.update_seq for update in updates]
            report("given", taken)
            if chance.random() < 0.2:
                await asyncio.sleep(0.02)
        report("acknowledged", taken)

    roll = chance.random()
    yield begin if roll < 0.35 else stop if roll < 0.5 else hand_over if roll < 0.65 else read


def told(path: str | Path) -> list[dict[str, Any]]:
    """Return every process that some event recorded, with the task and the attempt it ran for."""
    from tests.runtime.support import rows

    found = []
    for row in rows(Path(path), "SELECT task_seq, attempt, data FROM events WHERE task_seq IS NOT NULL ORDER BY seq"):
        process = json.loads(row["data"]).get("process")
        if process is not None:
            found.append({**process, "task_seq": row["task_seq"], "attempt": row["attempt"]})
    return found
