"""
Owns the cook-book: twenty questions about a file, each one SQL statement that the stock `sqlite3` shell answers.

The statements name tables and columns only, no view and no function of this package, and need SQLite 3.38 or newer. A parameter
that is not set is NULL, and one that is an empty text counts as not set: both mean all.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["COOKBOOK", "Parameter", "Query"]


class Parameter(NamedTuple):
    """What a statement takes as ``:name``; *example* is what documents show, and *default* says what is asked without it."""

    name: str
    meaning: str
    example: str
    default: str | None
    type: Literal["text", "whole", "number"] = "text"

    @property
    def is_required(self) -> bool:
        """Whether nothing sensible is asked without it."""
        return self.default is None


class Query(NamedTuple):
    """One question by its name, and the statement that answers it, without its semicolon."""

    name: str
    question: str
    notes: str
    parameters: tuple[Parameter, ...]
    sql: str


_SESSION = Parameter("session", "runtime:session", "desktop:s1", "every session")
_ITS_SESSION = Parameter(
    "session", "runtime:session of the task", "desktop:s1", "the newest task of the id, wherever it is"
)
_LIMIT = Parameter("limit", "rows, at most", "20", "20", "whole")


def _task(example: str) -> Parameter:
    return Parameter("task", "id of the task; of several incarnations the newest", example, None)


def _since(default: str) -> Parameter:
    return Parameter("since", "UTC, as the file has it, or the first part of that", "2026-01-31T09:00", default)


_QUERIES = (
    Query(
        "running",
        "What is running, and for how long?",
        "Seconds of the current attempt; what waits or is to be cancelled is under way, too. No file can tell whether the owner "
        "still lives: `ps -p PID`.",
        (_SESSION,),
        """
SELECT t.scope AS session, t.id, t.kind, t.mode, t.state, t.attempt,
  CAST((julianday('now') - julianday(coalesce(t.started_at, t.created_at))) * 86400 AS INTEGER) AS seconds,
  CAST(round(t.fraction * 100) AS INTEGER) AS percent, t.progress, t.owner_id AS owner, o.pid
FROM tasks AS t LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL AND t.state <> 'pending'
  AND t.scope = coalesce(nullif(:session, ''), t.scope)
ORDER BY coalesce(t.started_at, t.created_at), t.task_seq
""",
    ),
    Query(
        "died",
        "What died with which owner, and what has become of it?",
        "Owners that were found dead, or that a person gave up. *became* is what recovery did, *now* how the task stands.",
        (Parameter("owner", "number of the owner", "2", "every owner", "whole"),),
        """
SELECT o.owner_id AS owner, o.pid, o."end", o.ended_at, e.scope AS session, e.task_id AS id, e.attempt,
  e.type AS became, t.state AS now
FROM events AS e
JOIN tasks AS t ON t.task_seq = e.task_seq
JOIN owners AS o ON o.owner_id = coalesce(
  json_extract(e.data, '$.previous_owner_id'),
  json_extract(e.data, '$.evidence.owner_id'),
  CASE WHEN e.type IN ('failed', 'cancelled') THEN t.owner_id END
)
WHERE e.type IN ('reattached', 'claimed', 'released', 'failed', 'cancelled', 'abandoned')
  AND o."end" IN ('died', 'abandoned') AND e.at >= o.ended_at
  AND o.owner_id = coalesce(nullif(:owner, ''), o.owner_id)
ORDER BY o.owner_id, e.seq
""",
    ),
    Query(
        "unowned",
        "What is live, and nobody works on it?",
        "A store of the runtime that knows the function takes such a task up when it opens; external work waits for somebody to "
        "`register` its id again.",
        (_SESSION,),
        """
SELECT t.scope AS session, t.id, t.mode, t.state, t.function, t.version, t.attempt,
  (SELECT json_extract(e.data, '$.reason') FROM events AS e
   WHERE e.task_seq = t.task_seq AND e.type = 'released' ORDER BY e.seq DESC LIMIT 1) AS why,
  (SELECT max(e.at) FROM events AS e WHERE e.task_seq = t.task_seq AND e.type = 'released') AS since
