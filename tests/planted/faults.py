"""The faults: each a mistake somebody might make, as a change of the text of one file or more."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAULTS", "Edit", "Fault"]


class Edit(NamedTuple):
    """Text of a file, which stands in it once, and what takes its place."""

    path: str
    old: str
    new: str


class Fault(NamedTuple):
    """A fault: its name, and what makes it."""

    name: str
    edits: tuple[Edit, ...]


FAULTS: tuple[Fault, ...] = (
    Fault(
        "the attempt is dropped from the WHERE, and from the fence",
        (
            Edit("lash_store/queries.py", '            tasks.c.attempt == bindparam("new_seen_attempt"),\n', ""),
            Edit(
                "lash_store/lifecycle.py",
                "    if fence is not None and fence != (task.attempt, task.owner_id):\n        return _STALE\n",
                "",
            ),
        ),
    ),
    Fault(
        "acknowledged before the commit, which comes with the next batch",
        (
            Edit(
                "lash_store/commit.py",
                '            tx.connection.execute("COMMIT").fetchall()\n',
                '            if not wrote:\n                tx.connection.execute("COMMIT").fetchall()\n',
            ),
            Edit(
                "lash_store/commit.py",
                "        deadline = time.monotonic() + patience\n        while True:\n",
                "        deadline = time.monotonic() + patience\n"
                "        if self._raw.in_transaction:\n"
                '            self._raw.execute("COMMIT").fetchall()\n'
                "        while True:\n",
            ),
        ),
    ),
    Fault(
        "no savepoint around a unit of a batch",
        (
            Edit("lash_store/commit.py", '            raw.execute("SAVEPOINT unit").fetchall()\n', ""),
            Edit(
                "lash_store/commit.py",
                '            result = unit(tx)\n            raw.execute("RELEASE unit").fetchall()\n',
                "            result = unit(tx)\n",
            ),
            Edit(
                "lash_store/commit.py",
                '                raw.execute("ROLLBACK TO unit").fetchall()\n'
                '                raw.execute("RELEASE unit").fetchall()\n',
                "                pass\n",
            ),
        ),
    ),
    Fault(
        "synchronous=NORMAL where FULL was asked for",
        (Edit("lash_store/database.py", '2 if durability == "full" else 1', "1"),),
    ),
    Fault(
        "a live owner is taken for a dead one",
        (Edit("lash_store/guards.py", "        return True\n    finally:\n", "        return False\n    finally:\n"),),
    ),
    Fault(
        "cancelled is written at once, while the body runs on",
        (
            Edit(
                "lash_store/transitions.py",
                "    if outcome.verdict is Verdict.APPLIED and outcome.task.is_external and not outcome.task.has_callback:\n",
                "    if outcome.verdict is Verdict.APPLIED and outcome.task.state == TaskState.CANCEL_REQUESTED:\n",
            ),
        ),
    ),
    Fault(
        "an end may follow an end",
        (
            Edit(
                "lash_store/lifecycle.py",
                "    if task.completed_at is not None:\n        return _already_ended(task, command)\n",
                "",
            ),
            Edit(
                "lash_store/lifecycle.py",
                "    if fence is not None and not task.is_executing and not task.is_external:\n        return _STALE\n",
                "",
            ),
        ),
    ),
    Fault(
        "a reattached body keeps its attempt",
        (
            Edit(
                "lash_store/lifecycle.py",
                '                    "attempt": task.attempt + 1,\n',
                '                    "attempt": task.attempt + (not reattach or not task.attempt),\n',
            ),
        ),
    ),
    Fault(
        "recovery leaves what a dead owner was asked to cancel",
        (
            Edit(
                "lash_store/recovery.py",
                "            transitions.end_cancelled(tx, task)\n        else:\n",
                "            return None\n        else:\n",
            ),
        ),
    ),
    Fault(
        "a transfer moves the row and not its handle",
        (Edit("lash_store/handover.py", "    session_queries.move_handle(tx, task.task_seq, str(destination))\n", ""),),
    ),
    Fault(
        "a handoff forgets to cancel the rest",
        (
            Edit(
                "lash_store/handover.py",
                "    cancelled = _cancel_rest(tx, source, moved, by)\n",
                "    cancelled: list[Task] = []\n",
            ),
        ),
    ),
    Fault(
        "the note of an end is left out when the body failed",
        (
            Edit(
                "lash_store/transitions.py",
                "                if after.notify_on_end:\n",
                "                if after.notify_on_end and after.failure is None:\n",
            ),
        ),
    ),
    Fault(
        "nobody looks whether the file is still in its place",
        (
            Edit(
                "lash_store/commit.py",
                "        guards.check_same(self._name, self._identity)\n        for name, identity in self._beside:\n",
                "        for name, identity in ():\n",
            ),
        ),
    ),
    Fault(
        "no lock against stray closes",
        (Edit("lash_store/guards.py", "                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)\n", ""),),
    ),
    Fault(
        "a failed COMMIT is taken for one that came to nothing",
        (
            Edit(
                "lash_store/commit.py",
                "return self._ask_the_file(tx, error) if wrote else self._not_applied(error)",
                "return self._not_applied(error)",
            ),
        ),
    ),
    Fault(
        "an upgrade is one transaction a statement",
        (
            Edit(
                "lash_store/migrate.py",
                '            raw.execute("BEGIN IMMEDIATE")\n',
                '            raw.execute("SELECT 1")\n',
            ),
            Edit(
                "lash_store/migrate.py",
                '            yield connection\n        raw.execute("COMMIT").fetchall()\n',
                "            yield connection\n",
            ),
        ),
    ),
    Fault(
        "the change feed forgets the first event of a page",
        (
            Edit(
                "lash_store/queries.py",
                '    "after": events.c.seq > bindparam("after"),\n',
                '    "after": events.c.seq > bindparam("after") + 1,\n',
            ),
        ),
    ),
    Fault(
        "a session that is closed takes work",
        (
            Edit(
                "lash_store/transitions.py",
                "    if row.closed_at is not None:\n        raise session_closed(scope)\n    return row\n",
                "    return row\n",
            ),
        ),
    ),
)
