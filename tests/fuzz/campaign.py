"""Runs many cases, each in a forked process with a limit of time and memory, and counts what came of them."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lash_store
import lash_store.cli

from .files import KINDS, Case, build
from .trial import WAYS, run_case, say

__all__ = ["SOMETIMES", "Found", "Tally", "cases", "run"]

SECONDS = 30.0
"""That one way may take; then it hangs."""

ORIGINS = ("closed", "killed", "killed", "closed", "small", "0001", "0002", "0003", "0004", "copy")


def cases(seed: int, first: int, count: int) -> Iterator[Case]:
    """Name cases: every kind in turn, every seed file in turn with each."""
    kinds = [*KINDS]
    for number in range(first, first + count):
        turn, kind = divmod(number, len(kinds))
        yield Case(seed, number, ORIGINS[(turn + kind) % len(ORIGINS)], kinds[kind])


class Found(NamedTuple):
    """What a file did that none may do."""

    case: Case | None
    way: str
    what: str


SOMETIMES: Mapping[str, int] = {
    "worked": 30,
    "refused": 30,
    "StorageCorrupt": 30,
    "NotAStore": 60,
    "StorageError": 60,
    "SchemaTooOld": 60,
    "SchemaTooNew": 2000,
    "StoreCopied": 200,
    "a check found something": 30,
    "an older file was upgraded": 60,
    "a dead owner's work was recovered": 60,
    "what was damaged was put right": 30,
    "a backup was made": 30,
    "a backup was put back": 60,
    "read, and not run": 200,
}
"""What a run must have come to at least once, from so many files on; else it is void."""


class Tally:
    """What came of the cases so far."""

    def __init__(self) -> None:
        self.files = 0
        self.outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.seen: Counter[str] = Counter()
        self.found: list[Found] = []
        self.seconds: Counter[str] = Counter()

    def note(self, case: Case | None, answers: list[dict[str, Any]]) -> None:
        """Count one case."""
        self.files += 1
        kind = "again" if case is None else case.kind
        counts = self.outcomes.setdefault(kind, Counter())
        here: dict[str, bool] = {}
        for answer in answers:
            self.seconds[answer["way"]] += answer.get("seconds", SECONDS)
            counts[answer["outcome"]] += 1
            self.seen.update([answer["outcome"], *answer["seen"], *(["refused"] if answer["refused"] else [])])
            here[answer["way"]] = answer["refused"]
            self.found += [Found(case, answer["way"], what) for what in answer["wrong"]]
        if here.get("read") is False and here.get("run"):
            self.seen["read, and not run"] += 1

    def missing(self) -> list[str]:
        """Name what a run of this size should have come to, and has not."""
        return [what for what, least in SOMETIMES.items() if self.files >= least and not self.seen[what]]


def run(
    work: list[Case | None],
    folder: Path,
    seeds: Mapping[str, Path],
    *,
    ways: list[str],
    keep: Path,
    source: Path | None = None,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Run cases one after the other; a file that does what none may is kept."""
    tally = Tally()
    _warm()
    for case in work:
        number = 0 if case is None else case.number
        here = folder / f"case-{number}"
        here.mkdir(mode=0o700)
        answers = _in_a_process(case, here, seeds, ways or [*WAYS], source)
        tally.note(case, answers)
        shutil.rmtree(here, ignore_errors=True)
        if case is not None and any(answer["wrong"] for answer in answers):
            _keep(case, keep / f"{case.seed}-{number}", seeds)
        if progress is not None:
            progress(tally)
    return tally


def _warm() -> None:
    """Import what any way needs, and open nothing: the forks then begin where the work does."""
    for package in (lash_store, lash_store.cli):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not found.name.endswith(("__main__", ".migrations")):
                importlib.import_module(found.name)
    for name in ("alembic.command", "alembic.script", "alembic.runtime.migration", "rich.console", "rich.table"):
        importlib.import_module(name)
    gc.collect()
    # what the forks share is nothing for them to look through
    gc.freeze()


def _keep(case: Case, folder: Path, seeds: Mapping[str, Path]) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    with suppress(OSError):
        build(case, folder, seeds)


def _in_a_process(
    case: Case | None, here: Path, seeds: Mapping[str, Path], ways: list[str], source: Path | None
) -> list[dict[str, Any]]:
    """Go through one case in a fork of this process, which has opened nothing; a crash and a hang are answers, too."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reads)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.setsid()
            # a crash is an answer here, and told by its signal
            faulthandler.disable()
            for answer in run_case(case, here, seeds, ways, source):
                say(writes, answer)
            status = 0
        except BaseException:
            say(writes, _answer("harness", traceback.format_exc()[-2500:]))
        finally:
            os._exit(status)
    os.close(writes)
    try:
        answers, begun, is_hung = _listen(reads)
    finally:
        os.close(reads)
        with suppress(ProcessLookupError):
            # also what the trial itself has started
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if is_hung:
        answers.append(_answer(begun, f"hangs: more than {SECONDS:g} s"))
    elif begun:
        ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        answers.append(_answer(begun, f"the process crashed: {ended}"))
    return answers


def _answer(way: str, wrong: str) -> dict[str, Any]:
    return {"way": way, "outcome": "WRONG", "refused": False, "seen": [], "wrong": [wrong]}


def _listen(descriptor: int) -> tuple[list[dict[str, Any]], str, bool]:
    """Return the answers, the way that was begun and not ended, and whether the time for it was over."""
    buffer, begun = b"", ""
    answers: list[dict[str, Any]] = []
    deadline = time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return answers, begun, True
        data = os.read(descriptor, 1 << 16)
        if not data:
            return answers, begun, False
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            words = json.loads(line)
            if "begin" in words:
                begun, deadline = words["begin"], time.monotonic() + SECONDS
            else:
                answers.append(words)
                begun = ""


def tell(tally: Tally, out: Any = sys.stdout) -> None:
    """Print the tables."""
    outcomes = sorted({outcome for counts in tally.outcomes.values() for outcome in counts})
    print(f"\n{'damage':<20}" + "".join(f" {outcome:>{max(8, len(outcome))}}" for outcome in outcomes), file=out)
    for kind, counts in tally.outcomes.items():
        if counts:
            cells = "".join(f" {counts[outcome] or '.':>{max(8, len(outcome))}}" for outcome in outcomes)
            print(f"{kind:<20}{cells}", file=out)
    spent = ", ".join(
        f"{way} {seconds / max(1, tally.files) * 1000:.0f}" for way, seconds in tally.seconds.most_common()
    )
    print(f"\nmilliseconds a file: {spent}\n\nsometimes", file=out)
    for what in SOMETIMES:
        print(f"  {tally.seen[what]:>8}  {what}", file=out)
    for what in sorted(tally.seen.keys() - SOMETIMES.keys() - {*outcomes}):
        print(f"  {tally.seen[what]:>8}  ({what})", file=out)