FROM tasks AS t LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL AND (t.owner_id IS NULL OR o.ended_at IS NOT NULL)
  AND t.scope = coalesce(nullif(:session, ''), t.scope)
ORDER BY t.task_seq
""",
    ),
    Query(
        "handed-over",
        "What did one session hand to another, and what was ended with it?",
        "Of a handoff: the tasks that moved, and those whose cancel it asked for. A plain transfer has no *handoff*.",
        (
            Parameter("source", "runtime:session that gave", "desktop:s4", "every session"),
            Parameter("destination", "runtime:session that received", "desktop:s5", "every session"),
        ),
        """
SELECT e.at, e.from_scope AS source, e.scope AS destination, e.task_id AS id, 'moved' AS what,
  h.handoff_id AS handoff, t.state AS now
FROM events AS e
JOIN tasks AS t ON t.task_seq = e.task_seq
LEFT JOIN handoffs AS h ON h.source = e.from_scope AND h.destination = e.scope AND h.at = e.at
WHERE e.type = 'transferred'
  AND e.from_scope = coalesce(nullif(:source, ''), e.from_scope)
  AND e.scope = coalesce(nullif(:destination, ''), e.scope)
UNION ALL
SELECT h.at, h.source, h.destination, json_extract(c.value, '$.id'), 'cancelled', h.handoff_id, t.state
FROM handoffs AS h
JOIN json_each(h.cancelled) AS c
LEFT JOIN tasks AS t ON t.task_seq = json_extract(c.value, '$.task_seq')
WHERE h.source = coalesce(nullif(:source, ''), h.source)
  AND h.destination = coalesce(nullif(:destination, ''), h.destination)
ORDER BY 1, 5 DESC, 4
""",
    ),
    Query(
        "slow-kinds",
        "Which kinds of work take longest?",
        "Seconds from the start of the last attempt to the end, of finished tasks; *longest_id* is the slowest of them.",
        (_SESSION,),
        """
SELECT kind, work, count(*) AS tasks, round(avg(seconds), 3) AS mean_seconds, round(max(seconds), 3) AS longest_seconds,
  id AS longest_id, session AS longest_session
FROM (
  SELECT t.kind, coalesce(t.function, t.mode) AS work, t.id, t.scope AS session,
    (julianday(t.completed_at) - julianday(coalesce(t.started_at, t.created_at))) * 86400 AS seconds
  FROM tasks AS t
  WHERE t.completed_at IS NOT NULL AND t.scope = coalesce(nullif(:session, ''), t.scope)
)
GROUP BY kind, work
ORDER BY max(seconds) DESC
""",
    ),
    Query(
        "cancels",
        "Who cancelled what, why, and when did it stop?",
        "*because_of* is the task whose cancel covered this one; no *stopped_after* means that it has not stopped.",
        (_SESSION,),
        """
SELECT coalesce(t.cancel_requested_at, t.completed_at) AS at, t.scope AS session, t.id,
  t.cancel_requested_by AS requested_by, t.cancel_reason AS reason,
  (SELECT p.id FROM events AS e JOIN tasks AS p ON p.task_seq = json_extract(e.data, '$.because_of')
   WHERE e.task_seq = t.task_seq AND e.type IN ('cancel_requested', 'cancelled') LIMIT 1) AS because_of,
  round((julianday(t.completed_at) - julianday(t.cancel_requested_at)) * 86400, 3) AS stopped_after, t.state
FROM tasks AS t
WHERE (t.cancel_requested_at IS NOT NULL OR t.state = 'cancelled')
  AND t.scope = coalesce(nullif(:session, ''), t.scope)
ORDER BY 1, t.task_seq
""",
    ),
    Query(
        "stuck-cancels",
        "Which cancels were asked for and have not come to an end?",
        "A body that swallows its cancellation, a callback that failed, a process that does not go. `abandon` is the way out.",
        (Parameter("seconds", "how long ago it was asked for, at least", "10", "10", "number"),),
        """
