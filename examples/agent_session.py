"""
An agent session whose work outlives it: hidden, external, sub-agent and tool work, handed to a successor session.

    python examples/agent_session.py                    # the whole story, a step every half second
    kill -9 …                                           # between any two steps (or --die-after N)
    python examples/agent_session.py                    # goes on where it was, and nothing is done twice

The folder (--dir, ./agent-session by default) holds the store, agent.db, and what the "CI service" writes; delete it to begin
again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lash_store import (
    HandleNotVisible,
    Recovery,
    SessionTasks,
    TaskContext,
    TaskFilter,
    TaskKind,
    TaskState,
    TaskStore,
)

KEPT = ["index", "research", "ci-17"]
"""What the planning session hands to the building one."""

QUESTIONS = ["which tests are slow?", "who calls parse()?", "is the cache safe?"]


class Story:
    """Tells the steps, one at a time; the reader may kill it between any two."""

    def __init__(self, pace: float, die_after: int | None) -> None:
        self.pace, self.die_after, self.step = pace, die_after, 0

    async def tell(self, what: str) -> None:
        self.step += 1
        print(f"{self.step:2}. {what}", flush=True)
        if self.step == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(self.pace)


# --- the CI service: somebody else's process, which a kill of ours does not touch ------------------------------------


def start_ci(folder: Path) -> None:
    """Ask for a run of the "CI service", once."""
    try:
        (folder / "ci-17.started").touch(exist_ok=False)
    except FileExistsError:
        return
    service = (
        "import json, sys, time; time.sleep(1); "
        "open(sys.argv[1] + '.part', 'w').write(json.dumps({'tests': 120, 'failed': 0})); "
        "import os; os.rename(sys.argv[1] + '.part', sys.argv[1])"
    )
    subprocess.Popen([sys.executable, "-c", service, str(folder / "ci-17.json")], start_new_session=True)


async def ci_report(folder: Path) -> Any:
    """Wait for what the service says."""
    while not (folder / "ci-17.json").exists():
        await asyncio.sleep(0.1)
    return json.loads((folder / "ci-17.json").read_text())


# --- the agent ------------------------------------------------------------------------------------------------------


class Agent:
    """The program: its store, and the functions that may run in it; what a crash may do with each stands beside it."""

    def __init__(self, folder: Path, story: Story) -> None:
        self.folder, self.story = folder, story
        self.store = TaskStore(folder / "agent.db", runtime="example", cancel_grace=1.0)
        for body in (self.load_memory, self.index, self.look_up, self.research, self.watch_typing):
            self.store.task(recovery=Recovery.RERUN)(body)

    async def load_memory(self, task: TaskContext) -> int:
        """Hidden: the session must not persist itself before this is through."""
        await asyncio.sleep(0.1)
        return 42

    async def index(self, task: TaskContext, files: int) -> int:
        """A tool call that outlives its turn, and its process: it goes on after the last file it saved."""
        done: Any = task.checkpoint or 0
        while done < files:
            await asyncio.sleep(0.05)
            done += 1
            await task.save(done)
            await task.progress(f"indexed file {done}", done / files)
        return int(done)

    async def look_up(self, task: TaskContext, question: str) -> str:
        await asyncio.sleep(0.3)
        return f"{question} yes"

    async def research(self, task: TaskContext, questions: list[str]) -> list[Any]:
        """A sub-agent with a session of its own; under its key a look-up is made once, however often this body starts."""
        own = await self.store.session("research")
        calls = [await own.spawn(self.look_up, question, idempotency_key=question) for question in questions]
        answers = [await call for call in calls]
        await task.notify(f"{len(answers)} questions answered", {"answers": answers}, key="answers")
        return answers

    async def watch_typing(self, task: TaskContext) -> None:
        """An observer that only the planning session wants: the handoff lets it go."""
        await asyncio.Event().wait()

    # --- two sessions ---

    async def plan(self) -> None:
        """The first session starts what is not there yet: under its key a piece of work is made once."""
        session = await self.store.session("plan")
        await session.spawn_hidden("memory", self.load_memory)
        await self.story.tell("plan: memory is loading (hidden, in every life)")
        reload = await session.await_background_work()
        await self.story.tell(
            f"plan: hidden work has settled; the session takes its state up: {'yes' if reload else 'no'}"
        )

        await session.spawn(
            self.watch_typing,
            id="typing",
            kind=TaskKind.OBSERVER,
            cancel_policy="abort_local",
            idempotency_key="typing",
        )
        await self.story.tell("plan: an observer watches the user type")
        await session.spawn(self.index, 25, id="index", idempotency_key="index", notify_on_end=True)
        await self.story.tell("plan: a tool indexes 25 files")
        await self.store.session("research", parent="plan")
        await session.spawn(
            self.research,
            QUESTIONS,
            id="research",
            kind=TaskKind.SUBAGENT,
            child_session_id="research",
            idempotency_key="research",
        )
        await self.story.tell("plan: a sub-agent looks into three questions, in a session of its own")
        await self.register_ci(session)
        await self.story.tell("plan: the CI service runs the tests (external)")

    async def hand_over(self) -> None:
        """Hand the work to the session that builds: done in an earlier life, it is only told again."""
        session, successor = await self.store.session("plan"), await self.store.session("build")
        try:
            handoff = await session.handoff(successor, KEPT, id="plan-to-build")
        except HandleNotVisible:
            # not all of it is there yet
            await self.plan()
            handoff = await session.handoff(successor, KEPT, id="plan-to-build")
        moved, cancelled = (", ".join(task.id for task in tasks) for tasks in (handoff.moved, handoff.cancelled))
        await self.story.tell(f"plan → build: handed over {moved}; let go {cancelled}")
        await session.close()
        await self.story.tell("plan: closed")

    async def finish(self) -> None:
        """The successor: what it was handed is its own, to await, to steer, and to be told of."""
        session = await self.store.session("build")
        await self.register_ci(session)
        await session.complete("ci-17", TaskState.COMPLETED, result=await ci_report(self.folder))
        await self.story.tell(f"build: CI says {(await session.get('ci-17')).result}")
        answers = (await (await session.handle("research")).wait()).result
        await self.story.tell(f"build: the sub-agent says {answers}")
        files = (await (await session.handle("index")).wait()).result
        await self.story.tell(f"build: {files} files are indexed")
        async with session.inbox() as notes:
            heard = "; ".join(sorted(note.text for note in notes)) or "nothing new: read in an earlier life"
            await self.story.tell(f"build: the inbox says: {heard}")
        await session.close()
        await self.story.tell("build: closed")

    async def register_ci(self, session: SessionTasks) -> None:
        """Keep the books of the CI run; after a restart the same call binds its callback again."""
        await session.register("ci-17", TaskKind.OTHER, cancel=self.stop_ci, idempotency_key="ci-17")
        start_ci(self.folder)

    def stop_ci(self) -> None:
        """What a cancel of the CI run would call."""
        (self.folder / "ci-17.stop").touch()


async def tell_what_the_file_says(store: TaskStore) -> None:
    """The same story, from the events of the file."""
    print("\nthe file says:")
    events: dict[int, list[str]] = {}
    until = await store.count(TaskFilter())
    ended = 0
    async for event in store.events(after=0):
        if event.task_seq is not None:
            said = str(event.type)
            if event.from_scope is not None:
                said += f" to {event.scope.session_id}"
            line = events.setdefault(event.task_seq, [])
            if said not in {"progress", "saved"} and line[-1:] != [said]:
                line.append(said)
            ended += event.type in {"completed", "failed", "cancelled", "abandoned"}
        if ended == until:
            break
    for record in await store.list():
        title = f"{record.scope.session_id}/{record.id if record.mode != 'hidden' else record.label}"
        print(f"  {title:45} {record.state:10} attempt {record.attempt}: {' → '.join(events[record.task_seq])}")


async def main(agent: Agent) -> None:
    began = time.monotonic()
    async with agent.store:
        await agent.hand_over()
        await agent.finish()
        await tell_what_the_file_says(agent.store)
    print(f"\nthis life took {time.monotonic() - began:.1f} s; look yourself:")
    print(f"  sqlite3 -readonly {agent.folder / 'agent.db'} 'select * from task_history'")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("agent-session"), help="where the store and the CI files lie")
    parser.add_argument("--pace", type=float, default=0.5, help="seconds between steps: time to kill it")
    parser.add_argument("--die-after", type=int, metavar="N", help="kill -9 this process itself after step N")
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(Agent(given.dir, Story(given.pace, given.die_after))))
