"""
Owns the units by which a session is opened and closed, and by which its work is seen, handed over, and let go.

Each is all or nothing: one function of an open transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import births, families, monitoring, queries, session_queries, transitions
from .commands import Move
from .errors import HandleNotVisible, IdempotencyConflict, SessionError, TransferConflict
from .lifecycle import Task
from .models import ClosePolicy, EventType, HandleRole, Scope, TaskMode, TaskState
from .session_queries import HandleRow, HandoffRow
from .transaction import Transaction

__all__ = ["cancel_unreferenced", "close_session", "handoff", "observe", "open_session", "transfer", "visible"]


# --- sessions -------------------------------------------------------------------------------------------------------


def open_session(tx: Transaction, scope: Scope, parent: Scope | None, *, reopen: bool) -> bool:
    """
    Create a session unless the file has it; open one that was closed again if that is asked for. Say whether it begins here.

    Raises:
        UnknownSession: the file does not have the parent.
        SessionError: the session has another parent.
    """
    if parent is not None and session_queries.session(tx, str(parent)) is None:
        raise transitions.unknown_session(parent)
    row = session_queries.session(tx, str(scope))
    if row is None:
        session_queries.insert_session(tx, scope, None if parent is None else str(parent))
        data = {} if parent is None else {"parent": str(parent)}
        queries.insert_event(tx, EventType.SESSION_OPENED, scope=str(scope), data=json.dumps(data))
        return True
    if parent is not None and row.parent != str(parent):
        if row.parent is not None:
            raise SessionError(f"session {str(scope)!r} has the parent {row.parent!r}: it cannot have another")
        _refuse_circle(tx, scope, parent)
        session_queries.set_parent(tx, str(scope), str(parent))
    if reopen and row.closed_at is not None:
        session_queries.reopen_session(tx, str(scope))
        queries.insert_event(tx, EventType.SESSION_OPENED, scope=str(scope), data='{"reopened":true}')
        return True
    return False


def _refuse_circle(tx: Transaction, scope: Scope, parent: Scope) -> None:
    above: str | None = str(parent)
    while above is not None:
        if above == str(scope):
            raise SessionError(f"session {str(scope)!r} stands above {str(parent)!r}: it cannot be its child as well")
        row = session_queries.session(tx, above)
        above = None if row is None else row.parent


@dataclass(frozen=True, slots=True)
class Closed:
    """What became of a session's live tasks when it closed."""

    closed_at: str
    successor: str | None
    kept: Sequence[Task] = ()
    cancelled: Sequence[Task] = ()
    moved: Sequence[Task] = ()


def close_session(tx: Transaction, scope: Scope, successor: Scope | None, by: str) -> Closed:
    """
    Close a session: each live task is kept, cancelled or transferred, as its policy says; hidden ones are cancelled.

    Closing again changes nothing, and tells what is live still.

    Raises:
        UnknownSession, SessionClosed, SessionError: no usable destination for what is to be transferred; nothing changed.
        TransferConflict: a task's id is live at the destination.
    """
    row = session_queries.session(tx, str(scope))
    if row is None:
        raise transitions.unknown_session(scope)
    if row.closed_at is not None:
        left = session_queries.live_tasks_of_session(tx, str(scope))
        ending_still = [task for task in left if task.state == TaskState.CANCEL_REQUESTED]
        return Closed(row.closed_at, None, [task for task in left if task not in ending_still], ending_still)
    if successor is not None:
        _check_destination(tx, scope, successor)
    live = session_queries.live_tasks_of_session(tx, str(scope))
    ending = {task.task_seq for task in live if task.close_policy == ClosePolicy.CANCEL or task.mode == TaskMode.HIDDEN}
    going = [task for task in live if task.close_policy == ClosePolicy.TRANSFER and task.task_seq not in ending]
    destination = successor
    if going and destination is None:
        if row.parent is None:
            raise SessionError(
                f"session {str(scope)!r} has tasks to transfer, {going[0].id!r} first, and neither a successor nor a parent: "
                "give close() a successor; nothing was changed"
            )
        destination = Scope.parse(row.parent)
        _check_destination(tx, scope, destination)
    moved = _move_all(tx, scope, destination, going, ending) if destination is not None and going else []
    stopping = [task for task in live if task.task_seq in ending]
    spared = _covered(tx, moved) | moved_away(tx, scope, stopping)
    cancelled = _cancel_all(tx, stopping, "session closed", by, spared, stays_armed=True)
    session_queries.set_closed(tx, str(scope))
    gone = {task.task_seq for task in (*moved, *cancelled)}
    kept = [task for task in live if task.task_seq not in gone]
    told = {"kept": _seqs(kept), "cancelled": _seqs(cancelled), "transferred": _seqs(moved)}
    if moved:
        told["destination"] = str(destination)
    queries.insert_event(tx, EventType.SESSION_CLOSED, scope=str(scope), data=json.dumps(told))
    return Closed(tx.now, str(destination) if destination is not None else None, kept, cancelled, moved)


