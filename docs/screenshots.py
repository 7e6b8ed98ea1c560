"""
Makes the pictures in docs/screenshots: what the commands show of a program that works, and was killed in the middle.

    pip install -e '.[dev]' && python docs/screenshots.py

A program of an agent works in a process of its own, which is killed with SIGKILL once and started again. Each command runs in a
pseudo-terminal; a terminal emulator reads what came out, and `picture` writes that down as SVG. Nothing is drawn by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# run as a script, from a checkout: what follows is imported from that, and so after this
sys.path.insert(0, str(ROOT))

from docs.picture import picture  # noqa: E402
from docs.terminal import Terminal, screen_of  # noqa: E402
from lash_store import Backoff, MonitorSpec, Recovery, TaskContext, TaskExists, TaskKind, TaskStore  # noqa: E402

DB = "agent.db"

# --- the program -----------------------------------------------------------------------------------------------------


async def agent() -> None:
    """Work in one session and that of a sub-agent, until killed; started again, go on."""
    platform.node = lambda: "laptop"  # whose machine it was, a picture need not tell
    store = TaskStore(DB, runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def read(task: TaskContext, pieces: int, quick: int) -> str:
        """Read pieces, *quick* of them quickly, and the rest so slowly that a picture has the time."""
        done: int = task.checkpoint or 0
        while done < pieces:
            await asyncio.sleep(0.02 if done < quick else 60)
            done += 1
            await task.save(done)
            await task.progress(f"{done} of {pieces} files", done / pieces)
        await task.notify(f"read {pieces} files")
        return f"{pieces} files"

    @store.task(recovery=Recovery.RERUN)
    async def lint(task: TaskContext) -> None:
        await task.progress("ruff check src")
        raise RuntimeError("ruff: 3 errors in src/lexer.py")

    @store.task(recovery=Recovery.RERUN, retry_on=[ConnectionError], backoff=Backoff(initial=600, jitter=0))
    async def summarise(task: TaskContext) -> None:
        raise ConnectionError("the model is overloaded")

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def upload(task: TaskContext) -> None:
        await task.progress("sent 3 of 8 MB", 3 / 8)
        await task.cancelled()

    @store.task(recovery=Recovery.RERUN)
    async def transcribe(task: TaskContext) -> None:
        await task.progress("minute 2")
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def approve(task: TaskContext) -> str:
        async with task.waiting("a person's approval"):
            said = await task.signal("approved")
        await task.step("merge", asyncio.sleep, 0)
        return str(said)

    async def plan() -> list[str]:
        return ["rfc-9110", "changelog", "sources"]

    @store.task(recovery=Recovery.RERUN)
    async def research(task: TaskContext) -> None:
        await task.step("plan", plan)
        sub = await store.session("research")
        await sub.spawn(read, 12, 12, id="rfc-9110", idempotency_key="rfc-9110")
        await sub.spawn(read, 20, 14, id="changelog", idempotency_key="changelog")
        await sub.spawn(summarise, id="summary", idempotency_key="summary")
        await task.spawn(read, 30, 9, id="sources", kind=TaskKind.OBSERVER)
        await task.progress("1 of 3 sources", 1 / 3)
        await task.cancelled()

    async with store:
        session = await store.session("review")
        await store.session("research")
        with suppress(TaskExists):
            await session.spawn(read, 14, 14, id="fetch-pr", idempotency_key="fetch-pr")
            await session.spawn(read, 50, 31, id="index", kind=TaskKind.OBSERVER, idempotency_key="index")
            await session.spawn(lint, id="lint", idempotency_key="lint")
            await session.spawn(upload, id="upload", idempotency_key="upload")
            await session.spawn(
                research, id="research", kind=TaskKind.SUBAGENT, child_session_id="research", idempotency_key="research"
            )
            await session.spawn(approve, id="approve", idempotency_key="approve")
            recording = await session.spawn(
                transcribe, id="transcribe", cancel_policy="abort_local", idempotency_key="transcribe"
            )
            await recording.cancel("wrong recording")
        watching = "for n in 1 2 3; do echo tests/test_lexer.py: part $n ok; done; exec sleep 600"
        with suppress(TaskExists):
            await session.start_monitor(
                MonitorSpec(id="tests", command=watching, shell=True, restart_on_restore=True, timeout=3600)
            )
        await session.register("ci-17", TaskKind.OTHER, idempotency_key="ci-17")
        await session.update("ci-17", progress="building, 3 of 4 jobs", fraction=0.75)
        await asyncio.Event().wait()


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--work"], cwd=folder, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def end(program: subprocess.Popen[bytes]) -> None:
    """Kill the program, if it lives."""
    program.kill()
    program.wait()


def end_monitor(folder: Path) -> None:
    """End the monitor's process, which the next owner would have ended, had there been one."""
    with closing(sqlite3.connect(f"file:{folder / DB}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT json_extract(process, '$.group') FROM tasks WHERE process IS NOT NULL")
        for (group,) in found.fetchall():
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def wait_until(folder: Path, question: str, count: int) -> None:
    """Wait until the file answers a question with a number."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{folder / DB}?mode=ro", uri=True)) as connection:
            if connection.execute(f"SELECT count(*) FROM {question}").fetchone()[0] >= count:
                return
        time.sleep(0.05)
    raise SystemExit(f"the program does not come to: {count} {question}")


# --- the pictures ----------------------------------------------------------------------------------------------------


class Studio:
    """Runs commands in a folder, and writes down how they look."""

    def __init__(self, folder: Path, target: Path) -> None:
        self._folder = folder
        self._target = target

    def terminal(self, arguments: str, columns: int, lines: int) -> Terminal:
        command = [sys.executable, "-m", "lash_store.cli", *shlex.split(arguments)]
        return Terminal(command, columns=columns, lines=lines, cwd=self._folder, env=environment())

    def take(self, name: str, arguments: str, *, columns: int = 110) -> None:
        """Take a picture of all that a command prints."""
        with self.terminal(arguments, columns, 80) as terminal:
            terminal.wait()
            # a file is named from the folder a reader would be in
            output = terminal.output.replace(f"{self._folder}/".encode(), b"")
        self.write(name, arguments, screen_of(output, columns, 80), is_whole=False)

    def write(self, name: str, arguments: str, screen: object, *, is_whole: bool) -> None:
        made = picture(screen, f"lash-store {arguments}", is_whole=is_whole)
        for machine in (str(self._folder), str(ROOT), str(Path.home()), os.uname().nodename):
            if len(machine) > 3 and machine in made:
                raise SystemExit(f"{name}: the picture says {machine}")
        (self._target / f"{name}.svg").write_text(made, encoding="utf-8")


def take_all(folder: Path, target: Path) -> None:
    """Let the program work, kill it, start it again, and take every picture."""
    studio = Studio(folder, target)
    first = start(folder)
    wait_until(folder, "tasks WHERE id = 'index' AND fraction >= 0.4", 1)
    wait_until(folder, "tasks WHERE state IN ('completed', 'failed', 'cancelled', 'waiting')", 4)
    wait_until(
        folder, "tasks WHERE id IN ('ci-17', 'monitor:tests', 'changelog', 'upload') AND progress IS NOT NULL", 3
    )
    end(first)
    second = start(folder)
    try:
        wait_until(folder, "events WHERE type = 'reattached' AND task_id IN ('index', 'research', 'ci-17')", 3)
        wait_until(folder, "tasks WHERE id IN ('index', 'research', 'sources', 'changelog') AND attempt = 2", 4)
        wait_until(folder, "tasks WHERE id = 'index' AND fraction >= 0.62", 1)
        wait_until(folder, "tasks WHERE id = 'sources' AND fraction >= 0.3", 1)
        wait_until(folder, "inbox WHERE task_id = 'monitor:tests'", 1)
        studio.take("list", f"list --db {DB} --all")
        studio.take("tree", f"tree --db {DB}")
        studio.take("show", f"show --db {DB} research")
        take_timeline(folder, target)
        watch(studio)
        end(second)
        studio.take("doctor", f"doctor --db {DB}")
    finally:
        end(second)
        end_monitor(folder)


def watch(studio: Studio) -> None:
    """Take a picture of what is live, in the moment after something has ended."""
    arguments = f"top --db {DB}"
    with studio.terminal(arguments, 110, 24) as terminal:
        terminal.wait_for("q quit")
        terminal.press("jjj")
        with studio.terminal(f"signal --db {DB} approve approved --data true", 110, 24) as other:
            assert other.wait() == 0, other.text
        terminal.wait_for(lambda text: any("approve" in line and "completed" in line for line in text.splitlines()))
        terminal.rest()
        studio.write("top", arguments, terminal.screen, is_whole=True)
        terminal.press("q")
        terminal.wait()


def take_timeline(folder: Path, target: Path) -> None:
    """Have the command that draws its own picture draw it."""
    made = target.resolve() / "timeline.svg"
    command = [
        sys.executable,
        "-m",
        "lash_store.cli",
        "timeline",
        "desktop:review",
        "--db",
        DB,
        "--force",
        "-o",
        str(made),
    ]
    subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Work, or take the pictures."""
    parser = argparse.ArgumentParser(description="Make the pictures in docs/screenshots.")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, default=ROOT / "docs" / "screenshots", help="the folder they go to")
    chosen = parser.parse_args()
    if chosen.work:
        asyncio.run(agent())
        return
    chosen.target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        take_all(Path(folder).resolve(), chosen.target)


if __name__ == "__main__":
    main()