SELECT t.scope AS session, t.id, t.mode, t.cancel_policy,
  CAST((julianday('now') - julianday(t.cancel_requested_at)) * 86400 AS INTEGER) AS seconds,
  t.cancel_reason AS reason, t.cancel_requested_by AS requested_by, t.callback_begun_at,
  json_extract(t.callback_error, '$.type') AS callback_error, t.owner_id AS owner, o.pid
FROM tasks AS t LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL AND t.state = 'cancel_requested'
  AND (julianday('now') - julianday(t.cancel_requested_at)) * 86400 >= coalesce(nullif(:seconds, ''), 10) + 0
ORDER BY t.cancel_requested_at, t.task_seq
""",
    ),
    Query(
        "retries",
        "What is tried again, because of which errors?",
        "Executions that a retried error or the death of their owner ended, and steps that are tried again. *recovered* counts "
        "the tasks that completed in the end.",
        (_since("ever"),),
        """
SELECT r.error, count(*) AS retries, count(DISTINCT r.task_seq) AS tasks,
  count(DISTINCT CASE WHEN t.state = 'completed' THEN t.task_seq END) AS recovered,
  max(r.at) AS last_at, t.scope AS last_session, t.id AS last_id
FROM (
  SELECT e.task_seq, e.at, coalesce(
    json_extract(e.data, '$.last_error.type'), json_extract(e.data, '$.error.type'), 'death of the owner') AS error
  FROM events AS e
  WHERE (e.type = 'retry_scheduled'
      OR (e.type IN ('reattached', 'claimed', 'released') AND json_extract(e.data, '$.ended_by') = 'crash'))
    AND e.at >= coalesce(:since, '')
) AS r
JOIN tasks AS t ON t.task_seq = r.task_seq
GROUP BY r.error
ORDER BY retries DESC, r.error
""",
    ),
    Query(
        "failures",
        "What failed or was abandoned, by type of error?",
        "An abandoned task is named for the end of its owner. *last_id* and *last_message* are of the newest.",
        (_SESSION, _since("ever")),
        """
SELECT error, count(*) AS tasks, count(DISTINCT session) AS sessions, max(completed_at) AS last_at,
  session AS last_session, id AS last_id, message AS last_message
FROM (
  SELECT t.scope AS session, t.id, t.completed_at,
    coalesce(json_extract(t.failure, '$.type'), 'owner ' || json_extract(t.evidence, '$.end')) AS error,
    coalesce(json_extract(t.failure, '$.message'), json_extract(t.evidence, '$.reason')) AS message
  FROM tasks AS t
  WHERE t.state IN ('failed', 'abandoned') AND t.completed_at >= coalesce(:since, '')
    AND t.scope = coalesce(nullif(:session, ''), t.scope)
)
GROUP BY error
ORDER BY tasks DESC, error
""",
    ),
    Query(
        "attempts",
        "How many attempts does each function need?",
        "*spent* are attempts that a crash or a retried error ended; an attempt that a clean close ended is not spent.",
        (),
        """
SELECT t.function, count(*) AS tasks, sum(t.attempt) AS attempts, round(avg(t.attempt), 2) AS mean, max(t.attempt) AS most,
  sum(t.attempts_spent) AS spent, sum(t.state = 'completed') AS completed, sum(t.state = 'failed') AS failed,
  sum(t.completed_at IS NULL) AS live
FROM tasks AS t
WHERE t.function IS NOT NULL
GROUP BY t.function
ORDER BY mean DESC, attempts DESC, t.function
""",
    ),
    Query(
        "bytes",
        "Which sessions fill the file, and with what?",
        "Bytes of stored values, without indexes and the rest of each row.",
        (_LIMIT,),
        """
