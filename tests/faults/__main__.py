"""
``python -m tests.faults``: the fault matrix, row by row: the tests that show each, and the long sweeps.

A row that did not run fails the whole, unless it says why it was skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tests.acceptance.processes import workers
from tests.checker import check
from tests.faults import calls, disks, syscalls
from tests.faults.cancels import cancelled_at
from tests.faults.matrix import MATRIX, Row, page
from tests.faults.operations import OPERATIONS, Operation, newborn
from tests.faults.statements import CODES, MODES, Outcome, point, statements_of
from tests.power import vfs

ROOT = Path(__file__).parents[2]

Point = tuple[str, str, list[str]]
"""What it was, how it was answered, and what is wrong with it."""


@dataclass
class Wanted:
    """What a sweep is to do: the *seed* of its order, until when, None for all of it, and operations by a part of their name."""

    seed: int
    until: float | None
    operations: str

    def of(self, operations: tuple[Operation, ...] = OPERATIONS) -> list[Operation]:
        return [one for one in operations if self.operations in one.name]

    @property
    def is_over(self) -> bool:
        return self.until is not None and time.monotonic() > self.until


@dataclass
class Result:
    """What came of a row."""

    row: str
    tests: int = 0
    points: int = 0
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.wrong:
            return "WRONG"
        if self.tests + self.points == 0:
            return "skipped" if self.skipped else "DID NOT RUN"
        return "fine"


# --- the sweeps -----------------------------------------------------------------------------------------------------


def _in_memory() -> str | None:
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() and os.access(shm, os.W_OK) else None


def _driven(points: AsyncIterator[Point]) -> Iterator[Point]:
    """Take points one by one, each in the same loop."""
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(_next(points))
            except StopAsyncIteration:
                return


async def _next(points: AsyncIterator[Point]) -> Point:
    return await anext(points)


def statements(wanted: Wanted) -> Iterator[Point]:
    """Every statement of every operation, in every mode, with every code."""
    return _driven(_statements(wanted))


async def _statements(wanted: Wanted) -> AsyncIterator[Point]:
    with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
        born = newborn(Path(folder))
        counts: dict[str, int] = {}

        async def count(operation: Operation) -> int:
            if operation.name not in counts:
                with tempfile.TemporaryDirectory(dir=folder) as here:
                    # a run may have one or two more than another: of the feed, beside it
                    counts[operation.name] = len(await statements_of(operation, born, Path(here))) + 2
            return counts[operation.name]

        async def run(operation: Operation, k: int, mode: str, code: str) -> Outcome:
            with tempfile.TemporaryDirectory(dir=folder) as here:
                return await point(operation, born, Path(here), k, mode, code, check)

        if wanted.until is None:
            for operation in wanted.of():
                for k, mode, code in product(range(1, await count(operation) + 1), MODES, CODES):
                    found = await run(operation, k, mode, code)
                    if found.reached:
                        yield str(found), found.answer, found.wrong
            return
        chance = random.Random(wanted.seed)
        while not wanted.is_over:
            operation = chance.choice(wanted.of())
            k = chance.randint(1, await count(operation))
            found = await run(operation, k, chance.choice(MODES), chance.choice([*CODES]))
            if found.reached:
                yield str(found), found.answer, found.wrong


def cancels(wanted: Wanted) -> Iterator[Point]:
    """Every suspension of every operation, while it waits and late."""
    return _driven(_cancels(wanted))


async def _cancels(wanted: Wanted) -> AsyncIterator[Point]:
    with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
        born = newborn(Path(folder))
        plan = [(operation, late) for operation in wanted.of() for late in (False, True)]
        if wanted.until is not None:
            random.Random(wanted.seed).shuffle(plan)
        for operation, late in plan:
            for at in range(1, 1000):
                if wanted.is_over:
                    return
                with tempfile.TemporaryDirectory(dir=folder) as here:
                    found = await cancelled_at(operation, born, Path(here), at, late, check)
                if not found.reached:
                    break
                yield str(found), found.answer, found.wrong


def io_calls(wanted: Wanted) -> Iterator[Point]:
    """Every call of SQLite's on a file, of every operation, failing in every mode."""
    seconds = None if wanted.until is None else max(1.0, wanted.until - time.monotonic())
    with tempfile.TemporaryDirectory(dir=_in_memory()) as folder, workers() as start:
        plan = {
            "names": [one.name for one in wanted.of()],
            "modes": calls.MODES,
            "seed": wanted.seed,
            "seconds": seconds,
            "born": str(newborn(Path(folder))),
        }
        worker = start(calls.sweep, folder, json.dumps(plan))
        told, goes_on = 0, True
        while goes_on:
            goes_on = worker.listen(1.0)
            while told < len(worker.said):
                words = worker.said[told]
                told += 1
                if words[0] == "point":
                    name, at, mode, hit, answer, effect, _, wrong = words[1:]
                    yield f"{name} k={at} {mode} [{hit}] -> {answer}, {effect}", answer, wrong
                elif words[0] == "over":
                    return
                else:
                    yield "the worker", "died", [str(words)]