def _seqs(tasks: Iterable[Task]) -> object:
    return [task.task_seq for task in tasks]


# --- seeing ---------------------------------------------------------------------------------------------------------


class Visible(NamedTuple):
    """A task that a session sees, and the handle it sees it through."""

    task: Task
    handle: HandleRow


def visible(
    tx: Transaction, scope: Scope, references: Sequence[str], *, owned: bool = False, read_too: bool = False
) -> list[Visible]:
    """
    Return what a session's references name, each once: live tasks, and finished ones whose outcome was not read.

    A reference is a handle's id or a task's id. With *owned*, observers' handles do not count; with *read_too*, finished tasks
    do whose outcome was read.

    Raises:
        HandleNotVisible: all that cannot be seen, named.
    """
    if session_queries.session(tx, str(scope)) is None:
        raise transitions.unknown_session(scope)
    found: dict[str, Visible] = {}
    missing: list[str] = []
    for reference in references:
        seen = look_up(tx, scope, reference)
        if seen is None or not _counts(seen, owned=owned, read_too=read_too):
            missing.append(reference)
        else:
            found.setdefault(seen.handle.handle_id, seen)
    if missing:
        named = ", ".join(map(repr, missing))
        raise HandleNotVisible(
            f"session {str(scope)!r} does not see {named}: unknown, another session's, or finished and read; nothing was changed",
            missing=tuple(missing),
        )
    return list(found.values())


def _counts(seen: Visible, *, owned: bool, read_too: bool) -> bool:
    if owned and seen.handle.role != HandleRole.OWNER:
        return False
    return read_too or not seen.task.is_terminal or seen.handle.read_at is None


def look_up(tx: Transaction, scope: Scope, reference: str) -> Visible | None:
    """Return what a handle's id or a task's id names in a session, if it names anything; an id, its newest incarnation."""
    if reference.startswith("h-"):
        handle = session_queries.handle_by_id(tx, reference)
        if handle is None or handle.scope != str(scope):
            return None
        return Visible(transitions.by_seq(tx, handle.task_seq), handle)
    task = queries.task_by_id(tx, str(scope), reference)
    if task is not None and task.is_terminal and transitions.newest_left(tx, scope, reference, task) is not None:
        return None
    return None if task is None else Visible(task, session_queries.owner_handle(tx, task.task_seq))


def observe(tx: Transaction, scope: Scope, of: Scope, task_id: str, handle_id: str) -> tuple[Task, str]:
    """
    Give a session a handle through which it may look at a task of any session, and wait; the same one when asked again.

    Raises:
        TaskNotFound, UnknownSession, SessionClosed: there is nothing to look at, or nobody to look.
    """
    seen = look_up(tx, of, task_id)
    task = transitions.find(tx, of, task_id) if seen is None else seen.task
    transitions.open_session_row(tx, scope)
    handle = session_queries.observers_handle(tx, str(scope), task.task_seq)
    if handle is not None:
        return task, handle.handle_id
    session_queries.insert_handle(tx, handle_id, str(scope), task.task_seq, HandleRole.OBSERVER)
    return task, handle_id


# --- handing over ---------------------------------------------------------------------------------------------------


def transfer(tx: Transaction, source: Scope, destination: Scope, references: Sequence[str]) -> list[Task]:
    """
    Put tasks into another session of their runtime, with their handles, live descendants and unread notes.

    The named ones come back first. Into the same session there is nothing to do.

    Raises:
        HandleNotVisible: an unknown or foreign id; none was moved.
        UnknownSession, SessionClosed, SessionError: the destination cannot have them.
        TransferConflict: an id is live at the destination.
    """
    return _transfer(tx, source, destination, [seen.task for seen in visible(tx, source, references, owned=True)])