WITH stored AS (
  SELECT scope, 'tasks' AS what, sum(coalesce(length(CAST(arguments AS BLOB)), 0) + coalesce(length(CAST(result AS BLOB)), 0)
    + coalesce(length(CAST(failure AS BLOB)), 0) + coalesce(length(CAST(progress AS BLOB)), 0)) AS bytes
  FROM tasks GROUP BY scope
  UNION ALL SELECT scope, 'events', sum(length(CAST(data AS BLOB))) FROM events GROUP BY scope
  UNION ALL SELECT t.scope, 'steps', sum(length(CAST(s.value AS BLOB)))
    FROM steps AS s JOIN tasks AS t ON t.task_seq = s.task_seq GROUP BY t.scope
  UNION ALL SELECT t.scope, 'signals', sum(length(CAST(s.payload AS BLOB)))
    FROM signals AS s JOIN tasks AS t ON t.task_seq = s.task_seq GROUP BY t.scope
  UNION ALL SELECT scope, 'notes', sum(length(CAST(text AS BLOB)) + length(CAST(data AS BLOB))) FROM inbox GROUP BY scope
  UNION ALL SELECT scope, 'updates', sum(length(CAST(text AS BLOB))) FROM updates GROUP BY scope
  UNION ALL SELECT source, 'handoffs',
    sum(length(CAST(kept AS BLOB)) + length(CAST(moved AS BLOB)) + length(CAST(cancelled AS BLOB)))
    FROM handoffs GROUP BY source
)
SELECT scope AS session, sum(bytes) AS bytes,
  coalesce(sum(bytes) FILTER (WHERE what = 'tasks'), 0) AS tasks,
  coalesce(sum(bytes) FILTER (WHERE what = 'events'), 0) AS events,
  coalesce(sum(bytes) FILTER (WHERE what = 'steps'), 0) AS steps,
  coalesce(sum(bytes) FILTER (WHERE what = 'signals'), 0) AS signals,
  coalesce(sum(bytes) FILTER (WHERE what = 'notes'), 0) AS notes,
  coalesce(sum(bytes) FILTER (WHERE what = 'updates'), 0) AS updates,
  coalesce(sum(bytes) FILTER (WHERE what = 'handoffs'), 0) AS handoffs
FROM stored
GROUP BY scope
ORDER BY 2 DESC, 1
LIMIT CAST(coalesce(nullif(:limit, ''), 20) AS INTEGER)
""",
    ),
    Query(
        "events-per-hour",
        "How busy was the store, hour by hour?",
        "Hours are UTC; an hour in which nothing happened is left out.",
        (_since("ever"), _SESSION),
        """
SELECT substr(e.at, 1, 13) || ':00Z' AS hour, count(*) AS events, count(DISTINCT e.scope) AS sessions,
  sum(e.type = 'registered') AS registered, sum(e.type IN ('started', 'reattached')) AS started,
  sum(e.type = 'completed') AS completed, sum(e.type IN ('failed', 'abandoned')) AS went_wrong,
  sum(e.type = 'cancelled') AS cancelled
FROM events AS e
WHERE e.at >= coalesce(:since, '') AND e.scope = coalesce(nullif(:session, ''), e.scope)
GROUP BY substr(e.at, 1, 13)
ORDER BY 1
""",
    ),
    Query(
        "unread-notes",
        "Which notes has no session read yet?",
        "Work speaks to its session in these. *is_claimed* says that a reader had them in hand when the file was last written.",
        (_SESSION,),
        """
SELECT n.scope AS session, n.note_seq, n.task_id AS id, n.text, n.posted_at,
  CAST((julianday('now') - julianday(n.posted_at)) * 86400 AS INTEGER) AS seconds, s.inbox_claim IS NOT NULL AS is_claimed
FROM inbox AS n JOIN sessions AS s ON s.scope = n.scope
WHERE n.acknowledged_at IS NULL AND n.scope = coalesce(nullif(:session, ''), n.scope)
ORDER BY n.note_seq
""",
    ),
    Query(
        "waiting",
        "What waits, and for which signal, time or person?",
        "A body shows what it waits for if it says so (`task.waiting`), sleeps, or is to be tried again. *unread_signals* were "
        "sent to it and came to nothing so far: a name that nobody asks for shows here.",
        (_SESSION,),
        """
