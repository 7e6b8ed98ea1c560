"""Rows as the rules see them."""

from __future__ import annotations

from typing import Any

from lash_store.lifecycle import Task
from lash_store.models import TaskState

BEFORE, NOW, LATER = "2024-05-01T10:00:00.000Z", "2024-05-01T10:00:07.000Z", "2024-05-01T10:00:09.000Z"
FAILURE = '{"type":"ValueError","message":"no","traceback":null}'
EVIDENCE = '{"owner_id":1,"end":"died"}'
PROCESS = '{"pid":41,"group":41,"started":"77","token":"t"}'
NOTE = {"note_key": "k", "note": "look here"}


def managed(state: str, **changed: Any) -> Task:
    """A task of owner 1 in its first attempt, none of which a crash has ended."""
    task = Task(
        task_seq=7,
        scope="desktop:s1",
        id="index",
        kind="other",
        mode="managed",
        state=state,
        label="index_repo",
        function="index_repo",
        recovery="rerun",
        cancel_policy="cooperative",
        arguments="{}",
        attempt=1,
        attempts_spent=0,
        max_attempts=3,
        owner_id=1,
        progress=None,
        fraction=None,
        result="1" if state == "completed" else None,
        failure=FAILURE if state == "failed" else None,
        evidence=EVIDENCE if state == "abandoned" else None,
        cancel_reason=None,
        cancel_requested_by=None,
        cancel_requested_at=BEFORE if state == "cancel_requested" else None,
        created_at=BEFORE,
        started_at=BEFORE,
        updated_at=BEFORE,
        completed_at=BEFORE if TaskState(state).is_terminal else None,
        parent_seq=None,
        child_session_id=None,
        close_policy="keep",
        idempotency_key=None,
        notify_on_end=0,
        has_callback=0,
        callback_begun_at=None,
        callback_error=None,
        version=None,
        timeout=None,
        deadline=None,
        not_before=None,
        last_error=None,
        waiting_for=None,
        process=None,
    )
    return task._replace(**changed)