def _transfer(tx: Transaction, source: Scope, destination: Scope, chosen: list[Task]) -> list[Task]:
    if source == destination:
        return chosen
    _check_destination(tx, source, destination)
    return _move_all(tx, source, destination, chosen)


def _check_destination(tx: Transaction, source: Scope, destination: Scope) -> None:
    transitions.open_session_row(tx, destination)
    if destination.runtime != source.runtime:
        raise SessionError(f"session {str(destination)!r} is of another runtime: work stays within {source.runtime!r}")
    if destination == source:
        raise SessionError(f"session {str(source)!r} cannot be its own successor: name another")


def _move_all(
    tx: Transaction, source: Scope, destination: Scope, chosen: Sequence[Task], but: Collection[int] = frozenset()
) -> list[Task]:
    going = {task.task_seq: task for task in chosen}
    for below in families.live_descendants(tx, *going):
        if below.scope == str(source) and below.task_seq not in but:
            going[below.task_seq] = below
    for task in going.values():
        if queries.live_task_by_id(tx, str(destination), task.id) is not None:
            raise TransferConflict(
                f"task {task.id!r} is live in session {str(destination)!r}: await or cancel it first; nothing was changed"
            )
    moved = [_move(tx, task, destination) for task in going.values()]
    if moved:
        births.check_room(tx, str(destination))
        if any(task.is_monitor for task in moved):
            monitoring.check_room(tx, str(destination))
    return moved


def _move(tx: Transaction, task: Task, destination: Scope) -> Task:
    session_queries.move_handle(tx, task.task_seq, str(destination))
    session_queries.move_notes(tx, task, str(destination))
    if task.is_monitor:
        monitoring.move(tx, task, str(destination))
    if task.mode == TaskMode.HIDDEN:
        session_queries.flag_sync(tx, str(destination), needed=True)
    return transitions.transition(tx, task, Move(str(destination))).task


def cancel_unreferenced(tx: Transaction, scope: Scope, references: Sequence[str], by: str) -> list[Task]:
    """
    Ask for the end of every listed live task of a session that the references, and what descends from them, do not cover.

    Hidden work is not touched.

    Raises:
        HandleNotVisible: an unknown or foreign id; nothing was cancelled.
    """
    kept = [seen.task for seen in visible(tx, scope, references, read_too=True)]
    return _cancel_rest(tx, scope, kept, by)


def _cancel_rest(tx: Transaction, scope: Scope, kept: Sequence[Task], by: str) -> list[Task]:
    live = session_queries.live_tasks_of_session(tx, str(scope))
    hidden = {task.task_seq for task in live if task.mode == TaskMode.HIDDEN}
    spared = _covered(tx, kept) | hidden
    ending = [task for task in live if task.task_seq not in spared]
    return _cancel_all(tx, ending, "unreferenced", by, spared | moved_away(tx, scope, ending))


def _covered(tx: Transaction, tasks: Iterable[Task]) -> set[int]:
    """Return these tasks and all live ones below them."""
    found = {task.task_seq for task in tasks}
    return found | {below.task_seq for below in families.live_descendants(tx, *found)}


def moved_away(tx: Transaction, scope: Scope, tasks: Sequence[Task]) -> set[int]:
    """
    Return what descends from tasks of a session and was given to another since, with all below it: that one may end it.

    Not so what was given to a session that one of these works in: that ends with it.
    """
    below = families.live_descendants(tx, *(task.task_seq for task in tasks))
    ending = {
        f"{scope.runtime}:{task.child_session_id}" for task in (*tasks, *below) if task.child_session_id is not None
    }
    gone = [
        task
        for task in below
        if task.scope not in {str(scope), *ending} and queries.was_moved(tx, task.task_seq, str(scope))
    ]
    if not gone:
        return set()
    return _covered(tx, gone) - {task.task_seq for task in below if task.scope in ending}