SELECT session, id, state, waits_for, until, unread_signals
FROM (
  SELECT t.task_seq, t.scope AS session, t.id, t.state,
    CASE
      WHEN t.waiting_for IS NOT NULL THEN t.waiting_for
      WHEN t.state = 'waiting' THEN 'who does the work'
      WHEN t.not_before IS NOT NULL THEN 'its next attempt, after ' || coalesce(json_extract(t.last_error, '$.type'), 'an error')
      WHEN t.state = 'pending' AND t.owner_id IS NULL THEN 'an owner'
      WHEN t.state = 'pending' THEN 'a free slot'
      WHEN p.name IS NOT NULL THEN 'the end of ' || p.kind || ' ' || p.name
    END AS waits_for,
    coalesce(t.not_before, p.wake_at) AS until,
    (SELECT group_concat(DISTINCT g.name) FROM signals AS g
     WHERE g.task_seq = t.task_seq AND g.taken_at IS NULL) AS unread_signals
  FROM tasks AS t
  LEFT JOIN steps AS p ON p.task_seq = t.task_seq AND p.wake_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
  WHERE t.completed_at IS NULL AND t.scope = coalesce(nullif(:session, ''), t.scope)
)
WHERE waits_for IS NOT NULL OR unread_signals IS NOT NULL
ORDER BY task_seq
""",
    ),
    Query(
        "longest-waits",
        "What waited longest before it went on?",
        "Time in `pending` (for a slot, a retry, an owner) and in `waiting`. A wait without *until* goes on.",
        (_SESSION, _LIMIT),
        """
WITH turns AS (
  SELECT e.seq, e.task_seq, e.scope, e.task_id, e.attempt, e.type, e.at, e.data, json_extract(e.data, '$.state') AS state,
    lead(e.at) OVER (PARTITION BY e.task_seq ORDER BY e.seq) AS until
  FROM events AS e
  WHERE e.task_seq IS NOT NULL AND json_extract(e.data, '$.state') IS NOT NULL
)
SELECT round((julianday(coalesce(until, 'now')) - julianday(at)) * 86400, 3) AS seconds, scope AS session, task_id AS id,
  attempt, state,
  CASE type
    WHEN 'retry_scheduled' THEN 'retry after ' || json_extract(data, '$.last_error.type')
    WHEN 'released' THEN json_extract(data, '$.reason')
    WHEN 'state_changed' THEN json_extract(data, '$.waiting_for')
    ELSE 'a free slot'
  END AS waited_for,
  at AS since, until
FROM turns
WHERE state IN ('pending', 'waiting') AND scope = coalesce(nullif(:session, ''), scope)
ORDER BY julianday(coalesce(until, 'now')) - julianday(at) DESC, seq
LIMIT CAST(coalesce(nullif(:limit, ''), 20) AS INTEGER)
""",
    ),
    Query(
        "family",
        "What belongs to a task: its children, and the work of its sub-agents, at any depth?",
        "What a cancel of the task would cover. *below* is the task that a row hangs on, *link* how.",
        (_task("helper"), _ITS_SESSION),
        """
WITH RECURSIVE family(task_seq, above) AS (
  SELECT max(t.task_seq), NULL FROM tasks AS t
  WHERE t.id = :task AND t.scope = coalesce(nullif(:session, ''), t.scope)
  UNION
  SELECT c.task_seq, p.task_seq
  FROM family AS f
  JOIN tasks AS p ON p.task_seq = f.task_seq
  JOIN tasks AS c ON c.parent_seq = p.task_seq
    OR (p.kind = 'subagent' AND c.scope = substr(p.scope, 1, instr(p.scope, ':')) || p.child_session_id
      AND NOT EXISTS (SELECT 1 FROM tasks AS q WHERE q.task_seq = c.parent_seq AND q.scope = c.scope))
)
SELECT t.scope AS session, t.id, t.kind, t.state, t.attempt, a.id AS below,
  CASE WHEN t.parent_seq = a.task_seq THEN 'child' WHEN a.task_seq IS NOT NULL THEN 'in its session' END AS link,
  t.progress, t.task_seq
FROM family AS f
JOIN tasks AS t ON t.task_seq = f.task_seq
LEFT JOIN tasks AS a ON a.task_seq = f.above
ORDER BY f.above IS NOT NULL, t.task_seq
""",
    ),
    Query(
        "steps",
        "What does a task remember: its checkpoint, its steps, its sleeps?",
        "What the next attempt would be given. *attempt* is the one that wrote a row; values are cut to 200 characters.",
        (_task("index"), _ITS_SESSION),
        """