def kills(wanted: Wanted) -> Iterator[Point]:
    """SIGKILL at every call of SQLite's on a file, of every operation that changes it."""
    chance = random.Random(wanted.seed)
    changing = [one for one in wanted.of() if one.ask is not None and not one.alone and not one.is_slow]
    with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
        born = newborn(Path(folder))
        if wanted.until is not None:
            while not wanted.is_over:
                found = _kill(chance.choice(changing), chance.randint(1, 40), born, folder)
                if found is not None:
                    yield found
            return
        for operation in changing:
            for at in range(1, 10_000):
                found = _kill(operation, at, born, folder)
                if found is None:
                    break
                yield found


def _kill(operation: Operation, at: int, born: Path, folder: str) -> Point | None:
    with tempfile.TemporaryDirectory(dir=folder) as here, workers() as start:
        shutil.copy(born, Path(here) / "newborn.db")
        worker = start(calls.kill_at, here, operation.name, at)
        said = worker.join()
        if worker.exit_code != -signal.SIGKILL:
            return f"{operation} at={at}", "died", [str(said)]
        is_answered = any(words[0] == "answered" for words in said)
        if is_answered:
            return None
        wrong = asyncio.run(calls.judge_killed(operation, Path(here), is_answered=False))
        return f"{operation} at={at}", "killed", wrong


def system_calls(wanted: Wanted) -> Iterator[Point]:
    """System calls, by strace."""
    names = tuple(name for name in syscalls.NAMES if wanted.operations in name)
    for what, wrong in syscalls.points(names, wanted.seed, wanted.until):
        yield what, what.split()[-2].partition("=")[2], wrong


def small_disks(wanted: Wanted) -> Iterator[Point]:
    """Disks that are full."""
    for what, wrong in disks.points(wanted.seed):
        yield what, "SIGBUS" if "SIGBUS" in what else "refused", wrong


def hold(wanted: Wanted) -> Iterator[Point]:
    """Ten seconds of somebody else's write lock."""
    shown = "tests/faults/test_surroundings.py"
    name = "test_a_lock_that_outlasts_the_patience_is_storage_busy_and_a_longer_patience_outlasts_it"
    result = Result("hold")
    _run_tests((f"{shown}::{name}",), {f"{shown}::{name}": [result]}, {"FAULTS_HOLD": "10"})
    yield "ten seconds", "StorageBusy, then success", result.wrong


def _always() -> str | None:
    return None


SWEEPS: dict[str, tuple[Callable[[Wanted], Iterator[Point]], Callable[[], str | None]]] = {
    "statements": (statements, _always),
    "cancels": (cancels, _always),
    "calls": (io_calls, vfs.available),
    "kills": (kills, vfs.available),
    "syscalls": (system_calls, syscalls.unavailable),
    "disks": (small_disks, disks.unavailable),
    "hold": (hold, _always),
}
"""What runs each, and why it cannot here, if it cannot."""


SOMETIMES: dict[str, set[str]] = {
    "statements": {"success", "StorageError", "StorageFull", "StorageBusy", "CommitInDoubt"},
    "cancels": {"cancelled"},
    "calls": {"success", "StorageError", "StorageFull", "CommitInDoubt"},
    "kills": {"killed"},
    "syscalls": {"EIO", "ENOSPC", "EINTR", "SIGKILL"},
}
"""Answers that a sweep of all operations must have met, once it is long enough for that; else it is void."""

_LONG = 300
"""Points after which each of those was met, if nothing is wrong with the sweep itself."""


# --- the tests ------------------------------------------------------------------------------------------------------


