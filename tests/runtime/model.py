"""
A reference model of the contract in plain Python: what a store's file must hold after each request, one owner at a time.

It is written from the contract, not from the code, and keeps no transaction and no coroutine, and of time no more than the hours
by which the wall clock was set: a request is one method, which changes everything that the request, the bodies that react to it
and the starts that follow from it change, or raises `Refused` and changes nothing.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

TERMINAL = ("completed", "failed", "cancelled", "abandoned")

RETRY_AFTER = 0.5
"""Hours."""

BEGUN = "started or reattached"
"""The event of a start for which the contract leaves the word open: that of claimed work whose turn has come."""


class Refused(Exception):
    """A request that raises one of the errors of these names, and changes nothing."""

    def __init__(self, *errors: str) -> None:
        super().__init__(*sorted(errors))
        self.errors = frozenset(errors)


class ById(NamedTuple):
    """The live task of an id in a session, else the newest."""

    id: str


class ByHandle(NamedTuple):
    """A handle, by the order in which handles were made, from 0; in one of the forms in which it can be given."""

    handle: int
    form: str = "id"


Ref = ById | ByHandle


class Happened(NamedTuple):
    """An event of a task."""

    type: str
    scope: str
    attempt: int
    from_scope: str | None = None


@dataclass
class Task:
    """One incarnation. *how* says what its body does when it is asked or made to stop; *called* what its callback does."""

    seq: int
    scope: str
    id: str
    mode: str
    recovery: str
    state: str = "pending"
    kind: str = "other"
    function: bool = True
    how: str = "stop"
    policy: str = "cooperative"
    max_attempts: int = 1
    attempt: int = 0
    spent: int = 0
    owner: int | None = None
    parent: int | None = None
    child: str | None = None
    close_policy: str = "keep"
    key: str | None = None
    notify: bool = False
    reason: str | None = None
    asked: bool = False
    progress: str | None = None
    fraction: float | None = None
    result: Any = None
    failure: str | None = None
    has_callback: bool = False
    called: str | None = None
    begun: bool = False
    retries: bool = False
    deadline: float | None = None
    not_before: float | None = None
    callback_failed: bool = False
    left: set[str] = field(default_factory=set)
    events: list[Happened] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return self.state not in TERMINAL

    @property
    def external(self) -> bool:
        return self.mode == "external"

    @property
    def executing(self) -> bool:
        return not self.external and self.state in ("running", "waiting", "cancel_requested")

    @property
    def may_rerun(self) -> bool:
        return self.function and (self.recovery == "rerun" or self.attempt == 0)


@dataclass
class Session:
    """*passed* are the sub-agents that had ended, or been asked to, when it was last opened again."""

    parent: str | None = None
    closed: bool = False
    sync: bool = False
    passed: set[int] = field(default_factory=set)


@dataclass
class Handle:
    scope: str
    seq: int
    role: str = "owner"
    read: bool = False


@dataclass
class Note:
    scope: str
    key: str
    acknowledged: bool = False


@dataclass
class Handoff:
    source: str
    destination: str
    id: str | None
    names: dict[Any, int]
    moved: list[int]
    cancelled: set[int]


@dataclass
class State:
    """What is in the file; and of the owner that has it open, which bodies run, and which tasks wait for a slot or their time."""

    tasks: list[Task] = field(default_factory=list)
    sessions: dict[str, Session] = field(default_factory=dict)
    handles: list[Handle] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)
    session_events: list[tuple[str, str, str | None]] = field(default_factory=list)
    owner: int = 0
    bodies: set[int] = field(default_factory=set)
    queue: deque[int] = field(default_factory=deque)
    claimed: set[int] = field(default_factory=set)
    early: list[int] = field(default_factory=list)
    knows: bool = True
    now: float = 0.0


def request(method: Callable[Concatenate[Model, P], T]) -> Callable[Concatenate[Model, P], T]:
    """Make a method all or nothing, and follow it with what bodies and free slots make of it."""

    @wraps(method)
    def whole(self: Model, /, *args: P.args, **kwargs: P.kwargs) -> T:
        before = pickle.dumps(self.state, pickle.HIGHEST_PROTOCOL)
        try:
            answer = method(self, *args, **kwargs)
        except Refused:
            self.state = pickle.loads(before)
            raise
        self._react()
        return answer

    return whole


class Model:
    """What the contract says of a file that *owner* has open, whose bodies run *max_running* at once."""

    def __init__(self, *, owner: int, max_running: int) -> None:
        self.state = State(owner=owner)
        self._max_running = max_running

    # --- seeing ---

    def task(self, seq: int) -> Task:
        return self.state.tasks[seq - 1]

    def live(self, scope: str | None = None) -> list[Task]:
        return [task for task in self.state.tasks if task.live and scope in (None, task.scope)]

    def named(self, scope: str, task_id: str) -> Task | None:
        """The live task of an id, else the newest."""
        found = [task for task in self.state.tasks if (task.scope, task.id) == (scope, task_id)]
        return next((task for task in found if task.live), found[-1] if found else None)

    def owner_handle(self, seq: int) -> int:
        return next(n for n, one in enumerate(self.state.handles) if one.seq == seq and one.role == "owner")

    def look_up(self, scope: str, ref: Ref) -> tuple[Task, int] | None:
        """The task that a reference names in a session, and the handle it is seen through."""
        if isinstance(ref, ByHandle):
            handle = self.state.handles[ref.handle]
            return (self.task(handle.seq), ref.handle) if handle.scope == scope else None
        task = self.named(scope, ref.id)
        return None if task is None else (task, self.owner_handle(task.seq))

    def _steered(self, scope: str, ref: Ref) -> Task:
        seen = self.look_up(scope, ref)
        if seen is None:
            raise Refused("TaskNotFound")
        if self.state.handles[seen[1]].role != "owner":
            raise Refused("HandleNotVisible")
        return seen[0]

    def _visible(self, scope: str, refs: Iterable[Ref], *, owned: bool, read_too: bool) -> list[Task]:
        found: dict[int, Task] = {}
        for ref in refs:
            seen = self.look_up(scope, ref)
            if seen is None:
                raise Refused("HandleNotVisible")
            task, number = seen
            handle = self.state.handles[number]
            if (owned and handle.role != "owner") or not (read_too or task.live or not handle.read):
                raise Refused("HandleNotVisible")
            found.setdefault(task.seq, task)
        return list(found.values())

    def validate(self, scope: str, refs: Sequence[Ref]) -> list[int]:
        return [task.seq for task in self._visible(scope, refs, owned=False, read_too=False)]

    # --- families ---

    def descendants(self, *roots: Task) -> list[Task]:
        """Children by parent, and every task in the session that one of them works in, at any depth; the roots left out."""
        found: dict[int, Task] = {}
        to_visit = list(roots)
        while to_visit:
            above = to_visit.pop()
            for task in self.state.tasks:
                # a finished one is a link like any other: what it left behind goes on below the same ancestors
                if task.seq not in found and (task.parent == above.seq or above.child == task.scope):
                    found[task.seq] = task
                    to_visit.append(task)
        own = {task.seq for task in roots}
        return [found[seq] for seq in sorted(found) if seq not in own]

    def _covered(self, tasks: Sequence[Task]) -> set[int]:
        return {task.seq for task in (*tasks, *self.descendants(*tasks))}

    def _cancelled_above(self, parent: Task | None, scope: str) -> Task | None:
        """
        The nearest ancestor, by parent or by the session, whose cancel was requested, ended since or not.

        A live one that was not asked was spared, and what is born below it in its session is, too: a parent before all others.
        """
        above = [parent, self._agent(scope)]
        if parent is not None and self._is_spared(parent):
            above = [] if parent.scope == scope else [self._agent(scope)]
        seen: set[int] = set()
        while above:
            task = above.pop(0)
            if task is None or task.seq in seen:
                continue
            seen.add(task.seq)
            if task.state in ("cancel_requested", "cancelled") and task.asked:
                return task
            if not task.live:
                above += [None if task.parent is None else self.task(task.parent), self._agent(task.scope)]
        return None

    def _agent(self, scope: str) -> Task | None:
        """Who speaks for those that work through a session since it was opened: one that goes on, else the newest."""
        session = self.state.sessions[scope]
        agents = [task for task in reversed(self.state.tasks) if task.child == scope and task.seq not in session.passed]
        return max(agents, key=lambda task: (self._is_spared(task), task.live, task.seq), default=None)

    @staticmethod
    def _is_spared(task: Task) -> bool:
        return task.live and task.state != "cancel_requested"

    # --- being born ---

    @request
    def open_session(self, scope: str, parent: str | None = None, *, reopen: bool = False) -> None:
        session = self.state.sessions.get(scope)
        if session is None:
            self.state.sessions[scope] = Session(parent)
        elif reopen and session.closed:
            session.closed = False
            agents = [task for task in self.state.tasks if task.child == scope]
            session.passed = {task.seq for task in agents if not self._is_spared(task)}
        else:
            return
        self.state.session_events.append(("session_opened", scope, None))

    @request
    def spawn(self, scope: str, task_id: str, parent: Ref | None, inside: int | None = None, **columns: Any) -> Task:
        """Managed or hidden work; *inside* is the body that spawns hidden work."""
        above, errors = self._parent(scope, parent)
        above = above if inside is None else self.task(inside)
        if columns["function"] and not self.state.knows:
            errors.add("UnknownFunction")
        return self._create(Task(0, scope, task_id, **columns), above, errors)

    @request
    def register(self, scope: str, task_id: str, parent: Ref | None = None, **columns: Any) -> tuple[Task, bool]:
        """External work; and whether the callback that was given is now the one that will be called."""
        new = Task(0, scope, task_id, "external", "external", state="running", **columns)
        before = None
        if new.key is not None:
            keyed = [task for task in self.state.tasks if (task.scope, task.key) == (scope, new.key)]
            before = keyed[-1] if keyed else None
        above, errors = self._parent(scope, parent)
        if before is not None and (before.id, before.kind) != (task_id, new.kind):
            raise Refused("IdempotencyConflict", *errors)
        if before is not None and not before.live:
            if errors:
                raise Refused(*errors)
            return before, False
        live = before or next((task for task in self.live(scope) if task.id == task_id), None)
        if live is None:
            return self._create(new, above, errors), new.has_callback
        if errors:
            raise Refused("TaskExists", *errors)
        repeated = before is not None and live.owner == self.state.owner and not new.has_callback
        mine = live.owner == self.state.owner
        unkept = not repeated and (live.owner is None or (mine and not live.has_callback))
        if live.external and live.kind == new.kind and unkept:
            if new.child not in (None, live.child) and self.state.sessions[new.child].closed:
                raise Refused("SessionClosed")
            live.owner, live.has_callback, live.called = self.state.owner, new.has_callback, new.called
            # what is said anew counts from now on
            live.close_policy = live.close_policy if new.close_policy == "keep" else new.close_policy
            live.notify, live.key, live.child = live.notify or new.notify, new.key or live.key, new.child or live.child
            self._happened(live, "reattached")
            if live.state == "cancel_requested" and not live.has_callback:
                self._end(live, "cancelled")
            return live, new.has_callback
        if before is None:
            raise Refused("TaskExists")
        return before, False

    def _parent(self, scope: str, ref: Ref | None) -> tuple[Task | None, set[str]]:
        """The parent that is named, and what is wrong with it; a handle that is held may be of any session."""
        if ref is None:
            return None, set()
        if isinstance(ref, ByHandle) and ref.form == "object":
            return self.task(self.state.handles[ref.handle].seq), set()
        seen = self.look_up(scope, ref)
        return (None, {"TaskNotFound"}) if seen is None else (seen[0], set())

    def _create(self, new: Task, parent: Task | None, errors: set[str]) -> Task:
        errors = set(errors)
        if any(task.id == new.id for task in self.live(new.scope)):
            errors.add("TaskExists")
        session = self.state.sessions[new.scope]
        may_bear = parent is not None and parent.live and parent.scope == new.scope
        if session.closed and not may_bear:
            errors.add("SessionClosed")
        if new.child is not None and self.state.sessions[new.child].closed:
            errors.add("SessionClosed")
        if errors:
            raise Refused(*errors)
        cancelled = self._cancelled_above(parent, new.scope)
        new.seq = len(self.state.tasks) + 1
        new.parent = None if parent is None else parent.seq
        new.owner = self.state.owner
        self.state.tasks.append(new)
        self.state.handles.append(Handle(new.scope, new.seq))
        if new.mode == "hidden":
            session.sync = True
        self._happened(new, "registered")
        if cancelled is not None:
            new.reason = cancelled.reason
            new.asked = True
            self._end(new, "cancelled")
        elif not new.external:
            self.state.queue.append(new.seq)
        return new

    # --- what somebody says of work ---

    @request
    def complete(self, scope: str, ref: Ref, state: str) -> str:
        """End external work; the verdict."""
        task = self._external(scope, ref)
        outcome = {"completed": {"result": "done"}, "failed": {"failure": "Failed"}, "cancelled": {}}[state]
        if not task.live:
            same = task.state == state and all(getattr(task, name) == value for name, value in outcome.items())
            return "unchanged" if same else "superseded"
        self._end(task, state, **outcome)
        return "applied"

    @request
    def unregister(self, scope: str, ref: Ref) -> None:
        seen = self.look_up(scope, ref)
        if seen is None or not seen[0].live:
            return
        task = self._external(scope, ref)
        # whoever asked for its cancel before keeps the word
        self._end(task, "cancelled", reason=task.reason if task.state == "cancel_requested" else "unregistered")

    @request
    def flip(self, scope: str, ref: Ref, state: str) -> str:
        task = self._external(scope, ref)
        if not task.live or task.state == "cancel_requested":
            return "superseded"
        if task.state == state:
            return "unchanged"
        task.state = state
        self._happened(task, "state_changed")
        return "applied"

    def _external(self, scope: str, ref: Ref) -> Task:
        task = self._steered(scope, ref)
        if not task.external:
            raise Refused("TaskError")
        return task

    @request
    def update(self, scope: str, ref: Ref, progress: str | None, fraction: float | None) -> str:
        task = self._steered(scope, ref)
        if not task.live:
            return "superseded"
        if progress is None and fraction is None:
            return "unchanged"
        task.progress = task.progress if progress is None else progress
        task.fraction = task.fraction if fraction is None else fraction
        self._happened(task, "progress")
        return "applied"

    @request
    def finish(self, seq: int, word: str) -> None:
        """A body ends: it returns, fails, dies of what is no Exception, or raises a CancelledError of its own."""
        self._finish(self.task(seq), word)

    def _finish(self, task: Task, word: str) -> None:
        if word == "raise" and self._may_try_again(task):
            task.state, task.not_before = "pending", self.state.now + RETRY_AFTER
            task.spent += 1
            self._drop(task)
            self.state.early.append(task.seq)
            self._happened(task, "retry_scheduled")
            return
        match word:
            case "return":
                self._end(task, "completed", result="done")
            case "win":
                self._end(task, "completed", result="won")
            case "cancel" if task.state == "cancel_requested":
                self._end(task, "cancelled")
            case _:
                failures = {
                    "raise": "ValueError",
                    "die": "SystemExit",
                    "cancel": "CancelledError",
                    "fail": "RuntimeError",
                }
                self._end(task, "failed", failure=failures[word])

    def _may_try_again(self, task: Task) -> bool:
        if not task.retries or task.state == "cancel_requested" or task.spent + 1 >= task.max_attempts:
            return False
        return task.deadline is None or self.state.now + RETRY_AFTER < task.deadline

    @request
    def let_callback_end(self, seq: int, word: str) -> None:
        """A callback that hangs returns, or raises; its task may have ended meanwhile."""
        task = self.task(seq)
        task.called = word
        if task.live:
            self._callback_ends(task)

    def _callback_ends(self, task: Task) -> None:
        if task.called == "raises":
            task.callback_failed = True
            self._happened(task, "callback_failed")
        self._end(task, "cancelled")

    # --- stopping ---

    @request
    def cancel(self, scope: str, ref: Ref, reason: str | None) -> Task:
        task = self._steered(scope, ref)
        self._cancel([task], reason)
        return task

    @request
    def cancel_all(self, scope: str, reason: str | None) -> list[int]:
        reached = self.live(scope)
        self._cancel(reached, reason, self._moved_away(scope, reached))
        return [task.seq for task in reached]

    def _cancel(self, tasks: Sequence[Task], reason: str | None, spared: Collection[int] = ()) -> set[int]:
        """Ask for the end of tasks and of what descends from each; who has been asked already is not asked again."""
        reached = set()
        for task in tasks:
            if self._ask(task, reason):
                below = [one for one in self.descendants(task) if one.seq not in spared]
                reached |= {task.seq, *(one.seq for one in below if self._ask(one, reason))}
        return reached

    def _ask(self, task: Task, reason: str | None) -> bool:
        if not task.live or task.state == "cancel_requested":
            return False
        task.reason, task.asked = reason, True
        if task.state == "pending":
            self._end(task, "cancelled")
            return True
        task.state = "cancel_requested"
        self._happened(task, "cancel_requested")
        if task.external and not task.has_callback:
            self._end(task, "cancelled")
        return True

    @request
    def abandon(self, scope: str, ref: Ref) -> Task:
        task = self._steered(scope, ref)
        if not task.live:
            return task
        fenced = task.attempt + (1 if task.executing else 0)
        if task.recovery == "rerun" and task.state != "cancel_requested":
            if task.state != "pending" or task.owner is not None:
                self._release(task, attempt=fenced)
        else:
            task.attempt = fenced
            self._end(task, "abandoned")
        return task

    # --- handing over ---

    @request
    def observe(self, scope: str, of: str, task_id: str) -> int:
        """The number of the handle."""
        task = self.named(of, task_id)
        errors = {"TaskNotFound"} if task is None else set()
        if self.state.sessions[scope].closed:
            errors.add("SessionClosed")
        if task is None or errors:
            raise Refused(*errors)
        for number, handle in enumerate(self.state.handles):
            if (handle.scope, handle.seq, handle.role) == (scope, task.seq, "observer"):
                return number
        self.state.handles.append(Handle(scope, task.seq, "observer"))
        return len(self.state.handles) - 1

    @request
    def transfer(self, source: str, destination: str, refs: Sequence[Ref]) -> list[int]:
        return self._transfer(source, destination, refs)

    def _transfer(self, source: str, destination: str, refs: Sequence[Ref]) -> list[int]:
        chosen = self._visible(source, refs, owned=True, read_too=False)
        if source == destination:
            return [task.seq for task in chosen]
        self._check_destination(source, destination)
        return self._move(source, destination, chosen)

    def _check_destination(self, source: str, destination: str) -> None:
        if source == destination:
            raise Refused("SessionError")
        if self.state.sessions[destination].closed:
            raise Refused("SessionClosed")

    def _move(self, source: str, destination: str, chosen: Sequence[Task], staying: Collection[int] = ()) -> list[int]:
        below = [one for one in self.descendants(*chosen) if one.live and one.scope == source]
        going = [*chosen, *(one for one in below if one.seq not in staying)]
        if {task.id for task in going} & {task.id for task in self.live(destination)}:
            raise Refused("TransferConflict")
        for task in going:
            self.state.handles[self.owner_handle(task.seq)].scope = destination
            for note in self.state.notes:
                if note.key == f"end:{task.seq}" and not note.acknowledged:
                    note.scope = destination
            if task.mode == "hidden":
                # what the destination awaits, it must take up
                self.state.sessions[destination].sync = True
            task.scope = destination
            task.left.add(source)
            self._happened(task, "transferred", source)
        return [task.seq for task in going]

    @request
    def cancel_unreferenced(self, scope: str, refs: Sequence[Ref]) -> set[int]:
        """The tasks that were asked."""
        kept = self._visible(scope, refs, owned=False, read_too=True)
        return self._cancel_rest(scope, kept)

    def _cancel_rest(self, scope: str, kept: Sequence[Task]) -> set[int]:
        live = self.live(scope)
        spared = self._covered(kept) | {task.seq for task in live if task.mode == "hidden"}
        ending = [task for task in live if task.seq not in spared]
        return self._cancel(ending, "unreferenced", spared | self._moved_away(scope, ending))

    def _moved_away(self, scope: str, tasks: Sequence[Task]) -> set[int]:
        """What this session gave to another is that one's to end, and all below it, whatever it descends from."""
        below = [one for one in self.descendants(*tasks) if one.live]
        ending = {one.child for one in (*tasks, *below) if one.child is not None}
        gone = [one for one in below if one.scope not in {scope, *ending} and scope in one.left]
        return self._covered(gone) - {one.seq for one in below if one.scope in ending} if gone else set()

    @request
    def handoff(self, source: str, destination: str, refs: Sequence[Ref], given: str | None) -> Handoff:
        for before in self.state.handoffs:
            pair = (before.source, before.destination) == (source, destination)
            if before.id == given and (pair if given is None else before.source == source):
                named = {before.names.get(self._name(ref)) for ref in refs}
                kept = [self.task(seq) for seq in before.names.values()]
                kept += [seen[0] for seen in (self.look_up(source, ref) for ref in refs) if seen is not None]
                if given is None and any(task.live and task.scope == source for task in kept):
                    # what has come back, or has the id now, is handed over anew, not again
                    raise Refused("IdempotencyConflict")
                if before.destination != destination or named != set(before.names.values()):
                    raise Refused("IdempotencyConflict")
                return before
        names: dict[Any, int] = {}
        for task in self._visible(source, refs, owned=True, read_too=False):
            names[self.owner_handle(task.seq)] = task.seq
            if self.named(source, task.id) is task:
                names[task.id] = task.seq
        moved = self._transfer(source, destination, refs)
        cancelled = self._cancel_rest(source, [self.task(seq) for seq in moved])
        done = Handoff(source, destination, given, names, moved, cancelled)
        self.state.handoffs.append(done)
        self.state.session_events.append(("handed_off", destination, source))
        return done

    @staticmethod
    def _name(ref: Ref) -> Any:
        return ref.handle if isinstance(ref, ByHandle) else ref.id

    @request
    def close(self, scope: str, successor: str | None) -> tuple[list[int], set[int]]:
        """The tasks that went, and those whose cancel was requested."""
        session = self.state.sessions[scope]
        if session.closed:
            return [], set()
        if successor is not None:
            self._check_destination(scope, successor)
        live = self.live(scope)
        ending = [task for task in live if task.close_policy == "cancel" or task.mode == "hidden"]
        stopping = {task.seq for task in ending}
        going = [task for task in live if task.close_policy == "transfer" and task.seq not in stopping]
        moved: list[int] = []
        if going:
            destination = successor or session.parent
            if destination is None:
                raise Refused("SessionError")
            self._check_destination(scope, destination)
            moved = self._move(scope, destination, going, stopping)
        # what went with its parent is kept there, even below one that is cancelled
        spared = self._covered([self.task(seq) for seq in moved]) | self._moved_away(scope, ending)
        cancelled = self._cancel(ending, "session closed", spared)
        session.closed = True
        self.state.session_events.append(("session_closed", scope, None))
        return moved, cancelled

    # --- being told ---

    @request
    def read(self, scope: str, ref: Ref) -> str:
        """The outcome of a finished task is handed out; its state."""
        seen = self.look_up(scope, ref)
        if seen is None:
            raise Refused("TaskNotFound")
        self.state.handles[seen[1]].read = True
        return seen[0].state

    def unread(self, scope: str) -> list[Note]:
        return [note for note in self.state.notes if note.scope == scope and not note.acknowledged]

    @request
    def acknowledge(self, keys: Collection[str]) -> None:
        for note in self.state.notes:
            note.acknowledged = note.acknowledged or note.key in keys

    @request
    def await_background_work(self, scope: str) -> tuple[bool, set[int]]:
        """With no hidden work live: whether the session must take its state up, or the failures it is told of."""
        session = self.state.sessions[scope]
        failures = set()
        for task in self.state.tasks:
            handle = self.state.handles[self.owner_handle(task.seq)]
            if task.scope == scope and task.mode == "hidden" and task.state in ("failed", "abandoned"):
                failures |= set() if handle.read else {task.seq}
                handle.read = True
        needed = session.sync
        session.sync = needed and bool(failures)
        return needed, failures

    # --- owners ---

    def close_owner(self) -> None:
        """The store closes in order: bodies are detached, and what may run again is given back."""
        for seq in sorted(self.state.bodies):
            task = self.task(seq)
            if task.state == "cancel_requested":
                self._end(task, "cancelled")
            elif task.how == "win":
                self._finish(task, "win")
        for task in self.live():
            if task.owner != self.state.owner:
                continue
            if task.external:
                task.owner = None
                self._happened(task, "released")
            elif task.may_rerun:
                self._release(task)
            else:
                self._end(task, "abandoned")
        self._forget_owner()

    def kill_owner(self) -> None:
        """The owner dies; nobody writes."""
        self._forget_owner()

    def _forget_owner(self) -> None:
        self.state.bodies.clear()
        self.state.queue.clear()
        self.state.early.clear()
        self.state.claimed.clear()

    def open_owner(self, *, knows: bool) -> None:
        """The next owner opens the file; *knows*: it has the functions of the tasks."""
        self.state.owner += 1
        self.state.knows = knows
        self.recover()

    @request
    def learn(self) -> None:
        """The owner registers its functions, and recovers."""
        self.state.knows = True
        self._recover()

    @request
    def recover(self) -> None:
        self._recover()

    def _recover(self) -> None:
        slots = self._max_running - len(self.state.bodies)
        for task in self.live():
            if not self._is_kept(task):
                slots -= self._take_over(task, slots > 0)

    def _is_kept(self, task: Task) -> bool:
        """Whether the owner of a task lives."""
        return task.owner == self.state.owner

    def _take_over(self, task: Task, slot: bool) -> bool:
        """Whether it was started."""
        if task.external:
            if task.state == "cancel_requested" and task.begun:
                task.callback_failed = True
                self._happened(task, "callback_failed")
                self._end(task, "cancelled")
            elif task.owner is not None:
                task.owner = None
                self._happened(task, "released")
            return False
        if task.state == "cancel_requested":
            self._end(task, "cancelled")
        elif not task.may_rerun:
            self._end(task, "abandoned")
        else:
            task.spent += 1 if task.executing else 0
            is_early = task.not_before is not None and task.not_before > self.state.now
            if task.spent >= task.max_attempts:
                self._end(task, "failed", failure="AttemptsExhausted")
            elif self._is_late(task):
                self._end(task, "failed", failure="Timeout")
            elif not self.state.knows:
                if task.state != "pending" or task.owner is not None:
                    self._release(task)
            elif slot and not is_early:
                self._start(task, "reattached")
                return True
            else:
                task.state, task.owner = "pending", self.state.owner
                self._happened(task, "claimed")
                self._wait_for_start(task.seq, self.state.early if is_early else self.state.queue)
                self.state.claimed.add(task.seq)
        return False

    # --- the clock ---

    @request
    def set_the_clock(self, hours: float) -> None:
        """The wall clock is set so many hours on, or back: what the owner has is ended, or tried again, if its time has come."""
        self.state.now += hours
        for task in self.live():
            if task.owner != self.state.owner or task.external or not self._is_late(task):
                continue
            if task.seq in self.state.bodies and task.state == "running" and task.how == "win":
                # whatever it is stopped for
                self._finish(task, "win")
            elif task.state in ("pending", "running"):
                self._end(task, "failed", failure="Timeout")
        for seq in list(self.state.early):
            if (self.task(seq).not_before or 0.0) <= self.state.now:
                self.state.early.remove(seq)
                self._wait_for_start(seq, self.state.queue)

    @request
    def look_at_deadlines(self) -> None:
        """Work that nobody has is ended by who looks, if its time is up; and the rest is taken up by the way."""
        if any(self._is_late(task) for task in self.live() if task.owner is None and not task.external):
            self._recover()

    def _is_late(self, task: Task) -> bool:
        return task.deadline is not None and task.deadline <= self.state.now

    # --- what follows by itself ---

    def _react(self) -> None:
        """Let bodies and callbacks react to what was asked of them, and start what waits for a slot."""
        for task in self.live():
            if task.state == "cancel_requested":
                self._stop(task)
        self._start_what_waits()

    def _start_what_waits(self) -> None:
        while self.state.queue and len(self.state.bodies) < self._max_running:
            seq = self.state.queue.popleft()
            if self.task(seq).owner == self.state.owner:
                self._start(self.task(seq), BEGUN if seq in self.state.claimed else "started")
            self.state.claimed.discard(seq)

    @staticmethod
    def _wait_for_start(seq: int, waiting: deque[int] | list[int]) -> None:
        # what waits already keeps its place
        if seq not in waiting:
            waiting.append(seq)

    def _stop(self, task: Task) -> None:
        if task.external:
            if task.owner == self.state.owner and task.has_callback and not task.begun:
                task.begun = True
                self._happened(task, "state_changed")
                if task.called != "hangs":
                    self._callback_ends(task)
        elif task.how == "win":
            self._finish(task, "win")
        elif task.policy == "abort_local" or task.how == "stop":
            self._end(task, "cancelled")
        elif task.how == "fail":
            self._finish(task, "fail")

    def _start(self, task: Task, event: str) -> None:
        task.state, task.not_before = "running", None
        task.attempt += 1
        task.owner = self.state.owner
        self.state.bodies.add(task.seq)
        self._happened(task, event)

    def _release(self, task: Task, *, attempt: int | None = None) -> None:
        task.attempt = task.attempt if attempt is None else attempt
        task.state, task.owner = "pending", None
        self._drop(task)
        self._happened(task, "released")

    def _end(self, task: Task, state: str, **outcome: Any) -> None:
        for name, value in outcome.items():
            setattr(task, name, value)
        task.state, task.not_before = state, None
        self._drop(task)
        if task.notify:
            self.state.notes.append(Note(task.scope, f"end:{task.seq}"))
            self._happened(task, "noted")
        self._happened(task, state)

    def _drop(self, task: Task) -> None:
        self.state.bodies.discard(task.seq)
        for waiting in (self.state.queue, self.state.early):
            if task.seq in waiting:
                waiting.remove(task.seq)

    def _happened(self, task: Task, type: str, from_scope: str | None = None) -> None:
        task.events.append(Happened(type, task.scope, task.attempt, from_scope))

    def __iter__(self) -> Iterator[Task]:
        return iter(self.state.tasks)