SELECT s.kind, s.name, s.state, s.attempt, s.tries, substr(s.value, 1, 200) AS value,
  length(CAST(s.value AS BLOB)) AS bytes, json_extract(s.failure, '$.type') AS failure, s.begun_at, s.saved_at, s.wake_at
FROM steps AS s
WHERE s.task_seq = (
  SELECT max(t.task_seq) FROM tasks AS t
  WHERE t.id = :task AND t.scope = coalesce(nullif(:session, ''), t.scope)
)
ORDER BY s.saved_at, s.kind, s.name
""",
    ),
    Query(
        "monitors",
        "What became of the monitors and their processes?",
        "*process* is how the process stands or ended: a monitor whose owner died says whether its process was `ended` then, was "
        "`gone` already, or is `left`.",
        (_SESSION,),
        """
SELECT m.scope AS session, m.monitor_id AS monitor, t.state, t.attempt,
  coalesce(json_extract(t.process, '$.pid'), json_extract(t.evidence, '$.process.pid'),
    (SELECT json_extract(e.data, '$.process.pid') FROM events AS e
     WHERE e.task_seq = t.task_seq AND e.type = 'state_changed' AND json_extract(e.data, '$.process.pid') IS NOT NULL
     ORDER BY e.seq DESC LIMIT 1)) AS pid,
  CASE
    WHEN t.process IS NOT NULL THEN 'runs'
    WHEN json_extract(t.evidence, '$.process.became') IS NOT NULL THEN json_extract(t.evidence, '$.process.became')
    WHEN m.exit_status < 0 THEN 'ended by signal ' || -m.exit_status
    WHEN m.exit_status IS NOT NULL THEN 'exited with ' || m.exit_status
  END AS process,
  m.lines, m.bytes, m.dropped,
  (SELECT count(*) FROM updates AS u WHERE u.task_seq = m.task_seq AND u.acknowledged_at IS NULL) AS unread,
  (SELECT u.text FROM updates AS u WHERE u.task_seq = m.task_seq ORDER BY u.update_seq DESC LIMIT 1) AS last_line
FROM monitors AS m JOIN tasks AS t ON t.task_seq = m.task_seq
WHERE m.scope = coalesce(nullif(:session, ''), m.scope)
ORDER BY m.task_seq
""",
    ),
    Query(
        "handles",
        "What may a session see and steer?",
        "An `owner` handle may cancel, an `observer` may look and wait. *is_visible*: live, or finished and not read yet.",
        (_SESSION,),
        """
SELECT h.scope AS session, h.handle_id, h.role, t.scope AS task_session, t.id, t.kind, t.state, h.read_at,
  t.completed_at IS NULL OR h.read_at IS NULL AS is_visible
FROM handles AS h JOIN tasks AS t ON t.task_seq = h.task_seq
WHERE h.scope = coalesce(nullif(:session, ''), h.scope)
ORDER BY h.handle_seq
""",
    ),
    Query(
        "window",
        "What was there to do in a window of time?",
        "Tasks that existed at some moment of it and had not ended before, by when they were created.",
        (
            _since("an hour ago"),
            Parameter("until", "UTC, as the file has it, or the first part of that", "2026-01-31T10:00", "now"),
            _SESSION,
        ),
        """
SELECT t.scope AS session, t.id, t.kind, t.mode, t.state, t.attempt, t.created_at, t.started_at, t.completed_at
FROM tasks AS t
WHERE t.created_at <= coalesce(nullif(:until, ''), strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
  AND (t.completed_at IS NULL
    OR t.completed_at >= coalesce(nullif(:since, ''), strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 hour')))
  AND t.scope = coalesce(nullif(:session, ''), t.scope)
ORDER BY t.created_at, t.task_seq
""",
    ),
)

COOKBOOK = {query.name: query._replace(sql=query.sql.strip()) for query in _QUERIES}
"""Every query by its name, in the order of the documents."""
