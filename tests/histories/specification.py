"""
Says what one task may do, one thing at a time: a sequential specification, written by hand from the contract.

It imports nothing of the package. What is in the file about one task id is a `File`: its incarnations in two sessions, the
handoffs between these, and which processes have ended. A call is one to three steps, each of which happens at one instant; a
step yields every state of the file in which it may leave it, given what the caller was told, and nothing if what the caller was
told cannot be. `drift` yields what the system may do by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["DONE", "READS", "START", "Call", "File", "Work", "drift", "step"]

START, DONE = -1, -2
"""How far a call is, beside the place of the incarnation it has found: nothing of it has happened, or all."""

_FOUND = 100
"""Added to that place by calls that look a handle up first: it was found, and the request is still to come."""

TERMINAL = frozenset({"completed", "failed", "cancelled", "abandoned"})

READS = frozenset({"get", "wait"})
"""Calls that leave no trace: one without an answer is as if it had never been."""


class Call(NamedTuple):
    """
    What *who* asked for at *asked*, and what it was told at *told* (both in nanoseconds of one clock for all processes).

    *answer* is None if nothing was ever told: it may have happened at any time since, for as long as *who* lived, or not at all.
    """

    who: str
    op: str
    asked: int
    told: int | None
    session: str = ""
    to: str = ""
    value: Any = None
    answer: Any = None
    number: int = 0

    @property
    def is_only_told(self) -> bool:
        """Whether what the caller was told says that the last step of the call changed nothing."""
        if self.op in READS or self.op in {"cancel", "cancel_by_handle"}:
            return True
        return "error" in self.answer or self.answer.get("verdict") in {"unchanged", "superseded"}


class Work(NamedTuple):
    """One incarnation. *seq* is None until somebody is told it; *owner* is a process."""

    seq: int | None
    session: str
    external: bool
    rerun: bool
    body: str
    owner: str | None
    state: str
    attempt: int = 0
    progress: str | None = None
    reason: str | None = None
    outcome: str | None = None
    read: bool = False
    callback: bool = False
    begun: bool = False
    signals: tuple[tuple[str | None, str], ...] = ()

    @property
    def live(self) -> bool:
        return self.state not in TERMINAL

    @property
    def executing(self) -> bool:
        return not self.external and self.state in ("running", "cancel_requested")


class Handoff(NamedTuple):
    """One that was done, under the *id* that was given for it; works by their place."""

    source: str
    to: str
    id: str
    keep: bool
    moved: tuple[int, ...]
    cancelled: tuple[int, ...]


class File(NamedTuple):
    """All there is about one task id."""

    works: tuple[Work, ...] = ()
    handoffs: tuple[Handoff, ...] = ()
    gone: frozenset[str] = frozenset()

    def find(self, session: str) -> int | None:
        """Return the place of the live incarnation in a session, else of the newest there."""
        found = None
        for place, work in enumerate(self.works):
            if work.session == session:
                if work.live:
                    return place
                found = place
        return found

    def live(self, session: str) -> int | None:
        found = self.find(session)
        return found if found is not None and self.works[found].live else None

    def with_work(self, place: int, **columns: Any) -> File:
        works = list(self.works)
        works[place] = works[place]._replace(**columns)
        return self._replace(works=tuple(works))

    def with_seq(self, place: int, seq: int) -> File | None:
        """Learn the number of an incarnation; None if it is another's. Later incarnations have higher numbers."""
        known = self.works[place].seq
        if known is not None:
            return self if known == seq else None
        for other, work in enumerate(self.works):
            if work.seq is not None and (work.seq >= seq if other < place else work.seq <= seq):
                return None
        return self.with_work(place, seq=seq)


Next = Iterator[tuple[File, int, str]]
"""The file after a step, how far the call is then, and what the step was, for the table of what was seen."""


def step(file: File, call: Call, progress: int) -> Next:
    """Yield every way in which the next step of a call may go."""
    if call.who not in file.gone:
        yield from _STEPS[call.op](file, call, progress)


def _shown(file: File, place: int, record: dict[str, Any]) -> File | None:
    """Return the file if a record shows an incarnation as it stands; None if it shows anything else."""
    work = file.works[place]
    if (
        record["state"] != work.state
        or record["session"] != work.session
        or record["attempt"] != work.attempt
        or record["owner"] != work.owner
        or record["progress"] != work.progress
        or record["reason"] != work.reason
        or record["outcome"] != work.outcome
    ):
        return None
    return file.with_seq(place, record["seq"])


