"""
A research agent that goes on where it was: it searches, reads, summarises, asks a human, rests, and writes.

    python examples/research_agent.py                   # begins; asks you, and tells how to answer
    python examples/research_agent.py --answer yes      # from another terminal, while it runs or not
    kill -9 …                                           # whenever you like (or --die-after N)
    python examples/research_agent.py                   # goes on: no page is read twice, nothing is written twice
    python examples/research_agent.py --yes             # the whole story without a human

The web is a folder of text files, and its server is busy now and then; the model picks sentences. Both work on real files in the
folder (--dir, ./research-agent by default), where the store, agent.db, and the reports stand; delete it to begin again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

from pydantic import BaseModel

from lash_store import (
    Backoff,
    Recovery,
    TaskContext,
    TaskFilter,
    TaskKind,
    TaskNotFound,
    TaskStore,
    TransactConnection,
)

QUESTION = "why do lighthouses flash?"

PAGES = {
    "lights.txt": "A lighthouse shows ships where the coast is. Each lighthouse flashes in a rhythm of its own. The rhythm tells "
    "a sailor which lighthouse it is, so a flash is a name. Charts print the rhythm beside every light.",
    "lenses.txt": "A lens of many prisms gathers the light of a small lamp into a beam. The beam turns, and whoever it passes "
    "sees a flash. A turning lens floats on mercury, so a child could push it. Lighthouses used clockwork to turn it.",
    "fog.txt": "In fog no light carries far. A lighthouse then sounds a horn. Sailors hear it long before they see the flash.",
    "bread.txt": "Bread wants flour, water, salt and time. Most of the work is waiting.",
}


class Page(BaseModel):
    """One page, and what the model makes of it."""

    name: str
    words: int
    summary: str


# --- the web and the model: real functions over real files ------------------------------------------------------------


class Web:
    """A folder of pages behind a server that refuses every third request; each request is a line of its log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "web", folder / "web.log"
        self.folder.mkdir(exist_ok=True)
        for name, text in PAGES.items():
            (self.folder / name).write_text(text)

    def search(self, question: str) -> list[str]:
        """Return the pages that speak of it, the best first."""
        wanted = _words(question)
        scores = {
            page.name: sum(_words(page.read_text())[word] for word in wanted) for page in self.folder.glob("*.txt")
        }
        return sorted((name for name, score in scores.items() if score), key=lambda name: (-scores[name], name))

    async def get(self, name: str) -> str:
        """Return a page, unless the server is busy."""
        with self.log.open("a") as log:
            log.write(f"GET {name}\n")
        await asyncio.sleep(0.05)
        if len(self.log.read_text().splitlines()) % 3 == 1:
            raise ConnectionError(f"503: too busy for {name}")
        return (self.folder / name).read_text()


def summarise(question: str, text: str, most: int) -> str:
    """Pick the sentences that say most about a question, in their order."""
    wanted = _words(question)
    sentences = re.findall(r"[^.]+\.", text)
    best = sorted(sentences, key=lambda one: -sum(_words(one)[word] for word in wanted))[:most]
    return " ".join(one.strip() for one in sentences if one in best)


def _words(text: str) -> Counter[str]:
    """Count the words of a text, by their first letters: flash, flashes and flashing are one."""
    return Counter(word[:5] for word in re.findall(r"[a-z]{4,}", text.lower()))


# --- the agent --------------------------------------------------------------------------------------------------------


class Story:
    """Tells what happens, one line at a time; the reader may kill it at any."""

    def __init__(self, die_after: int | None) -> None:
        self.die_after, self.lines = die_after, 0

    def tell(self, what: str) -> None:
        self.lines += 1
        print(f"{self.lines:2}. {what}", flush=True)
        if self.lines == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)


