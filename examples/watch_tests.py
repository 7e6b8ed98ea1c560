"""
An agent session that watches a real test run, is woken by the first failure, and stops the run.

    python examples/watch_tests.py              # needs pytest: pip install pytest

The sample project is four small tests in a folder (--dir, else a temporary one); the second fails, the last would take a minute.
The agent does not poll. Its session sleeps until a note comes in, takes what the monitor wrote, and decides.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

from lash_store import EventType, MonitorSpec, MonitorUpdate, SessionTasks, TaskStore, WakePolicy

TESTS = """
import time


def test_that_two_and_two_are_four():
    time.sleep(0.2)
    assert 2 + 2 == 4


def test_that_the_answer_is_known():
    time.sleep(0.2)
    assert 6 * 9 == 42, "somebody counted in base thirteen"


def test_that_text_is_text():
    time.sleep(0.2)
    assert "flash".upper() == "FLASH"


def test_that_takes_its_time():
    time.sleep(60)
"""


class Agent:
    """What is done when the session is woken: a model would stand here."""

    def __init__(self, session: SessionTasks, began: float) -> None:
        self._session = session
        self._began = began
        self.turns = 0

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.1f} s  {text}", flush=True)

    async def turn(self) -> bool:
        """Read the notes and what was written, and say whether there is anything left to wait for."""
        async with self._session.inbox() as notes:
            if not notes:
                return True
            self.turns += 1
            for note in notes:
                self.say(f"woken: {note.text}")
            async with self._session.take_updates() as updates:
                return await self._decide(updates)

    async def _decide(self, updates: list[MonitorUpdate]) -> bool:
        for update in updates:
            if "::" in update.text:
                self.say(f"       {update.text}")
        failed = next((update.text for update in updates if "FAILED" in update.text), None)
        if failed is not None:
            stopped = await self._session.stop_monitor("tests", f"seen: {failed.split()[0]}")
            self.say(f"stopped: {stopped.id} is {stopped.state}, reason {stopped.cancel_reason!r}")
            return False
        return not all(monitor.task.is_terminal for monitor in await self._session.monitors())


async def main(folder: Path) -> int:
    project = folder / "project"
    project.mkdir(exist_ok=True)
    (project / "test_sample.py").write_text(TESTS)
    began = time.monotonic()
    async with TaskStore(folder / "agent.db", runtime="watcher", cancel_grace=2.0) as store:
        session = await store.session("coding")
        agent = Agent(session, began)
        wakes = store.events(types=[EventType.NOTED], scope=session)
        spec = MonitorSpec(
            id="tests",
            command=[
                sys.executable,
                "-m",
                "pytest",
                "-v",
                "-p",
                "no:cacheprovider",
                "--rootdir",
                ".",
                "-c",
                "/dev/null",
                ".",
            ],
            cwd=project,
            env={"PYTHONUNBUFFERED": "1"},
            wake_policy=WakePolicy.QUEUE_TURN,
        )
        await session.start_monitor(spec)
        agent.say(f"watching: {' '.join(spec.arguments[1:4])} in {project.name}/")
        async with asyncio.timeout(60):
            while await agent.turn():
                # asleep until a note comes in
                await anext(wakes)
        [monitor] = await session.monitors()
        agent.say(
            f"{monitor.lines} lines seen in {agent.turns} turns, the process is gone: {monitor.task.process is None}"
        )
        return 0 if monitor.state == "cancelled" else 1


if __name__ == "__main__":
    if importlib.util.find_spec("pytest") is None:
        sys.exit("this example watches pytest: pip install pytest")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, help="where the project and agent.db stand; a temporary folder, if not given"
    )
    given = parser.parse_args().dir
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        sys.exit(asyncio.run(main(given)))
    with tempfile.TemporaryDirectory(prefix="watch-tests-") as made:
        sys.exit(asyncio.run(main(Path(made))))