def _refused(call: Call, error: str) -> bool:
    return call.answer is None or call.answer.get("error") == error


def _answered(file: File, place: int, call: Call, verdict: str | None, label: str) -> Next:
    """End a call whose answer is the row as this step leaves it, and the verdict."""
    if call.answer is None:
        yield file, DONE, label
    elif "error" not in call.answer and call.answer.get("verdict") == verdict:
        seen = _shown(file, place, call.answer)
        if seen is not None:
            yield seen, DONE, label


# --- looking --------------------------------------------------------------------------------------------------------


def _get(file: File, call: Call, progress: int) -> Next:
    place = file.find(call.session)
    if place is None:
        if _refused(call, "TaskNotFound"):
            yield file, DONE, "not found"
    else:
        yield from _answered(file, place, call, None, "read")


def _look_up(file: File, call: Call, then: int) -> Next:
    """Find what an id names in a session; what follows is done to that incarnation, wherever it goes."""
    place = file.find(call.session)
    if place is not None:
        yield file, then + place, "looked up"
    elif _refused(call, "TaskNotFound"):
        yield file, DONE, "not found"


def _wait(file: File, call: Call, progress: int) -> Next:
    if progress == START:
        yield from _look_up(file, call, 0)
    else:
        label = "still live at the time-out" if file.works[progress].live else "waited for the end"
        yield from _answered(file, progress, call, None, label)


def _result(file: File, call: Call, progress: int) -> Next:
    if progress == START:
        yield from _look_up(file, call, 0)
        return
    work = file.works[progress]
    if call.answer is not None and call.answer.get("error") == "TimeoutError":
        if work.live:
            yield file, DONE, "still live at the time-out"
        return
    if work.live or (call.answer is not None and "error" in call.answer):
        return
    if call.answer is not None and (work.state, work.outcome) != (call.answer["state"], call.answer["outcome"]):
        return
    # the note is the session's that asked, unless it has given the task away since
    yield file.with_work(progress, read=work.read or work.session == call.session), DONE, "handed out"


def _flicker(file: File, call: Call, progress: int) -> Next:
    """A result that timed out: the note may have been made with the end, and then taken back."""
    if progress == START:
        yield from _look_up(file, call, 0)
    elif progress < _FOUND:
        work = file.works[progress]
        if not work.live and not work.read and work.session == call.session:
            yield file.with_work(progress, read=True), progress + _FOUND, "note to be taken back"
    else:
        yield file.with_work(progress - _FOUND, read=False), DONE, "note taken back"


# --- what somebody says of work -------------------------------------------------------------------------------------


def _update(file: File, call: Call, progress: int) -> Next:
    place = file.find(call.session)
    if place is None:
        if _refused(call, "TaskNotFound"):
            yield file, DONE, "not found"
    elif file.works[place].live:
        yield from _answered(file.with_work(place, progress=call.value), place, call, "applied", "updated")
    else:
        yield from _answered(file, place, call, "superseded", "superseded")


def _flip(file: File, call: Call, progress: int) -> Next:
    place = file.find(call.session)
    if place is None:
        if _refused(call, "TaskNotFound"):
            yield file, DONE, "not found"
        return
    work = file.works[place]
    if not work.external:
        if _refused(call, "TaskError"):
            yield file, DONE, "not external"
    elif not work.live or work.state == "cancel_requested":
        label = "a flip met a cancel request" if work.live else "superseded"
        yield from _answered(file, place, call, "superseded", label)
    elif work.state == call.value:
        yield from _answered(file, place, call, "unchanged", "unchanged")
    else:
        yield from _answered(file.with_work(place, state=call.value), place, call, "applied", "flipped")


