"""
Lets processes hammer tasks, a few dozen at a time, kills or closes one now and then, and makes a history of each task.

One file serves some thousand tasks; each process is told by a pipe of its own which tasks come next. Of a process that was killed
the replacement opens the file, and recovers, while the others go on.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from tests.acceptance import processes
from tests.acceptance.processes import Worker, workers
from tests.checker import check
from tests.histories import programs
from tests.histories.search import History
from tests.histories.specification import READS, Call

__all__ = ["Recorder"]

SLOTS = 48
"""Tasks at a time: each has two sessions, which the next one in its slot takes over."""

TASKS_A_FILE = 3_000
_PATIENCE = 60.0
_MEMORY = Path("/dev/shm")


class _Member:
    """One process, by its name and its place among the others."""

    def __init__(self, start: Callable[..., Worker], path: Path, who: str, place: int, recorder: Recorder) -> None:
        theirs, self.orders = processes._context.Pipe(duplex=False)
        self.who, self.place = who, place
        self.is_met = False
        self.worker = start(
            programs.work, str(path), who, place, recorder.processes, recorder.seed, SLOTS, theirs, recorder.fault
        )
        theirs.close()

    def wait_for(self, *words: Any) -> list[Any]:
        return self.worker.wait_for(*words, seconds=_PATIENCE)


class Recorder:
    """
    Records histories of one seed with so many *processes*, two of which run bodies; all of them with a *fault*, if one is named.

    *kills* is the share of batches in which one process is killed, or, a third as often, closed. `counts` tells how many were.
    """

    def __init__(self, seed: int, *, processes: int = 4, kills: float = 0.7, fault: str = "") -> None:
        self.seed = seed
        self.processes = processes
        self.kills = kills
        self.fault = fault
        self.counts: Counter[str] = Counter()

    def record(self, first: int, tasks: int) -> Generator[list[History], None, None]:
        """Yield the histories of tasks in batches; the next batch goes on while one is looked at."""
        while tasks > 0:
            here = min(tasks, TASKS_A_FILE)
            yield from self._record_file(first, here)
            first, tasks = first + here, tasks - here

    def _record_file(self, first: int, tasks: int) -> Iterator[list[History]]:
        folder = Path(tempfile.mkdtemp(prefix="lash-store-histories-", dir=_MEMORY if _MEMORY.is_dir() else None))
        try:
            with workers() as start:
                game = _Game(self, start, folder / "agent.db")
                for batch in range(first, first + tasks, SLOTS):
                    yield game.play(batch, min(SLOTS, first + tasks - batch))
                game.end()
            # nobody has it open any more: this process never opened a store
            broken = check(folder / "agent.db")
            assert not broken, f"seed {self.seed}, the file of tasks {first} to {first + tasks - 1}: {broken[:5]}"
        finally:
            shutil.rmtree(folder)


class _Game:
    """The processes on one file."""

    def __init__(self, recorder: Recorder, start: Callable[..., Worker], path: Path) -> None:
        self._recorder = recorder
        self._start = start
        self._path = path
        self._born: Counter[int] = Counter()
        self._owners: dict[int, str] = {}
        # the first makes the file
        self._members = [self._bear(0)]
        self._members[0].wait_for("ready")
        self._members += [self._bear(place) for place in range(1, recorder.processes)]
        for member in self._members:
            self._meet(member)

    def _bear(self, place: int) -> _Member:
        self._born[place] += 1
        letter = "AB"[place] if place < programs.OWNERS else "RSTUVWXYZ"[place - programs.OWNERS]
        return _Member(self._start, self._path, f"{letter}{self._born[place]}", place, self._recorder)

    def _meet(self, member: _Member) -> None:
        if not member.is_met:
            member.wait_for("ready")
            self._owners[member.wait_for("owner")[2]] = member.who
            member.is_met = True

    def play(self, first: int, count: int) -> list[History]:
        """Let a batch of tasks be hammered, and return their histories."""
        recorder, members = self._recorder, self._members
        chance = random.Random(f"{recorder.seed}/batch {first}")
        begun = time.monotonic_ns()
        for member in members:
            member.orders.send(["go", first, count])
        leaver: _Member | None = None
        ends: list[tuple[str, str, int, int]] = []
        if chance.random() < recorder.kills:
            # an owner leaves more behind
            leaver = chance.choice(members[: programs.OWNERS] if chance.random() < 0.7 else members)
            time.sleep(0.02 + chance.random() * 0.2)
            ends.append(self._let_go(leaver, in_order=chance.random() < 0.25))
            members[leaver.place] = self._bear(leaver.place)
        for member in members:
            if leaver is None or member is not members[leaver.place]:
                member.wait_for("done", member.who, first)
        for member in members:
            self._meet(member)
        sweeper = members[chance.randrange(programs.OWNERS)]
        sweeper.orders.send(["sweep", first, count])
        sweeper.wait_for("swept", sweeper.who, first)
        everybody = [*members, leaver] if leaver is not None else members
        return self._histories(first, count, everybody, ends, begun)

    def _let_go(self, member: _Member, *, in_order: bool) -> tuple[str, str, int, int]:
        """End a process, and say how, and between which times."""
        asked = time.monotonic_ns()
        if in_order:
            self._recorder.counts["closed"] += 1
            member.orders.send(["close"])
            member.wait_for("closed")
            member.worker.join()
        else:
            self._recorder.counts["killed"] += 1
            member.worker.kill()
        return "close" if in_order else "die", member.who, asked, time.monotonic_ns()

    def end(self) -> None:
        """Close all of it."""
        for member in self._members:
            member.orders.send(["close"])
        for member in self._members:
            member.wait_for("closed")
            member.worker.join()

    def _histories(
        self, first: int, count: int, members: list[_Member], ends: list[tuple[str, str, int, int]], begun: int
    ) -> list[History]:
        closing = {who: asked for how, who, asked, _ in ends if how == "close"}
        calls: defaultdict[int, list[Call]] = defaultdict(list)
        for member in members:
            said, member.worker.said = member.worker.said, []
            asked: dict[int, Any] = {}
            answers: dict[int, Any] = {}
            for words in said:
                if words[0] == "S":
                    asked[words[1]] = words
                elif words[0] == "A":
                    answers[words[1]] = words
                elif words[0] == "died":
                    raise AssertionError(f"{member.who} died: {words}")
            for number, (_, _, at, task, op, session, to, value) in asked.items():
                _, _, told, answer = answers.get(number, (None, None, None, None))
                if told is not None and told > closing.get(member.who, told):
                    # it may have happened before its store had closed, or was refused, or looked at what came after
                    told = answer = None
                if told is None and op in READS:
                    continue
                if answer is not None and answer.get("owner") is not None:
                    answer["owner"] = self._owners[answer["owner"]]
                call = Call(member.who, op, at, told, session, to, _hashable(value), answer, number)
                calls[task].append(call)
                if op == "result" and answer == {"error": "TimeoutError"}:
                    calls[task].append(call._replace(op="flicker", told=None, answer=None))
        for how, who, since, until in ends:
            for number in range(first, first + count):
                calls[number].append(Call("", how, since, until, value=who, answer={}))
        live = {member.who for member in members}
        return [
            History(
                number,
                tuple(sorted(calls[number], key=lambda call: call.asked)),
                tuple(who for who in self._owners.values() if who in live),
            )
            for number in range(first, first + count)
        ]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