class Agent:
    """The program: its store, and the two functions that run in it. One slot is enough: whoever waits gives it back."""

    def __init__(self, folder: Path, story: Story, rest: float) -> None:
        self.folder, self.story, self.rest = folder, story, rest
        self.web = Web(folder)
        self.store = TaskStore(folder / "agent.db", runtime="example", max_running=1)
        self.store.task(recovery=Recovery.RERUN, version="1")(self.research)
        # a retry of the body keeps the steps that are done: only what failed is tried again
        self.store.task(
            recovery=Recovery.RERUN,
            version="1",
            max_attempts=20,
            retry_on=ConnectionError,
            backoff=Backoff(initial=0.2),
        )(self.read)

    async def research(self, task: TaskContext, question: str) -> str:
        """Search → read → summarise → ask → rest → write; every line of it is run in every attempt, and done once."""
        self.story.tell(f"research: attempt {task.attempt}")
        await task.transact("tables", make_tables)
        names = await task.step("search", self.web.search, question)
        self.story.tell(f"research: {len(names)} pages speak of it: {', '.join(names)}")

        readers = [
            await task.spawn(self.read, question, name, id=f"read {name}", kind=TaskKind.SUBAGENT) for name in names
        ]
        pages = [Page.model_validate(await reader) for reader in readers]
        self.story.tell(f"research: {sum(page.words for page in pages)} words are read")

        draft = await task.step("summarise", summarise, question, " ".join(page.summary for page in pages), 3)
        await task.notify(f"may I publish this? {draft}", key="question")
        self.story.tell(f'research: "{draft}"')
        async with task.waiting("a human's answer"):
            answer = await task.signal("answer")
        self.story.tell(f"research: the human says {answer!r}")
        if answer != "yes":
            return f"not published: {answer}"

        await task.sleep(self.rest, name="rest")
        self.story.tell(f"research: rested {self.rest:g} s, however often it was killed")

        report = await task.step("write", self.write, question, draft, [page.name for page in pages])
        # the row of the report and the result of the task are one transaction: both are there, or neither
        task.at_completion(lambda db: db.execute("INSERT INTO reports VALUES (?, ?)", [report, draft]))
        return report

    async def read(self, task: TaskContext, question: str, name: str) -> Page:
        """A sub-agent: it fetches a page over a busy line, and enters what it found into a table of the program's own."""
        text = await task.step(
            f"get {name}", self.web.get, name, retry_on=ConnectionError, backoff=Backoff(initial=0.1)
        )
        page = Page(name=name, words=len(text.split()), summary=summarise(question, text, 2))
        self.story.tell(f"read {name}: attempt {task.attempt}, {page.words} words")

        def enter(db: TransactConnection) -> None:
            db.execute("INSERT INTO sources VALUES (?, ?, ?)", [page.name, page.words, page.summary])

        await task.transact("enter", enter)
        return page

    def write(self, question: str, draft: str, sources: list[str]) -> str:
        """Write the report; done again after a kill in the middle, it writes the same file."""
        part = self.folder / "report.part"
        part.write_text(f"# {question}\n\n{draft}\n\nSources: {', '.join(sources)}\n")
        part.replace(self.folder / "report.md")
        return "report.md"

    async def work(self, answer: str | None) -> None:
        async with self.store:
            session = await self.store.session("s1")
            try:
                handle = await session.handle("research")
                self.story.tell("the research was begun in an earlier life")
            except TaskNotFound:
                handle = await session.spawn(self.research, QUESTION, id="research", notify_on_end=True)
                self.story.tell("the research begins")
            if answer is not None:
                await handle.signal("answer", answer, key="answer")
            elif not (await handle.record()).is_terminal:
                print(f"    (answer it: python {__file__} --dir {self.folder} --answer yes)", flush=True)
            print(f"\nresult: {await handle}")
            async with session.inbox() as notes:
                print("inbox: " + "; ".join(note.text for note in notes))
            for record in await self.store.list(TaskFilter(scope=session.scope)):
                spent = f", {record.attempts_spent} cut off or failed" if record.attempts_spent else ""
                print(f"  {record.id:16} {record.state:10} attempt {record.attempt}{spent}")
            for step in await handle.steps():
                print(f"  research remembers {step.kind:10} {step.name}")


def make_tables(db: TransactConnection) -> None:
    """Make the tables of the program's own, in the store's file."""
    db.execute("CREATE TABLE IF NOT EXISTS sources (name TEXT PRIMARY KEY, words INTEGER, summary TEXT)")
    db.execute("CREATE TABLE IF NOT EXISTS reports (name TEXT PRIMARY KEY, draft TEXT)")


async def send_answer(folder: Path, answer: str) -> None:
    """Answer from another process, whether the agent runs or not: the signal waits for it in the file."""
    async with TaskStore.connect(folder / "agent.db", runtime="example") as store:
        handle = await store.handle("example:s1", "research")
        sent = await handle.signal("answer", answer, key="answer")
        print(f"{sent.verdict}: research is {sent.record.state}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("research-agent"), help="where the store, the web and the report are"
    )
    parser.add_argument("--answer", metavar="TEXT", help="answer the question the agent asks, and do no more")
    parser.add_argument("--yes", action="store_true", help="answer it with yes at once")
    parser.add_argument("--rest", type=float, default=3.0, help="seconds to rest before writing, kills included")
    parser.add_argument("--die-after", type=int, metavar="N", help="kill -9 this process itself after line N")
    given = parser.parse_args()
    if given.answer is not None:
        asyncio.run(send_answer(given.dir, given.answer))
    else:
        given.dir.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        asyncio.run(Agent(given.dir, Story(given.die_after), given.rest).work("yes" if given.yes else None))
        print(f"\nthis life took {time.monotonic() - began:.1f} s; look yourself:")
        print(f"  sqlite3 -readonly {given.dir / 'agent.db'} 'select * from sources'")