def _complete(file: File, call: Call, progress: int) -> Next:
    place = file.find(call.session)
    if place is None:
        if _refused(call, "TaskNotFound"):
            yield file, DONE, "not found"
        return
    work = file.works[place]
    state, outcome = call.value
    if not work.external:
        if _refused(call, "TaskError"):
            yield file, DONE, "not external"
    elif not work.live:
        same = (work.state, work.outcome) == (state, outcome)
        label = "cancel beat finish" if work.state == "cancelled" != state else "superseded"
        yield from _answered(
            file, place, call, "unchanged" if same else "superseded", "said the same again" if same else label
        )
    else:
        label = "finish beat cancel" if work.state == "cancel_requested" and state != "cancelled" else "completed"
        yield from _answered(file.with_work(place, state=state, outcome=outcome), place, call, "applied", label)


def _unregister(file: File, call: Call, progress: int) -> Next:
    place = file.find(call.session)
    is_done = call.answer is None or "error" not in call.answer
    if place is None or not file.works[place].live:
        if is_done:
            yield file, DONE, "nothing to unregister"
        return
    work = file.works[place]
    if not work.external:
        if _refused(call, "TaskError"):
            yield file, DONE, "not external"
    elif is_done:
        # whoever asked for its cancel before keeps the word
        reason = work.reason if work.state == "cancel_requested" else "unregistered"
        yield file.with_work(place, state="cancelled", reason=reason), DONE, "unregistered"


def _signal(file: File, call: Call, progress: int) -> Next:
    if progress == START:
        yield from _look_up(file, call, _FOUND)
        return
    place = progress - _FOUND
    work = file.works[place]
    key, payload = call.value
    before = [sent for name, sent in work.signals if key is not None and name == key]
    if work.external:
        if _refused(call, "TaskError"):
            yield file, DONE, "not managed"
    elif before and before != [payload]:
        if _refused(call, "IdempotencyConflict"):
            yield file, DONE, "key used for another signal"
    elif before:
        yield from _answered(file, place, call, "unchanged", "signalled once")
    elif not work.live:
        yield from _answered(file, place, call, "superseded", "superseded")
    else:
        signals = (*work.signals, (key, payload))
        yield from _answered(file.with_work(place, signals=signals), place, call, "applied", "signalled")


# --- being born -----------------------------------------------------------------------------------------------------


def _born(file: File, call: Call, label: str) -> Next:
    external, rerun, body, callback = call.value
    new = Work(
        None,
        call.session,
        external,
        rerun,
        body,
        call.who,
        "running" if external else "pending",
        callback=callback,
    )
    yield from _made(file._replace(works=(*file.works, new)), len(file.works), call, label)


def _made(file: File, place: int, call: Call, label: str) -> Next:
    if call.answer is None:
        yield file, DONE, label
    elif "error" not in call.answer:
        seen = file.with_seq(place, call.answer["seq"])
        if seen is not None:
            yield seen, DONE, label


def _spawn(file: File, call: Call, progress: int) -> Next:
    if file.live(call.session) is None:
        yield from _born(file, call, "spawned anew" if file.works else "spawned")
    elif _refused(call, "TaskExists"):
        yield file, DONE, "exists"


def _register(file: File, call: Call, progress: int) -> Next:
    place = file.live(call.session)
    if place is None:
        yield from _born(file, call, "registered anew" if file.works else "registered")
        return
    work = file.works[place]
    # one that is dead may have been found so, or not yet
    is_gone = work.owner in file.gone
    is_unkept = work.owner is None or is_gone or (work.owner == call.who and not work.callback)
    if (not is_unkept or is_gone) and _refused(call, "TaskExists"):
        yield file, DONE, "exists"
    if not is_unkept or not work.external:
        return
    callback = call.value[3]
    if work.state == "cancel_requested" and not (work.callback and not work.begun):
        # its callback was cut off: it ends, and this is another
        yield from _born(file.with_work(place, state="cancelled"), call, "registered anew")
    elif work.state == "cancel_requested" and not callback:
        bound = file.with_work(place, owner=call.who, callback=False, state="cancelled")
        yield from _made(bound, place, call, "bound again, and cancelled")
    else:
        yield from _made(file.with_work(place, owner=call.who, callback=callback), place, call, "bound again")


# --- stopping -------------------------------------------------------------------------------------------------------


def _requested(file: File, place: int, reason: str) -> tuple[File, str]:
    work = file.works[place]
    if not work.live:
        return file, "cancel came after the end"
    if work.state == "cancel_requested":
        return file, "cancel was requested before"
    if work.state == "pending":
        return file.with_work(place, state="cancelled", reason=reason), "cancelled before its start"
    if work.external and not work.callback:
        return file.with_work(place, state="cancelled", reason=reason), "cancelled by the books"
    return file.with_work(place, state="cancel_requested", reason=reason), "cancel requested"


