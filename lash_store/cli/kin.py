"""
Owns who belongs to whom in a file: tasks under their parent or their session, sessions under the sub-agent that works in them.

Whatever a file says, a member has one place: it is under *one* other, or a root. A circle, which no store makes, has no root.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .phrases import SAYS
from .snapshot import Snapshot

__all__ = ["Family", "Key", "Place", "SessionNode", "TaskNode", "descend"]


class TaskNode(NamedTuple):
    """A task, as far as a tree shows it; *child_scope* is the session it works in."""

    task_seq: int
    scope: str
    id: str
    kind: str
    state: str
    attempt: int
    fraction: float | None
    created_at: str
    completed_at: str | None
    parent_seq: int | None
    child_scope: str | None
    says: str | None


class SessionNode(NamedTuple):
    """A session; *agent* is the task that works in it, the live one before the newest."""

    scope: str
    parent: str | None
    opened_at: str
    closed_at: str | None
    agent: int | None


Key = int | str
"""What names a member: a task's ``task_seq``, a session's scope."""

_TASKS = f"""
SELECT t.task_seq, t.scope, t.id, t.kind, t.state, t.attempt, t.fraction, t.created_at, t.completed_at, t.parent_seq,
  substr(t.scope, 1, instr(t.scope, ':')) || t.child_session_id, substr({SAYS}, 1, 400)
FROM tasks AS t"""
_BY_SEQ = f"{_TASKS} WHERE t.task_seq IN (SELECT value FROM json_each(:keys))"
_BY_PARENT = f"{_TASKS} WHERE t.parent_seq IN (SELECT value FROM json_each(:keys))"
_BY_SCOPE = f"""{_TASKS}
WHERE t.scope IN (SELECT value FROM json_each(:keys))
  AND (t.parent_seq IS NULL OR NOT EXISTS (SELECT 1 FROM tasks AS p WHERE p.task_seq = t.parent_seq))"""
_SESSIONS = """
SELECT s.scope, s.parent, s.opened_at, s.closed_at, (
  SELECT COALESCE(MAX(t.task_seq) FILTER (WHERE t.completed_at IS NULL), MAX(t.task_seq)) FROM tasks AS t
  WHERE t.child_session_id = s.session_id AND t.scope >= s.runtime || ':' AND t.scope < s.runtime || ';')
FROM sessions AS s ORDER BY s.session_seq"""


class Family:
    """The members that were asked for so far, and who is under whom."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.tasks: dict[int, TaskNode] = {}
        self.sessions = {row[0]: SessionNode._make(row) for row in snapshot.rows(_SESSIONS)}
        self.below: dict[Key, list[Key]] = {}
        """Of every member that was read, in the order of reading: those under it."""
        self._sessions_below: dict[Key, list[str]] = defaultdict(list)
        for session in self.sessions.values():
            above = self._above_session(session)
            if above is not None:
                self._sessions_below[above].append(session.scope)

    def load_all(self) -> list[Key]:
        """Read the whole file and return its roots: the sessions that are under nothing, and one of every circle."""
        roots: list[Key] = [scope for scope, session in self.sessions.items() if self._above_session(session) is None]
        self.load(roots)
        for scope in self.sessions:
            if scope not in self.below:
                self.load([scope])
                roots.append(scope)
        return roots

    def load_around(self, key: Key) -> Key:
        """Read what is under a member, and what it is under, of which nothing else is read; return the root of that."""
        path = [key]
        above = self.above(key)
        while above is not None and above not in path:
            path.append(above)
            above = self.above(above)
        for member, under in zip(path[:0:-1], path[-2::-1], strict=True):
            self.below[member] = [under]
        self.load([key])
        return path[-1]

    def above(self, key: Key) -> Key | None:
        """Return what a member is under."""
        if isinstance(key, str):
            return self._above_session(self.sessions[key])
        task = self._task(key)
        if task is None:
            return None
        if task.parent_seq is not None and self._task(task.parent_seq) is not None:
            return task.parent_seq
        return task.scope if task.scope in self.sessions else None

    def load(self, roots: Iterable[Key]) -> None:
        """Read all that is under some members, level by level."""
        level = [*roots]
        self._read(_BY_SEQ, [key for key in level if isinstance(key, int) and key not in self.tasks])
        while level:
            found: dict[Key, list[Key]] = defaultdict(list)
            for task in self._read(_BY_PARENT, [key for key in level if isinstance(key, int)]):
                assert task.parent_seq is not None
                found[task.parent_seq].append(task.task_seq)
            for task in self._read(_BY_SCOPE, [key for key in level if isinstance(key, str)]):
                found[task.scope].append(task.task_seq)
            self.below.update((key, []) for key in level)
            for key in level:
                under: list[Key] = [*found[key], *self._sessions_below[key]]
                self.below[key] = [member for member in under if member not in self.below]
            level = [member for key in level for member in self.below[key]]

    def is_live(self, key: Key) -> bool:
        """Say whether a member has not ended; of a session, none has work of its own."""
        return isinstance(key, int) and self.tasks[key].completed_at is None

    def _above_session(self, session: SessionNode) -> Key | None:
        return (
            session.agent if session.agent is not None else session.parent if session.parent in self.sessions else None
        )

    def _task(self, task_seq: int) -> TaskNode | None:
        if task_seq not in self.tasks:
            self._read(_BY_SEQ, [task_seq])
        return self.tasks.get(task_seq)

    def _read(self, sql: str, keys: Sequence[Key]) -> list[TaskNode]:
        if not keys:
            return []
        found = [
            TaskNode._make(row) for row in self._snapshot.rows(f"{sql} ORDER BY t.task_seq", keys=json.dumps(keys))
        ]
        self.tasks.update((task.task_seq, task) for task in found)
        return found


class Place(NamedTuple):
    """
    Where a member stands in a tree.

    *is_last* says of it, and of all it is under but the root, whether nothing of the same level follows; *left_out* is how many
    of those under it are not shown.
    """

    key: Key
    is_last: tuple[bool, ...]
    left_out: int


def descend(family: Family, roots: Sequence[Key], *, most: int, only_live: bool) -> Iterator[Place]:
    """Yield what is under each root, itself first: at most *most* under each, those with live work before the newest."""
    lives: set[Key] = set()
    for key, under in reversed(family.below.items()):
        if family.is_live(key) or any(member in lives for member in under):
            lives.add(key)
    left = [Place(root, (), 0) for root in reversed(roots)]
    while left:
        key, is_last, _ = left.pop()
        under = [member for member in family.below[key] if member in lives or not only_live]
        chosen = under
        if len(under) > most:
            ranks = {member: (member not in lives, -place) for place, member in enumerate(under)}
            wanted = {*sorted(under, key=ranks.__getitem__)[:most]}
            chosen = [member for member in under if member in wanted]
        left_out = len(under) - len(chosen)
        yield Place(key, is_last, left_out)
        ends = [False] * len(chosen)
        if ends and not left_out:
            ends[-1] = True
        left += [Place(member, (*is_last, end), 0) for member, end in zip(chosen, ends, strict=True)][::-1]
