"""
A process is killed at every place of a body that takes ten steps: only the step in flight may run twice, all others once.

The steps write to a file of the world. The places are before and after each COMMIT, before and after each effect, and between any
two steps; how many there are is found out by dying at the n-th until there is none.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lash_store import StepState, TaskHandle, recovery
from tests.acceptance import step_programs as programs
from tests.acceptance.processes import Worker
from tests.acceptance.step_programs import STEPS
from tests.runtime.support import check_file, rows


class Story:
    """What the processes said over all their lives, what they did to the world, and what was stored when each was killed."""

    def __init__(self, path: Path, effects: Path) -> None:
        self.path = path
        self.effects = effects
        self.lives: list[list[list[Any]]] = []
        self.last_words: list[Any] = []
        self.stored: list[dict[tuple[str, str], Any]] = []

    def add(self, said: list[list[Any]]) -> None:
        """Take in one life, and what it left."""
        self.lives.append(said)
        self.stored.append(remembered(self.path))

    def done(self) -> dict[tuple[str, str], list[tuple[int, str]]]:
        """Return attempt and value of each time a step took effect."""
        lines = defaultdict(list)
        if self.effects.exists():
            for line in self.effects.read_text().splitlines():
                task_id, step, attempt, value = json.loads(line)
                lines[task_id, step].append((attempt, value))
        return dict(lines)

    def check(self) -> set[tuple[str, str]]:
        """Hold what is true whenever a process dies, and return which steps took effect twice."""
        done, kept = self.done(), remembered(self.path)
        in_flight = [in_flight_at_the_end(said) for said in self.lives]
        for step, effects in done.items():
            for life, stored in enumerate(self.stored):
                if step in stored:
                    # what was stored stays as it is, and nothing of it happens again
                    assert kept[step] == stored[step], (step, life)
                    assert effects[-1][0] == stored[step][0], f"{step} was stored, and ran again: {effects}"
            # it was in flight at the kill of every attempt but the last
            attempts = [attempt for attempt, _ in effects]
            assert attempts == sorted(set(attempts)), f"{step} ran twice in one attempt: {effects}"
            assert len(effects) <= 1 + sum(step in flying for flying in in_flight), (step, effects)
        for said in self.lives:
            for _, task_id, _, step, value in (words for words in said if words[0] == "sees"):
                assert kept[task_id, step][1] == value == done[task_id, step][-1][1], "attempts saw different results"
        return {step for step, effects in done.items() if len(effects) > 1}


def in_flight_at_the_end(said: list[list[Any]]) -> set[tuple[str, str]]:
    """Return the steps a process asked for and was given no answer to."""
    asked = {(words[1], words[3]) for words in said if words[0] == "asks"}
    return asked - {(words[1], words[3]) for words in said if words[0] == "sees"}


def remembered(path: Path) -> dict[tuple[str, str], Any]:
    """Return attempt and value of each step that is stored."""
    if not rows(path, "SELECT 1 FROM sqlite_schema WHERE name = 'steps'"):
        return {}
    return {(row["id"], row["name"]): (row["attempt"], json.loads(row["value"])) for row in rows(path, _DONE)}


_DONE = """SELECT id, name, steps.attempt, value FROM steps JOIN tasks USING (task_seq)
           WHERE steps.kind = 'step' AND steps.state = 'done'"""

Program = Callable[..., Coroutine[Any, Any, None]]


def die_everywhere(
    start: Callable[..., Worker], program: Program, stories: dict[str, Story], function: str, task_id: str = "{}"
) -> None:
    """Run a program that dies at the n-th pass of each place, on a file a place, for each n that there is."""
    left = set(stories)
    for number in count(1):
        if not left:
            return
        # side by side, as each waits for its disk
        workers = {
            place: start(program, str(story.path), str(story.effects), function, task_id.format(number), place, number)
            for place, story in stories.items()
            if place in left
        }
        for place, worker in workers.items():
            said = worker.join()
            stories[place].add(said)
            if worker.exit_code == 0:
                assert said[-1] == ["closed"], said[-3:]
                left.remove(place)
            else:
                assert worker.exit_code == -9, f"it ended by itself: {said[-3:]}"
                assert said[-1][:3] == ["dies", place, number], said[-3:]
                stories[place].last_words.append(said[-1][3])


@pytest.fixture
def stories(tmp_path: Path) -> Iterator[Callable[..., dict[str, Story]]]:
    """Begin a story for each of some places, the files of which must be whole at the end."""
    begun: list[Story] = []

    def begin(*places: str) -> dict[str, Story]:
        stories = {place: Story(tmp_path / f"{place}.db", tmp_path / place) for place in places}
        begun.extend(stories.values())
        return stories

    yield begin
    for story in begun:
        if story.path.exists():
            check_file(story.path)


@pytest.mark.long
def test_killed_anywhere_in_ten_steps_the_next_process_takes_again_only_the_step_in_flight(
    start: Callable[..., Worker], stories: Callable[..., dict[str, Story]]
) -> None:
    # the spawn, ten steps and the end have a commit each
    least = {"before commit": 12, "after commit": 12, "before effect": 10, "after effect": 10, "between": 11}
    places = stories(*least)
    die_everywhere(start, programs.finish_and_die, places, "ten")

    for place, story in places.items():
        twice, maybe = set(), set()
        for number, what in enumerate(story.last_words, 1):
            if place == "after effect":
                twice.add(tuple(what))
            elif "commit" in place:
                # one that takes long is noted as begun, before its effect or after
                maybe |= {(str(number), step) for _, step, state in what if state == "begun"}
                twice |= {(str(number), step) for _, step, state in what if state == "done" and "before" in place}
        found = story.check()
        assert twice <= found <= twice | maybe
        kills = len(story.last_words)
        assert kills >= least[place]
        print(f"{kills} kills {place}: {len(found)} steps took effect twice, each in flight at its kill")
        # the first spawn was not committed
        task_ids = [str(number) for number in range(1, kills + 2)][place == "before commit" :]
        lines = story.done()
        assert lines.keys() == {(task_id, step) for task_id in task_ids for step in STEPS}
        assert results(story.path) == {
            task_id: ("completed", [lines[task_id, step][-1][1] for step in STEPS]) for task_id in task_ids
        }


def results(path: Path) -> dict[str, tuple[str, Any]]:
    """Return state and result of each task."""
    tasks = rows(path, "SELECT id, state, result FROM tasks")
    return {row["id"]: (row["state"], json.loads(row["result"] or "null")) for row in tasks}


@pytest.mark.long
def test_a_task_whose_every_process_dies_a_commit_later_comes_to_its_end(
    start: Callable[..., Worker], stories: Callable[..., dict[str, Story]]
) -> None:
    places = stories("before commit", "after commit")
    die_everywhere(start, programs.open_and_die, places, "ten", task_id="t")

    for place, story in places.items():
        story.check()
        lines = story.done()
        assert lines.keys() == {("t", step) for step in STEPS}
        assert results(story.path) == {"t": ("completed", [lines["t", step][-1][1] for step in STEPS])}
        [row] = rows(story.path, "SELECT attempt FROM tasks")
        kills, effects = len(story.last_words), sum(map(len, lines.values()))
        print(f"{kills} kills {place}: {row['attempt']} attempts, {effects} effects")
        # the first lives died in opening and recovery, before there was a body
        assert row["attempt"] >= 3


def test_a_step_that_runs_at_most_once_never_runs_twice_and_is_in_doubt_once_it_was_begun(
    start: Callable[..., Worker], stories: Callable[..., dict[str, Story]]
) -> None:
    places = stories("before commit", "after commit", "before effect", "after effect")
    die_everywhere(start, programs.finish_and_die, places, "at_most_once")

    for place, story in places.items():
        in_doubt = {words[1] for said in story.lives for words in said if words[0] == "in doubt"}
        # from the commit that says it begins to the one that says it is done
        state = {"before commit": "done", "after commit": "begun"}.get(place)
        assert in_doubt == {
            str(number)
            for number, what in enumerate(story.last_words, 1)
            if state is None or ["saved", "pay", state] in what
        }
        assert len(in_doubt) == 1
        lines = story.done()
        assert [step for step, effects in lines.items() if len(effects) != 1] == []
        assert results(story.path) == {
            row["id"]: ("completed", "in doubt" if row["id"] in in_doubt else lines[row["id"], "pay"][0][1])
            for row in rows(story.path, "SELECT id FROM tasks")
        }
        happened = {task_id for task_id, _ in lines} & in_doubt
        print(
            f"{len(story.last_words)} kills {place}: in doubt {sorted(in_doubt)}, of which took effect {sorted(happened)}"
        )
        # that is the doubt
        assert happened == (in_doubt if place in {"before commit", "after effect"} else set())


async def test_a_step_noted_as_begun_is_reported_by_recovery_and_runs_again_unless_at_most_once(
    start: Callable[..., Worker], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whoever recovers here does so when it is told to, and has the report
    monkeypatch.setattr(recovery, "_LOOK", 3_600.0)
    story = Story(path, tmp_path / "effects")
    tasks = [["lingers", "long", [False]], ["lingers", "once", [True]]]
    worker = start(programs.begin_and_stay, str(story.path), str(story.effects), tasks)
    for task_id in ("long", "once"):
        await worker.says("stays", task_id)
    said: list[tuple[Any, ...]] = []
    store, _ = programs.acting(
        str(story.path), (say := lambda *words: said.append(words)), str(story.effects), programs.Death(say)
    )
    async with store:
        handles = {task_id: await store.handle("desktop:s1", task_id) for task_id in ("long", "once")}
        unseen = set(handles)
        async for event in store.events(0):
            if event.data.get("step_state") == StepState.BEGUN:
                unseen.discard(str(event.task_id))
            if not unseen:
                break
        before = {task_id: await steps_of(handle) for task_id, handle in handles.items()}
        worker.kill()

        report = await store.recover()

        assert before == {task_id: {"short": ("done", 1, 1), "long": ("begun", 1, 0)} for task_id in handles}
        assert [(step.task_seq, step.name, step.state, step.attempt) for step in report.in_flight] == [
            (handle.task_seq, "long", StepState.BEGUN, 1) for handle in handles.values()
        ]
        assert [record.id for record in report.reattached] == ["long", "once"]
        results = {task_id: await handle.result(timeout=20) for task_id, handle in handles.items()}
        after = {task_id: await steps_of(handle) for task_id, handle in handles.items()}
        assert (await store.recover()).in_flight == ()

    lines = story.done()
    assert {step: [attempt for attempt, _ in effects] for step, effects in lines.items()} == {
        ("long", "short"): [1],
        ("long", "long"): [1, 2],
        ("once", "short"): [1],
        ("once", "long"): [1],
    }
    assert results == {
        "long": [lines["long", "short"][0][1], lines["long", "long"][1][1]],
        "once": [lines["once", "short"][0][1], "it was done"],
    }
    assert after == {
        "long": {"short": ("done", 1, 1), "long": ("done", 2, 1)},
        "once": {"short": ("done", 1, 1), "long": ("begun", 1, 0), "look outside": ("done", 2, 1)},
    }
    # asked for again in the same attempt, it is in doubt as before
    assert [words[:4] for words in said if words[0] == "in doubt"] == [("in doubt", "once", 2, "StepInDoubt")]


async def test_what_the_recovery_at_open_found_can_be_asked_for_and_tells_of_the_attempt_that_died_alone(
    start: Callable[..., Worker], path: Path, tmp_path: Path
) -> None:
    story = Story(path, tmp_path / "effects")
    worker = start(programs.begin_and_stay, str(path), str(story.effects), [["lingers", "once", [True]]])
    await worker.says("stays", "once")
    worker.kill()
    store, _ = programs.acting(str(path), lambda *words: None, str(story.effects), programs.Death(lambda *words: None))

    async with store:
        first = store.recovered
        handle = await store.handle("desktop:s1", "once")
        assert await store.recover() != first
        assert store.recovered == first
        await handle.result(timeout=20)

    assert [(step.name, step.attempt) for step in first.in_flight] == [("long", 1)]
    assert [record.id for record in first.reattached] == ["once"]
    assert len(first.dead_owners) == 1
    # as if the second attempt had died behind the doubt: it was not in that step
    reborn = tmp_path / "reborn.db"
    shutil.copy(path, reborn)
    with closing(sqlite3.connect(reborn)) as connection, connection:
        connection.execute("DROP TRIGGER tasks_terminal_is_final")
        connection.execute("UPDATE tasks SET state = 'running', completed_at = NULL, result = NULL")
    async with programs.acting(
        str(reborn), lambda *words: None, str(story.effects), programs.Death(lambda *words: None)
    )[0] as again:
        assert [record.attempt for record in again.recovered.reattached] == [3]
        assert again.recovered.in_flight == ()


async def steps_of(handle: TaskHandle) -> dict[str, tuple[str, int, int]]:
    """Return state, attempt and tries of what a task remembers."""
    return {step.name: (step.state, step.attempt, step.tries) for step in await handle.steps()}
