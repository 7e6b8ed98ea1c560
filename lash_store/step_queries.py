"""Owns the statements about what bodies remember: checkpoints, steps, sleeps and signals; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from .models import Failure, StepKind, StepRecord, StepState
from .queries import readable
from .schema import signals, steps
from .statements import ONE, ZERO, hot, names, sql, values, word
from .transaction import Transaction

__all__ = ["Checkpoint", "SignalRow", "StepRow"]

_OF_TASK = steps.c.task_seq == bindparam("task_seq")


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """What a task saved last, as JSON text, and the number of that: each is higher than those before."""

    value: str
    saves: int


_CHECKPOINT = sql(
    select(steps.c.value, steps.c.tries).where(
        _OF_TASK, steps.c.kind == word(StepKind.CHECKPOINT), steps.c.name == word("")
    )
)
_CHECKPOINTS = sql(
    select(steps.c.task_seq, steps.c.value, steps.c.tries).where(
        values(steps.c.task_seq, "task_seqs"), steps.c.kind == word(StepKind.CHECKPOINT), steps.c.name == word("")
    )
)
_SAVE_CHECKPOINT = sql(
    sqlite_insert(steps)
    .values(
        task_seq=bindparam("task_seq"),
        kind=word(StepKind.CHECKPOINT),
        name=word(""),
        attempt=bindparam("attempt"),
        value=bindparam("value"),
        saved_at=bindparam("saved_at"),
        tries=bindparam("tries"),
    )
    .on_conflict_do_update(
        index_elements=[steps.c.task_seq, steps.c.kind, steps.c.name],
        set_={
            "attempt": bindparam("attempt"),
            "value": bindparam("value"),
            "saved_at": bindparam("saved_at"),
            "tries": bindparam("tries"),
        },
    )
)


def checkpoint(tx: Transaction, task_seq: int) -> Checkpoint | None:
    """Return what a task saved last."""
    row = tx.one(_CHECKPOINT, {"task_seq": task_seq})
    return None if row is None else Checkpoint._make(row)


def checkpoints(tx: Transaction, task_seqs: Iterable[int]) -> dict[int, Checkpoint]:
    """Return what each of many tasks saved last, by task; not those that saved nothing."""
    rows = tx.all(_CHECKPOINTS, {"task_seqs": names(task_seqs)})
    return {row[0]: Checkpoint._make(row[1:]) for row in rows}


def save_checkpoint(tx: Transaction, task_seq: int, attempt: int, value: str, number: int) -> None:
    """Replace what a task saved last."""
    tx.bytes += len(value)
    saved = {"task_seq": task_seq, "attempt": attempt, "value": value, "saved_at": tx.now, "tries": number}
    tx.one(_SAVE_CHECKPOINT, saved)


# --- steps and sleeps -----------------------------------------------------------------------------------------------


class StepRow(NamedTuple):
    """One thing a body remembers, as its row stands; *value* and *failure* are JSON text."""

    task_seq: int
    kind: str
    name: str
    attempt: int
    value: str
    saved_at: str
    state: str
    tries: int
    failure: str | None
    begun_at: str | None
    wake_at: str | None


_STEP = select(*(steps.c[name] for name in StepRow._fields))
STEPS = sql(_STEP.where(_OF_TASK).order_by(literal_column("steps.rowid")))
STEP = sql(_STEP.where(_OF_TASK, steps.c.kind == bindparam("kind"), steps.c.name == bindparam("name")))
STEP_NAMES = sql(select(steps.c.kind, steps.c.name).where(_OF_TASK, steps.c.kind != word(StepKind.CHECKPOINT)))
_BEGUN = sql(
    _STEP.where(values(steps.c.task_seq, "task_seqs"), steps.c.state == word(StepState.BEGUN)).order_by(
        steps.c.task_seq, steps.c.name
    )
)
_put = sqlite_insert(steps).values({name: bindparam(name) for name in StepRow._fields})
_PUT_STEP = hot(
    _put.on_conflict_do_update(
        index_elements=[steps.c.task_seq, steps.c.kind, steps.c.name],
        set_={name: _put.excluded[name] for name in StepRow._fields[3:]},
    )
)
# what is no JSON, by somebody's hand, says nothing
_AGAIN = case((func.json_valid(steps.c.failure) == ONE, steps.c.failure), else_=word("null"))
_TO_BE_TRIED = and_(
    _OF_TASK,
    steps.c.state == word(StepState.FAILED),
    func.coalesce(func.json_extract(_AGAIN, word("$.again.at_most_once")), ZERO) == ZERO,
)
_FORGET_FAILED = sql(delete(steps).where(_TO_BE_TRIED))
_within = func.json_each(_AGAIN, word("$.again.within")).table_valued("value", name="within")
_TO_BE_TRIED_INSIDE = and_(
    _TO_BE_TRIED,
    or_(steps.c.kind == word(StepKind.STEP), steps.c.kind == word(StepKind.TRANSACT)),
    values(steps.c.name, "names"),
    select(ONE).select_from(_within).where(_within.c.value == bindparam("step")).correlate(steps).exists(),
)
_FORGET_FAILED_INSIDE = sql(delete(steps).where(_TO_BE_TRIED_INSIDE).returning(steps.c.name))


def _untake(forgotten: ColumnElement[bool]) -> str:
    taken = func.json_each(_AGAIN, word("$.again.taken")).table_valued("value", name="taken")
    return sql(
        update(signals)
        .where(
            signals.c.task_seq == bindparam("task_seq"),
            signals.c.signal_seq.in_(select(taken.c.value).select_from(steps, taken).where(forgotten)),
        )
        .values(taken_at=null(), taken_attempt=null())
        .returning(*(signals.c[name] for name in SignalRow._fields))
    )


_FORGET_UNNAMED = sql(
    delete(steps).where(
        # their names begin with a digit, those of a step's own with the try
        _OF_TASK,
        steps.c.kind == word(StepKind.SLEEP),
        steps.c.name >= word("#0"),
        steps.c.name < word("#:"),
    )
)


def step(tx: Transaction, task_seq: int, kind: StepKind, name: str) -> StepRow | None:
    """Return one step, if the task remembers anything of it."""
    row = tx.one(STEP, {"task_seq": task_seq, "kind": kind, "name": name})
    return None if row is None else StepRow._make(row)


def put_step(tx: Transaction, row: StepRow) -> None:
    """Write a step as it stands now."""
    tx.bytes += len(row.value)
    tx.connection.execute(_PUT_STEP.sql, _PUT_STEP.arrange(row._asdict())).fetchall()


def forget_failed_steps(tx: Transaction, task_seq: int) -> None:
    """
    Let the next attempt try again what failed for good in this one, but for what runs at most once.

    It is handed again the signals that were received in what is forgotten.
    """
    tx.one(_UNTAKE, {"task_seq": task_seq})
    tx.one(_FORGET_FAILED, {"task_seq": task_seq})


def forget_failed_inside(
    tx: Transaction, task_seq: int, step: str, inside: Iterable[str]
) -> tuple[Sequence[str], Sequence[SignalRow]]:
    """
    Do the same, before a step is tried again, for those *inside* that were begun in it.

    Return the names of what is forgotten, and what had been received in it.
    """
    wanted = {"task_seq": task_seq, "step": step, "names": names(inside)}
    untaken = [SignalRow._make(row) for row in tx.all(_UNTAKE_INSIDE, wanted)]
    return [name for (name,) in tx.all(_FORGET_FAILED_INSIDE, wanted)], untaken


def forget_unnamed_sleeps(tx: Transaction, task_seq: int) -> None:
    """Forget the sleeps that were counted since the last checkpoint: a new one has been saved."""
    tx.one(_FORGET_UNNAMED, {"task_seq": task_seq})


def steps_in_flight(tx: Transaction, task_seqs: Iterable[int]) -> list[StepRow]:
    """Return the steps of some tasks that were noted as begun, and nothing else of them."""
    return [StepRow._make(row) for row in tx.all(_BEGUN, {"task_seqs": names(task_seqs)})]


def step_record(row: StepRow) -> StepRecord:
    """Build the public record of a row."""
    with readable(f"step {row.name!r} of task #{row.task_seq}"):
        columns: Mapping[str, Any] = {
            **row._asdict(),
            "value": json.loads(row.value),
            "failure": None if row.failure is None else failure_of_step(row.failure)[0],
        }
        return StepRecord.model_validate(columns)


def failure_of_step(text: str) -> tuple[Failure, Mapping[str, Any]]:
    """Read what a failed step keeps: the failure, and what else is needed to raise it again, or to try it again."""
    said = json.loads(text)
    again = said.pop("again", {})
    return Failure.model_validate(said), again


# --- signals --------------------------------------------------------------------------------------------------------


class SignalRow(NamedTuple):
    """One signal that was sent to a task; *payload* is JSON text."""

    signal_seq: int
    name: str
    key: str | None
    payload: str


_UNTAKE = _untake(_TO_BE_TRIED)
_UNTAKE_INSIDE = _untake(_TO_BE_TRIED_INSIDE)
_SIGNAL = select(*(signals.c[name] for name in SignalRow._fields))
_FOR_TASK = signals.c.task_seq == bindparam("task_seq")
NEXT_SIGNAL = sql(
    _SIGNAL.where(
        _FOR_TASK,
        signals.c.name == bindparam("name"),
        signals.c.taken_at.is_(None),
        signals.c.signal_seq > bindparam("after"),
    )
    .order_by(signals.c.signal_seq)
    .limit(ONE)
    .offset(ZERO)
)
_BY_KEY = sql(_SIGNAL.where(_FOR_TASK, signals.c.key == bindparam("key")))
_INSERT_SIGNAL = sql(
    insert(signals)
    .values({name: bindparam(name) for name in ("task_seq", "name", "key", "payload", "sent_at", "sent_by")})
    .returning(signals.c.signal_seq)
)
_TAKE_SIGNALS = sql(
    update(signals)
    .where(values(signals.c.signal_seq, "signal_seqs"), signals.c.taken_at.is_(None))
    .values(taken_at=bindparam("now"), taken_attempt=bindparam("attempt"))
)


def signal_by_key(tx: Transaction, task_seq: int, key: str) -> SignalRow | None:
    """Return what was sent to a task under a key."""
    row = tx.one(_BY_KEY, {"task_seq": task_seq, "key": key})
    return None if row is None else SignalRow._make(row)


def insert_signal(tx: Transaction, task_seq: int, name: str, key: str | None, payload: str, by: str) -> int:
    """Put a signal into a task's queue and return its number."""
    tx.bytes += len(payload)
    columns = {"task_seq": task_seq, "name": name, "key": key, "payload": payload, "sent_at": tx.now, "sent_by": by}
    row = tx.one(_INSERT_SIGNAL, columns)
    assert row is not None
    return int(row[0])


def take_signals(tx: Transaction, signal_seqs: Sequence[int], attempt: int) -> None:
    """Note that what came of some signals is remembered: no later attempt is handed them again."""
    tx.one(_TAKE_SIGNALS, {"signal_seqs": names(signal_seqs), "now": tx.now, "attempt": attempt})
