"""Owns the checker's own fold: what a task's events say of its row, of its states, and of its attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["ENDS", "Difference", "differences"]

ENDS = ("completed", "failed", "cancelled", "abandoned")

_JSON = ("arguments", "result", "failure", "evidence", "callback_error", "last_error", "process")
_DEFAULTS = {"close_policy": "keep", "notify_on_end": 0, "has_callback": 0}

# what may follow a state; of the work of others (mode external) the books may be closed from any
_NEXT: Mapping[str | None, frozenset[str]] = {
    None: frozenset({"pending"}),
    "pending": frozenset({"pending", "running", "failed", "cancelled", "abandoned"}),
    "running": frozenset({"pending", "running", "waiting", "cancel_requested", "completed", "failed", "abandoned"}),
    "waiting": frozenset({"pending", "running", "waiting", "cancel_requested", "completed", "failed", "abandoned"}),
    "cancel_requested": frozenset({"cancel_requested", "completed", "failed", "cancelled", "abandoned"}),
    **{state: frozenset() for state in ENDS},
}
_NEXT_EXTERNAL: Mapping[str | None, frozenset[str]] = {
    None: frozenset({"running"}),
    "running": frozenset({"running", "waiting", "cancel_requested", *ENDS}),
    "waiting": frozenset({"running", "waiting", "cancel_requested", *ENDS}),
    "cancel_requested": frozenset({"cancel_requested", *ENDS}),
    **{state: frozenset() for state in ENDS},
}

Difference = tuple[str, int, str]
"""Which rule is broken (``fold``, ``path``, ``attempt``), for which task, and how."""


def differences(task: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Yield where a row is not what its events (in order of ``seq``) say, or where these follow no legal path."""
    seq = task["task_seq"]
    row: dict[str, Any] = {**dict.fromkeys(task), **_DEFAULTS}
    state: str | None = None
    attempt = 0
    external = task["mode"] == "external"
    follows = _NEXT_EXTERNAL if external else _NEXT
    for event in events:
        kind, at, data = event["type"], event["at"], json.loads(event["data"])
        for name in row.keys() & data.keys():
            row[name] = data[name]
        row.update(task_seq=event["task_seq"], scope=event["scope"], id=event["task_id"], attempt=event["attempt"])
        for name in _stamped(kind, external=external):
            row[name] = at
        if kind == "transferred":
            if row["state"] != state:
                yield "path", seq, f"{event['seq']}: a transfer changed the state {state} to {row['state']}"
            continue
        if state in ENDS:
            yield "path", seq, f"{event['seq']}: {kind} follows the end {state}"
        # work with a process of its own that waits for its owner is asked to end before it is started again
        monitored = (state, row["state"]) == ("pending", "cancel_requested") and row.get("process") is not None
        if row["state"] not in follows.get(state, ()) and not monitored:
            yield "path", seq, f"{event['seq']}: {kind} made {row['state']} of {state}"
        if (row["state"] in ENDS) != (kind in ENDS) or (kind in ENDS and row["state"] != kind):
            yield "path", seq, f"{event['seq']}: {kind} says {row['state']}"
        rises = event["attempt"] - attempt
        may_rise = {
            "started": (1,),
            "reattached": (0,) if external else (1,),
            "released": (0, 1),
            "abandoned": (0, 1),
            # the note of an end comes before the end, of one transaction with it
            "noted": (0, 1) if str(data.get("note_key")).startswith(("end:", "monitor:")) else (0,),
        }.get(kind, (0,))
        if rises not in may_rise:
            yield "attempt", seq, f"{event['seq']}: {kind} took the attempt from {attempt} to {event['attempt']}"
        state, attempt = row["state"], event["attempt"]
    for name, found in task.items():
        if name in _JSON and found is not None:
            found = json.loads(found)
        if found != row[name]:
            yield "fold", seq, f"{name}: the events say {row[name]!r:.80}, the row {found!r:.80}"


def _stamped(kind: str, *, external: bool) -> tuple[str, ...]:
    """Return the columns that take the time of an event."""
    match kind:
        case "registered":
            return "created_at", "updated_at"
        case "started":
            return "started_at", "updated_at"
        case "reattached":
            return ("updated_at",) if external else ("started_at", "updated_at")
        case "cancel_requested":
            return "cancel_requested_at", "updated_at"
        case "transferred":
            return ()
        case "completed" | "failed" | "cancelled" | "abandoned":
            return "completed_at", "updated_at"
    return ("updated_at",)