def _cancel(file: File, call: Call, progress: int) -> Next:
    if progress == START:
        place = file.find(call.session)
        if place is not None:
            after, label = _requested(file, place, call.value[0])
            yield after, DONE if call.answer is None else place, label
        elif _refused(call, "TaskNotFound"):
            yield file, DONE, "not found"
    else:
        yield from _answered(file, progress, call, None, "cancel answered")


def _cancel_by_handle(file: File, call: Call, progress: int) -> Next:
    if progress == START:
        yield from _look_up(file, call, _FOUND)
    elif progress >= _FOUND:
        after, label = _requested(file, progress - _FOUND, call.value[0])
        yield after, DONE if call.answer is None else progress - _FOUND, label
    else:
        yield from _answered(file, progress, call, None, "cancel answered")


def _abandon(file: File, call: Call, progress: int) -> Next:
    place = file.find(call.session)
    if place is None:
        if _refused(call, "TaskNotFound"):
            yield file, DONE, "not found"
        return
    work = file.works[place]
    if not work.live:
        yield from _answered(file, place, call, None, "abandon came after the end")
        return
    fenced = work.attempt + 1 if work.executing else work.attempt
    if work.rerun and not work.external and work.state != "cancel_requested":
        freed = file.with_work(place, state="pending", owner=None, attempt=fenced)
        yield from _answered(freed, place, call, None, "fenced out" if work.executing else "freed")
    else:
        ended = file.with_work(place, state="abandoned", attempt=fenced)
        yield from _answered(ended, place, call, None, "abandoned")


# --- handing over ---------------------------------------------------------------------------------------------------


def _visible(file: File, session: str) -> int | None:
    place = file.find(session)
    return None if place is None or (not file.works[place].live and file.works[place].read) else place


def _transfer(file: File, call: Call, progress: int) -> Next:
    place = _visible(file, call.session)
    if place is None:
        if _refused(call, "HandleNotVisible"):
            yield file, DONE, "not visible"
    elif file.live(call.to) is not None:
        if _refused(call, "TransferConflict"):
            yield file, DONE, "conflict"
    else:
        label = "transferred" if file.works[place].live else "transferred after the end"
        yield from _answered(file.with_work(place, session=call.to), place, call, None, label)


def _handoff(file: File, call: Call, progress: int) -> Next:
    keep, handoff_id = call.value
    for before in file.handoffs:
        if (before.source, before.id) == (call.session, handoff_id):
            if (before.to, before.keep) == (call.to, keep):
                yield from _handed(file, before, call, "handed over once")
            elif _refused(call, "IdempotencyConflict"):
                yield file, DONE, "handed over otherwise"
            return
    moved: tuple[int, ...] = ()
    after = file
    if keep:
        place = _visible(file, call.session)
        if place is None:
            if _refused(call, "HandleNotVisible"):
                yield file, DONE, "not visible"
            return
        if file.live(call.to) is not None:
            if _refused(call, "TransferConflict"):
                yield file, DONE, "conflict"
            return
        moved, after = (place,), file.with_work(place, session=call.to)
    cancelled = tuple(place for place, work in enumerate(after.works) if work.live and work.session == call.session)
    for place in cancelled:
        after, _ = _requested(after, place, "unreferenced")
    done = Handoff(call.session, call.to, handoff_id, keep, moved, cancelled)
    yield from _handed(after._replace(handoffs=(*after.handoffs, done)), done, call, "handed over")


def _handed(file: File, done: Handoff, call: Call, label: str) -> Next:
    if call.answer is None:
        yield file, DONE, label
        return
    if "error" in call.answer:
        return
    seen: File | None = file
    for places, seqs in ((done.moved, call.answer["moved"]), (done.cancelled, call.answer["cancelled"])):
        if len(places) != len(seqs):
            return
        for place, seq in zip(places, seqs, strict=True):
            seen = None if seen is None else seen.with_seq(place, seq)
    if seen is not None:
        yield seen, DONE, label


