"""
A process that writes into tables of its own, by `transact` and at the completion of its tasks, is killed again and again.

What its steps wrote and that they were taken must be in the file together or not at all. The tables have no keys, so what is
there twice can be seen. The seed is printed. ``pytest -m slow tests/acceptance/test_transact_kill.py -s`` kills 500 times.
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import step_programs as programs
from tests.acceptance.processes import Worker
from tests.acceptance.step_programs import ENDINGS, PARTS
from tests.runtime.support import rows


class Books:
    """What the program's own tables must say, and what its processes were told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[tuple[int, str], int] = {}
        self.taken: dict[tuple[int, str], int] = {}

    def audit(self, said: list[list[Any]]) -> None:
        """Hold the tables against the steps and the ends of tasks, and against all that was told, now and before."""
        for _, task_seq, step, value in (words for words in said if words[0] == "sees"):
            assert self.seen.setdefault((task_seq, step), value) == value, "two attempts saw different results"
        assert [words for words in said if words[0] in {"odd", "died"}] == []
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'ledger'").fetchall():
                assert not self.seen
                return
            steps, ledger, counter, orphans, completed, endings = (
                connection.execute(sql).fetchall()
                for sql in (
                    f"SELECT task_seq, name, value, attempt FROM steps WHERE {_TAKEN}",
                    _ENTERED,
                    "SELECT * FROM counter",
                    "SELECT * FROM orphans",
                    "SELECT task_seq, attempt FROM tasks WHERE state = 'completed' AND function = 'book' ORDER BY task_seq",
                    "SELECT * FROM endings ORDER BY task_seq, rowid",
                )
            )
        taken = {(task_seq, name): (int(value), attempt) for task_seq, name, value, attempt in steps}
        whole = (PARTS, PARTS, 1, 1)
        assert {(row[0], row[1]): row[2:] for row in ledger} == {step: (*taken[step], *whole) for step in taken}
        # each has a number of its own, and none is left out
        numbers = {step: number for step, (number, _) in taken.items()}
        assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))
        assert counter == [(len(numbers),)]
        assert self.seen.items() <= numbers.items(), "what was told is not in the file"
        assert self.taken.items() <= numbers.items(), "what was in the file is not there any more"
        self.taken = numbers
        assert orphans == []
        assert endings == [(task_seq, ending, attempt) for task_seq, attempt in completed for ending in ENDINGS]

    def check_the_end(self) -> dict[str, int]:
        """Hold that each task ended in its way, with each of its steps taken; return how many of each way there were."""
        ways: dict[str, int] = defaultdict(int)
        of_task: dict[int, set[str]] = defaultdict(set)
        for task_seq, step in self.taken:
            of_task[task_seq].add(step)
        for row in rows(self.path, "SELECT * FROM tasks WHERE function = 'book'"):
            arguments = json.loads(row["arguments"])
            way, steps = arguments["way"], {f"t{number}" for number in range(arguments["steps"])}
            ways[way] += 1
            taken = of_task[row["task_seq"]]
            if way == "stays":
                assert (row["state"], taken - steps) == ("cancelled", set())
                continue
            assert (row["state"], taken) == (_ENDS.get(way, "completed"), steps)
            if way in {"fails", "is refused"}:
                [step] = rows(self.path, "SELECT * FROM steps WHERE task_seq = ? AND name = ?", row["task_seq"], way)
                failure = json.loads(step["failure"])["type"]
                assert (step["state"], failure) == ("failed", "Refused" if way == "fails" else "IntegrityError")
        return dict(ways)


_TAKEN = "kind = 'transact' AND state = 'done' AND name <> 'tables'"
_ENTERED = """
    SELECT task_seq, step, max(number), max(attempt), count(*), count(DISTINCT part), count(DISTINCT number),
    count(DISTINCT attempt) FROM ledger GROUP BY task_seq, step"""
_ENDS = {"raises": "failed", "cannot end": "failed"}


def cut_off(said: list[list[Any]]) -> set[tuple[int, str]]:
    """Return the steps whose function was called, and whose body was not told of the commit, when the process was killed."""
    called = {(words[1], words[2]) for words in said if words[0] == "in"}
    return called - {(words[1], words[2]) for words in said if words[0] in {"sees", "refused"}}


def campaign(start: Callable[..., Worker], path: Path, kills: int, seed: int) -> None:
    """Kill the program again and again, and audit its books after each kill."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    books, began = Books(path), time.monotonic()
    life = inside = stored = 0
    # on a busy machine a process gets to less in the same time, and fewer kills fall into a step
    while life < kills or (inside <= kills // 10 and life < 4 * kills):
        worker = start(programs.keep_books, str(path), life, chance.randrange(2**32))
        # one kill in ten falls into the opening and the recovery, the others into the work
        if life % 10 == 5:
            worker.wait_for("born")
            pause = chance.uniform(0.0, 0.08)
        else:
            worker.wait_for("ready")
            pause = chance.uniform(0.001, 0.06)
        deadline = time.monotonic() + pause
        while (left := deadline - time.monotonic()) > 0:
            worker.listen(left)
        said = worker.kill()
        assert worker.exit_code == -9, f"life {life} ended by itself: {said[-3:]}"
        books.audit(said)
        hit = cut_off(said)
        inside += bool(hit)
        stored += bool(hit & books.taken.keys())
        life += 1
    last = start(programs.close_books, str(path))
    last.wait_for("closed")
    books.audit(last.join())

    ways = books.check_the_end()
    [row] = rows(path, "SELECT max(attempt) AS most FROM tasks")
    print(
        f"{life} kills in {time.monotonic() - began:.1f} s: {len(books.taken)} steps taken, {len(books.seen)} of them told; "
        f"{inside} kills between the call of a step's function and its answer, {stored} of those behind a COMMIT; "
        f"at most {row['most']} attempts; tasks: {ways}"
    )
    assert len(books.taken) > kills // 2
    assert row["most"] > 1
    assert inside > kills // 10


@pytest.mark.long
def test_what_a_step_writes_into_the_file_is_there_exactly_once_over_25_kills(
    start: Callable[..., Worker], path: Path
) -> None:
    campaign(start, path, 25, secrets.randbits(32))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_step_writes_into_the_file_is_there_exactly_once_over_500_kills(
    start: Callable[..., Worker], path: Path
) -> None:
    campaign(start, path, 500, secrets.randbits(32))


def test_killed_anywhere_in_a_step_or_an_ending_the_file_has_all_of_it_or_nothing(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    ways = ["is refused", "cannot end"]
    # of three rows each: a step a task, and one that is refused and commits nothing; and two endings a task
    least = {"before commit": 7, "after commit": 7, "in a transact": 9, "in an ending": 4}
    books = {place: Books(tmp_path / f"{place}.db") for place in least}
    left, kills = set(books), dict.fromkeys(books, 0)
    for number in count(1):
        workers = {
            place: start(programs.book_and_die, str(books[place].path), ways, place, number) for place in sorted(left)
        }
        for place, worker in workers.items():
            said = worker.join()
            books[place].audit([words for words in said if words[0] != "dies"])
            if worker.exit_code == 0:
                left.remove(place)
            else:
                assert said[-1][:3] == ["dies", place, number], said[-3:]
                kills[place] += 1
        if not left:
            break
    for place, book in books.items():
        ended = book.check_the_end()
        print(f"{kills[place]} kills {place}: {len(book.taken)} steps taken once; tasks: {ended}")
        assert kills[place] >= least[place]