def _run_tests(nodes: tuple[str, ...], of: dict[str, list[Result]], environment: dict[str, str]) -> None:
    """Run tests in one process, and tell each row what came of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *nodes,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if not report.exists():
            for results in of.values():
                for result in results:
                    result.wrong.append(f"pytest did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
            return
        for case in Xml.parse(report).iter("testcase"):  # pytest's own
            node = f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name'].partition('[')[0]}"
            for result in of.get(node, ()):
                _note(result, node, case)
    for node, results in of.items():
        for result in results:
            if node not in result.answers:
                result.wrong.append(f"{node} did not run")


def _note(result: Result, node: str, case: Xml.Element) -> None:
    result.answers[node] = result.answers.get(node, 0) + 1
    result.seconds += float(case.attrib.get("time", 0))
    for child in case:
        if child.tag in {"failure", "error"}:
            result.wrong.append(f"{node}: {child.attrib.get('message', '')[:300]}")
            return
        if child.tag == "skipped":
            result.skipped.append(f"{node}: {child.attrib.get('message', '')[:200]}")
            return
    result.tests += 1


# --- the whole ------------------------------------------------------------------------------------------------------


def run(rows: list[Row], arguments: argparse.Namespace) -> list[Result]:
    """Run rows: all their tests first, in one process, then sweep by sweep."""
    results = {row.name: Result(row.name) for row in rows}
    of: dict[str, list[Result]] = {}
    for row in rows:
        for node in row.shown:
            of.setdefault(node, []).append(results[row.name])
    if of and not arguments.no_tests:
        print(f"{len(of)} tests …", file=sys.stderr, flush=True)
        _run_tests(tuple(of), of, {"FAULTS_SEED": str(arguments.seed)})
        for result in results.values():
            result.answers.clear()
    for row in rows:
        if row.sweep is not None:
            _sweep(row.sweep, results[row.name], arguments)
    return [*results.values()]


def _sweep(name: str, result: Result, arguments: argparse.Namespace) -> None:
    sweep, why_not = SWEEPS[name]
    reason = why_not()
    if reason is not None:
        result.skipped.append(f"sweep {name}: {reason}")
        return
    began = time.monotonic()
    wanted = Wanted(arguments.seed, None if arguments.all else began + arguments.seconds, arguments.operations)
    answers, told = Counter[str](), began
    points = sweep(wanted)
    while True:
        try:
            what, answer, wrong = next(points)
        except StopIteration:
            break
        except Exception as error:
            result.wrong.append(f"sweep {name}: the harness broke off: {error!r}")
            break
        result.points += 1
        answers[answer] += 1
        if wrong:
            result.wrong.append(f"{what}: {'; '.join(wrong)}")
            print(f"WRONG {result.wrong[-1]}", file=sys.stderr, flush=True)
        if time.monotonic() > told + 10:
            told = time.monotonic()
            print(f"{name}: {result.points} points, {told - began:.0f} s, {what[:80]}", file=sys.stderr, flush=True)
    missing = SOMETIMES.get(name, set()) - answers.keys()
    if missing and not arguments.operations and (arguments.all or result.points >= _LONG):
        result.wrong.append(f"sweep {name}: never answered {', '.join(sorted(missing))}: it is void")
    if not result.points:
        result.wrong.append(f"sweep {name}: not one point was reached: it shows nothing")
    result.answers = dict(answers.most_common())
    result.seconds += time.monotonic() - began
    found = f"{len(result.wrong)} wrong"
    print(f"{name}: done, {result.points} points, {found}, {result.seconds:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    """Parse the command, run it, print the table; 1 if a row is wrong or did not run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Run the fault matrix: what goes wrong, where, and what must come of it (docs/faults.md).",
        epilog="examples: python -m tests.faults --seconds 20;  python -m tests.faults --all --seed 1 (some hours);  "
        "python -m tests.faults --only statement --operations SessionTasks.spawn --all --no-tests",
    )
    parser.add_argument("--only", action="append", metavar="ROW", help="a row by its name; may be given again")
    parser.add_argument("--operations", default="", metavar="TEXT", help="only operations with this in their name")
    parser.add_argument("--all", action="store_true", help="every point of every sweep, however long it takes")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each sweep takes its sample (20)")
    parser.add_argument("--seed", type=int, default=None, help="of the samples; the one used is printed")
    parser.add_argument("--no-tests", action="store_true", help="sweeps alone, not the tests that rows name")
    parser.add_argument("--json", action="store_true", help="the results as JSON, in place of the table")
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/faults.md from the matrix, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.write_docs:
        (ROOT / "docs" / "faults.md").write_text(page())
        return 0
    unknown = set(arguments.only or ()) - {row.name for row in MATRIX}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in MATRIX)}")
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {arguments.seed}", file=sys.stderr, flush=True)
    rows = [row for row in MATRIX if not arguments.only or row.name in arguments.only]
    if arguments.no_tests:
        rows = [row for row in rows if row.sweep is not None]
    results = run(rows, arguments)
    if arguments.json:
        print(json.dumps({"seed": arguments.seed, "rows": [_plain(result) for result in results]}, indent=2))
    else:
        _print(results)
    return 1 if any(result.verdict in {"WRONG", "DID NOT RUN"} for result in results) else 0


def _plain(result: Result) -> dict[str, Any]:
    return {**asdict(result), "verdict": result.verdict}


def _print(results: list[Result]) -> None:
    print(f"{'row':<15} {'verdict':<12} {'tests':>6} {'points':>8} {'wrong':>6} {'seconds':>8}  answers")
    for result in results:
        answers = ", ".join(f"{count} {answer}" for answer, count in result.answers.items())
        print(
            f"{result.row:<15} {result.verdict:<12} {result.tests:>6} {result.points:>8} {len(result.wrong):>6} "
            f"{result.seconds:>8.1f}  {answers}"
        )
    for result in results:
        for told in result.skipped:
            print(f"skipped, {result.row}: {told}")
        for told in result.wrong[:50]:
            print(f"WRONG, {result.row}: {told}")


if __name__ == "__main__":
    sys.exit(main())
