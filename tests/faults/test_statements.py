"""
Every statement and commit of every operation fails, before it runs and after it ran.

Here a sample of them, the same every time (``FAULTS_SEED=…`` for another); ``python -m tests.faults`` takes all.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import SessionTasks, StorageError, TaskContext, TaskHandle, TaskStore
from lash_store.commit import Committer
from tests.checker import check
from tests.faults import statements
from tests.faults.operations import EXCEPT, OPERATIONS, Operation, newborn
from tests.faults.statements import CODES, MODES, Outcome, point, statements_of
from tests.seeds import seed_of

SECONDS = 2.0
SEED = seed_of("FAULTS_SEED")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: what a disk does is not what is asked here."""
    shm = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(dir=shm if shm.is_dir() and os.access(shm, os.W_OK) else None))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def born(folder: Path) -> Path:
    return newborn(folder)


def operation(name: str) -> Operation:
    [found] = [one for one in OPERATIONS if one.name == name]
    return found


async def at(named: str, k: int | str, mode: str, code: str, born: Path, folder: Path) -> Outcome:
    here = Path(tempfile.mkdtemp(dir=folder))
    try:
        return await point(operation(named), born, here, k, mode, code, check)
    finally:
        shutil.rmtree(here)


def test_every_public_method_is_an_operation_or_says_why_not() -> None:
    public = {
        f"{kind.__name__}.{name}"
        for kind in (TaskStore, SessionTasks, TaskHandle, TaskContext)
        for name in vars(kind)
        if not name.startswith("_")
    } - {"TaskHandle.handle_id", "TaskHandle.role"}
    listed = {one.name.partition("(")[0] for one in OPERATIONS if one.name.startswith(("Task", "Session"))}

    assert public == listed | EXCEPT.keys()
    assert not listed & EXCEPT.keys()


def test_every_method_that_the_typed_example_uses_is_known() -> None:
    """``tests/typing/api.py`` uses every method of the public interface."""
    tree = ast.parse((Path(__file__).parents[1] / "typing" / "api.py").read_text())
    used = {one.attr for one in ast.walk(tree) if isinstance(one, ast.Attribute)}
    names = {one.name.partition("(")[0].partition(".")[2] for one in OPERATIONS} | {
        one.partition(".")[2] for one in EXCEPT
    }
    methods = {
        name
        for kind in (TaskStore, SessionTasks, TaskHandle, TaskContext)
        for name, _ in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }

    assert used & methods <= names


async def test_a_sample_of_all_points_is_whole_or_absent_and_leaves_nothing(born: Path, folder: Path) -> None:
    print(f"FAULTS_SEED={SEED}")
    chance = random.Random(SEED)
    until, answers, wrong = time.monotonic() + SECONDS, Counter[str](), list[str]()
    # on a busy machine, for as long as it takes to see what it is for
    while time.monotonic() < until or not 0 < answers["success"] < answers.total():
        one = chance.choice([one for one in OPERATIONS if not one.is_slow])
        here = Path(tempfile.mkdtemp(dir=folder))
        count = len(await statements_of(one, born, here))
        shutil.rmtree(here)
        # the last ones end it: a COMMIT and what is read behind it
        k = chance.choice([chance.randint(1, count), chance.randint(max(1, count - 3), count)])
        found = await at(one.name, k, chance.choice(MODES), chance.choice([*CODES]), born, folder)
        answers[found.answer] += found.reached
        wrong += [str(found)] * bool(found.wrong)

    assert wrong == [], f"FAULTS_SEED={SEED}"
    assert answers["success"], answers
    assert sum(answers.values()) > answers["success"], answers


@pytest.mark.parametrize("code", ["IOERR", "FULL", "NOMEM"])
@pytest.mark.parametrize(("mode", "answer"), [("before", "error"), ("after", "success")])
async def test_a_commit_that_fails_is_told_as_it_is(
    born: Path, folder: Path, code: str, mode: str, answer: str
) -> None:
    """By hand: COMMIT is the last statement of a spawn; what took although it raised is a success, what did not is none."""
    found = await at("SessionTasks.spawn", "COMMIT", mode, code, born, folder)

    assert (found.hit, found.wrong) == ("COMMIT", [])
    assert (found.answer == "success", found.effect) == ((True, "whole") if answer == "success" else (False, "absent"))


async def test_a_store_that_acknowledged_what_a_commit_lost_is_found_out(
    born: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: the harness must be red here."""

    def believes(self: Committer, tx: Any, cause: sqlite3.Error) -> None:
        self._let_go()

    monkeypatch.setattr(Committer, "_ask_the_file", believes)
    found = await at("SessionTasks.spawn", "COMMIT", "before", "IOERR", born, folder)

    assert any("success, and the file says (0, 0, 0)" in wrong for wrong in found.wrong), found


async def test_a_store_that_keeps_the_write_lock_is_found_out(
    born: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control."""
    monkeypatch.setattr(Committer, "_let_go", lambda self: None)
    monkeypatch.setattr(statements, "PATIENCE", 0.1)

    found = await at("SessionTasks.spawn", 4, "before", "FULL", born, folder)

    assert any("write lock" in wrong or "in a transaction" in wrong for wrong in found.wrong), found


async def test_an_error_that_tells_of_no_effect_which_took_is_found_out(
    born: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control."""

    def denies(self: Committer, tx: Any, cause: sqlite3.Error) -> StorageError:
        return self._not_applied(cause)

    monkeypatch.setattr(Committer, "_ask_the_file", denies)
    found = await at("SessionTasks.update", "COMMIT", "after", "IOERR", born, folder)

    assert any("and yet the file went from" in wrong for wrong in found.wrong), found