# --- processes ------------------------------------------------------------------------------------------------------


def _die(file: File, call: Call, progress: int) -> Next:
    """The process of `value` is killed: nothing of it happens any more."""
    yield file._replace(gone=file.gone | {call.value}), DONE, "died"


def _close(file: File, call: Call, progress: int) -> Next:
    """The store of `value` closes in order, and lets go of what it still has in one transaction."""
    after = file
    for place, work in enumerate(file.works):
        if not work.live or work.owner != call.value:
            continue
        if work.state == "cancel_requested" and not (work.external and work.callback and not work.begun):
            after = after.with_work(place, state="cancelled")
        elif work.external:
            after = after.with_work(place, owner=None)
        elif work.rerun or work.attempt == 0:
            after = after.with_work(place, state="pending", owner=None)
        else:
            after = after.with_work(place, state="abandoned")
    yield after._replace(gone=after.gone | {call.value}), DONE, "closed"


_STEPS: dict[str, Callable[[File, Call, int], Next]] = {
    "get": _get,
    "wait": _wait,
    "result": _result,
    "flicker": _flicker,
    "update": _update,
    "set_live_state": _flip,
    "complete": _complete,
    "unregister": _unregister,
    "signal": _signal,
    "spawn": _spawn,
    "register": _register,
    "cancel": _cancel,
    "cancel_by_handle": _cancel_by_handle,
    "abandon": _abandon,
    "transfer": _transfer,
    "handoff": _handoff,
    "die": _die,
    "close": _close,
}


# --- what the system does by itself ---------------------------------------------------------------------------------


def drift(file: File, owners: tuple[str, ...]) -> Iterator[tuple[File, str]]:
    """Yield what may happen next without anybody's asking; *owners* are the processes that may take work over."""
    for place, work in enumerate(file.works):
        if not work.live:
            continue
        if work.external:
            yield from _drift_external(file, place, work)
        elif work.owner is None or work.owner in file.gone:
            yield from _recovered(file, place, work, owners)
        else:
            yield from _goes_on(file, place, work)


def _drift_external(file: File, place: int, work: Work) -> Iterator[tuple[File, str]]:
    requested = work.state == "cancel_requested"
    if work.owner is None:
        return
    if work.owner in file.gone:
        if requested and work.begun:
            yield file.with_work(place, state="cancelled"), "a callback was cut off"
        else:
            yield file.with_work(place, owner=None), "external work was released"
    elif requested and not work.begun:
        yield file.with_work(place, begun=True), "a callback began"
    elif requested:
        yield file.with_work(place, state="cancelled"), "a callback ended"


def _recovered(file: File, place: int, work: Work, owners: tuple[str, ...]) -> Iterator[tuple[File, str]]:
    if work.state == "cancel_requested":
        yield file.with_work(place, state="cancelled"), "a cancel was finished for the dead"
    elif not work.rerun and work.attempt > 0:
        yield file.with_work(place, state="abandoned"), "work was abandoned by recovery"
    else:
        label = "taken over while it ran" if work.state == "running" else "taken over before its start"
        for owner in owners:
            if owner not in file.gone:
                yield file.with_work(place, state="running", owner=owner, attempt=work.attempt + 1), label
                yield file.with_work(place, state="pending", owner=owner), "claimed"


def _goes_on(file: File, place: int, work: Work) -> Iterator[tuple[File, str]]:
    if work.state == "pending":
        yield file.with_work(place, state="running", attempt=work.attempt + 1), "started"
        return
    requested = work.state == "cancel_requested"
    ends: list[tuple[str, str]] = []
    if work.body == "quick":
        ends.append(("completed", f"[{work.attempt}]"))
    elif work.body == "broken":
        ends.append(("failed", f"ValueError: {work.attempt}"))
    elif work.body == "signalled" and work.signals:
        ends.append(("completed", work.signals[0][1]))
    elif work.body == "winning" and requested:
        ends.append(("completed", '"won"'))
    elif work.body == "untidy" and requested:
        ends.append(("failed", "RuntimeError: untidy"))
    for state, outcome in ends:
        label = "finish beat cancel" if requested else "a body ended"
        yield file.with_work(place, state=state, outcome=outcome), label
    if requested:
        yield file.with_work(place, state="cancelled"), "a body was stopped"