def _cancel_all(
    tx: Transaction,
    tasks: Iterable[Task],
    reason: str,
    by: str,
    spared: Collection[int],
    *,
    stays_armed: bool = False,
) -> list[Task]:
    """Request the cancel of tasks, which may be descendants of one another; return all that it reached, as they stand."""
    reached: dict[int, Task] = {}
    for task in tasks:
        current = transitions.by_seq(tx, task.task_seq)
        for outcome in transitions.request_cancel(tx, current, reason, by, spared, stays_armed=stays_armed):
            reached[outcome.task.task_seq] = outcome.task
    return [reached[seq] for seq in sorted(reached)]


def handoff(
    tx: Transaction,
    source: Scope,
    destination: Scope,
    references: Sequence[str],
    given_id: str | None,
    new_id: str,
    by: str,
) -> HandoffRow:
    """
    Validate, transfer what is kept, and ask for the end of the rest; asked for again, return what was done.

    Raises:
        IdempotencyConflict: the id, or without one the pair of sessions, was used for something else.
        HandleNotVisible, UnknownSession, SessionClosed, SessionError, TransferConflict: see `transfer`.
    """
    before = (
        session_queries.handoff_between(tx, str(source), str(destination))
        if given_id is None
        else session_queries.handoff_by_id(tx, str(source), given_id)
    )
    if before is not None:
        if before.destination != str(destination) or not _keeps_the_same(before, references):
            raise IdempotencyConflict(
                f"handoff {before.handoff_id!r} from {before.source!r} to {before.destination!r} kept something else: "
                "give this one an id= of its own",
                task_id=before.handoff_id,
            )
        if given_id is None and source != destination and _is_another(tx, before, references):
            raise IdempotencyConflict(
                f"{before.source!r} handed work to {before.destination!r} before, and has some of these again: "
                "give this handoff an id= of its own",
                task_id=before.handoff_id,
            )
        return before
    if session_queries.session(tx, str(source)) is None:
        raise transitions.unknown_session(source)
    chosen = visible(tx, source, references, owned=True)
    kept = [[seen.task.task_seq, _named(tx, source, seen.task), seen.handle.handle_id] for seen in chosen]
    moved = _transfer(tx, source, destination, [seen.task for seen in chosen])
    cancelled = _cancel_rest(tx, source, moved, by)
    row = HandoffRow(
        handoff_id=given_id or new_id,
        is_named=int(given_id is not None),
        source=str(source),
        destination=str(destination),
        kept=json.dumps(kept),
        moved=_records(moved),
        cancelled=_records(cancelled),
        at=tx.now,
    )
    session_queries.insert_handoff(tx, row)
    told = {"handoff_id": row.handoff_id, "moved": _seqs(moved), "cancelled": _seqs(cancelled)}
    queries.insert_event(
        tx, EventType.HANDED_OFF, scope=str(destination), from_scope=str(source), data=json.dumps(told)
    )
    return row


def _records(tasks: Iterable[Task]) -> str:
    return json.dumps([queries.task_record(task).model_dump(mode="json") for task in tasks])


def _named(tx: Transaction, scope: Scope, task: Task) -> str | None:
    """Return a task's id if that names it, and no other incarnation."""
    named = queries.task_by_id(tx, str(scope), task.id)
    return task.id if named is not None and named.task_seq == task.task_seq else None


def _is_another(tx: Transaction, before: HandoffRow, references: Sequence[str]) -> bool:
    """Whether work is to be handed over that the session has now: come back, or another task of the same id."""
    source = Scope.parse(before.source)
    named = [seen.task for seen in (look_up(tx, source, one) for one in references) if seen is not None]
    kept = [queries.task_by_seq(tx, task_seq) for task_seq, _, _ in _kept(before)]
    return any(task is not None and not task.is_terminal and task.scope == before.source for task in (*named, *kept))


def _kept(before: HandoffRow) -> list[tuple[int, str | None, str]]:
    with queries.readable(f"handoff {before.handoff_id!r}"):
        return [(task_seq, task_id, handle_id) for task_seq, task_id, handle_id in json.loads(before.kept)]


def _keeps_the_same(before: HandoffRow, references: Sequence[str]) -> bool:
    by_name: dict[str, int] = {}
    for task_seq, task_id, handle_id in _kept(before):
        by_name[handle_id] = task_seq
        if task_id is not None:
            by_name[task_id] = task_seq
    named = {by_name.get(reference) for reference in references}
    return named == set(by_name.values())
