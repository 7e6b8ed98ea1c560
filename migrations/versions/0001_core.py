"""The core: sessions, owners, tasks, events, handles and what a body remembers."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATEMENTS = (
    """
CREATE TABLE owners (
    owner_id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    token TEXT NOT NULL,
    runtime TEXT NOT NULL,
    pid INTEGER NOT NULL,
    process_start TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    host TEXT NOT NULL,
    version TEXT NOT NULL,
    opened_at TEXT NOT NULL,
    ended_at TEXT,
    "end" TEXT,
    CONSTRAINT owners_token UNIQUE (token),
    CONSTRAINT owners_end CHECK ("end" = 'closed' OR "end" = 'died' OR "end" = 'abandoned'),
    CONSTRAINT owners_ended CHECK ((ended_at IS NULL) = ("end" IS NULL))
)
 STRICT
    """,
    """
CREATE INDEX owners_open ON owners (runtime) WHERE ended_at IS NULL
    """,
    """
CREATE TABLE sessions (
    session_seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    scope TEXT NOT NULL,
    runtime TEXT NOT NULL,
    session_id TEXT NOT NULL,
    opened_at TEXT NOT NULL,
    closed_at TEXT,
    CONSTRAINT sessions_scope UNIQUE (scope),
    CONSTRAINT sessions_scope_parts CHECK (scope = runtime || ':' || session_id),
    CONSTRAINT sessions_runtime CHECK (instr(runtime, ':') = 0)
)
 STRICT
    """,
    """
CREATE TABLE tasks (
    task_seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    scope TEXT NOT NULL,
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    mode TEXT NOT NULL,
    state TEXT NOT NULL,
    label TEXT NOT NULL,
    function TEXT,
    recovery TEXT NOT NULL,
    cancel_policy TEXT NOT NULL,
    arguments TEXT,
    attempt INTEGER NOT NULL,
    attempts_spent INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL,
    owner_id INTEGER,
    progress TEXT,
    fraction REAL,
    result TEXT,
    failure TEXT,
    evidence TEXT,
    cancel_reason TEXT,
    cancel_requested_by TEXT,
    cancel_requested_at TEXT,
    created_at TEXT NOT NULL,
    started_at TEXT,
    updated_at TEXT NOT NULL,
    completed_at TEXT,
    CONSTRAINT tasks_kind CHECK (kind = 'monitor' OR kind = 'subagent' OR kind = 'observer' OR kind = 'other'),
    CONSTRAINT tasks_mode CHECK (mode = 'managed' OR mode = 'external' OR mode = 'hidden'),
    CONSTRAINT tasks_state CHECK (state = 'pending' OR state = 'running' OR state = 'waiting' OR state = 'cancel_requested' OR state = 'completed' OR state = 'failed' OR state = 'cancelled' OR state = 'abandoned'),
    CONSTRAINT tasks_recovery CHECK (recovery = 'rerun' OR recovery = 'owner_bound' OR recovery = 'external'),
    CONSTRAINT tasks_cancel_policy CHECK (cancel_policy = 'cooperative' OR cancel_policy = 'abort_local'),
    CONSTRAINT tasks_arguments_json CHECK (arguments IS NULL OR json_valid(arguments)),
    CONSTRAINT tasks_result_json CHECK (result IS NULL OR json_valid(result)),
    CONSTRAINT tasks_failure_json CHECK (failure IS NULL OR json_valid(failure)),
    CONSTRAINT tasks_evidence_json CHECK (evidence IS NULL OR json_valid(evidence)),
    CONSTRAINT tasks_live CHECK ((completed_at IS NULL) = (state = 'pending' OR state = 'running' OR state = 'waiting' OR state = 'cancel_requested')),
    CONSTRAINT tasks_completed_has_result CHECK ((state = 'completed') = (result IS NOT NULL)),
    CONSTRAINT tasks_failed_has_failure CHECK ((state = 'failed') = (failure IS NOT NULL)),
    CONSTRAINT tasks_abandoned_has_evidence CHECK ((state = 'abandoned') = (evidence IS NOT NULL)),
    CONSTRAINT tasks_cancel_is_dated CHECK (state <> 'cancel_requested' OR cancel_requested_at IS NOT NULL),
    CONSTRAINT tasks_running_has_owner CHECK (mode = 'external' OR (state <> 'running' AND state <> 'waiting') OR (owner_id IS NOT NULL AND attempt > 0)),
    CONSTRAINT tasks_external CHECK ((mode = 'external') = (recovery = 'external')),
    CONSTRAINT tasks_attempts CHECK (attempt >= 0 AND attempts_spent BETWEEN 0 AND attempt AND max_attempts > 0),
    CONSTRAINT tasks_fraction CHECK (fraction BETWEEN 0.0 AND 1.0),
    FOREIGN KEY(scope) REFERENCES sessions (scope),
    FOREIGN KEY(owner_id) REFERENCES owners (owner_id)
)
 STRICT
    """,
    """
CREATE INDEX tasks_id ON tasks (scope, id)
    """,
    """
CREATE UNIQUE INDEX tasks_live ON tasks (scope, id) WHERE completed_at IS NULL
    """,
    """
CREATE INDEX tasks_owned ON tasks (owner_id) WHERE completed_at IS NULL
    """,
    """
CREATE TABLE events (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    task_seq INTEGER,
    scope TEXT NOT NULL,
    from_scope TEXT,
    task_id TEXT,
    attempt INTEGER,
    type TEXT NOT NULL,
    at TEXT NOT NULL,
    data TEXT NOT NULL,
    CONSTRAINT events_type CHECK (type = 'registered' OR type = 'claimed' OR type = 'started' OR type = 'reattached' OR type = 'released' OR type = 'retry_scheduled' OR type = 'state_changed' OR type = 'progress' OR type = 'saved' OR type = 'signalled' OR type = 'cancel_requested' OR type = 'callback_failed' OR type = 'completed' OR type = 'failed' OR type = 'cancelled' OR type = 'abandoned' OR type = 'transferred' OR type = 'noted' OR type = 'pruned' OR type = 'session_opened' OR type = 'session_closed' OR type = 'handed_off'),
    CONSTRAINT events_data_json CHECK (json_valid(data)),
    CONSTRAINT events_task CHECK ((task_seq IS NULL) = (task_id IS NULL)),
    FOREIGN KEY(task_seq) REFERENCES tasks (task_seq)
)
 STRICT
    """,
    """
CREATE UNIQUE INDEX events_one_end ON events (task_seq) WHERE type = 'completed' OR type = 'failed' OR type = 'cancelled' OR type = 'abandoned'
    """,
    """
CREATE INDEX events_task ON events (task_seq)
    """,
    """
CREATE TABLE handles (
    handle_seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    handle_id TEXT NOT NULL,
    scope TEXT NOT NULL,
    task_seq INTEGER NOT NULL,
    role TEXT NOT NULL,
    name TEXT,
    namespace TEXT,
    created_at TEXT NOT NULL,
    read_at TEXT,
    CONSTRAINT handles_id UNIQUE (handle_id),
    CONSTRAINT handles_role CHECK (role = 'owner' OR role = 'observer'),
    FOREIGN KEY(scope) REFERENCES sessions (scope),
    FOREIGN KEY(task_seq) REFERENCES tasks (task_seq)
)
 STRICT
    """,
    """
CREATE UNIQUE INDEX handles_owner ON handles (task_seq) WHERE role = 'owner'
    """,
    """
CREATE TABLE steps (
    task_seq INTEGER NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    value TEXT NOT NULL,
    saved_at TEXT NOT NULL,
    CONSTRAINT steps_key PRIMARY KEY (task_seq, kind, name),
    CONSTRAINT steps_value_json CHECK (json_valid(value)),
    FOREIGN KEY(task_seq) REFERENCES tasks (task_seq)
)
 STRICT
    """,
    """
CREATE TRIGGER tasks_terminal_is_final
BEFORE UPDATE ON tasks
WHEN OLD.completed_at IS NOT NULL AND (
  NEW.state IS NOT OLD.state OR NEW.completed_at IS NOT OLD.completed_at OR NEW.attempt IS NOT OLD.attempt
  OR NEW.result IS NOT OLD.result OR NEW.failure IS NOT OLD.failure OR NEW.evidence IS NOT OLD.evidence
  OR NEW.task_seq IS NOT OLD.task_seq OR NEW.id IS NOT OLD.id OR NEW.cancel_reason IS NOT OLD.cancel_reason
)
BEGIN
  SELECT RAISE(ABORT, 'a finished task keeps its outcome');
END
    """,
    """
CREATE TRIGGER tasks_live_is_kept
BEFORE DELETE ON tasks
WHEN OLD.completed_at IS NULL
BEGIN
  SELECT RAISE(ABORT, 'a live task is not deleted: cancel or abandon it first');
END
    """,
    """
CREATE TRIGGER events_are_history
BEFORE UPDATE ON events
BEGIN
  SELECT RAISE(ABORT, 'events are never changed');
END
    """,
    """
CREATE VIEW live_tasks AS
SELECT t.scope, t.id, t.kind, t.state, t.attempt,
  CASE WHEN t.fraction IS NULL THEN NULL ELSE printf('%.0f%%', t.fraction * 100) END AS done,
  t.progress,
  CAST((julianday('now') - julianday(t.created_at)) * 86400 AS INTEGER) AS age_seconds,
  o.pid, t.owner_id, t.label, t.mode, t.recovery, t.task_seq
FROM tasks AS t LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL
ORDER BY +t.task_seq
    """,
    """
CREATE VIEW task_history AS
SELECT e.seq, e.at, e.scope, e.task_id AS id, e.attempt, e.type, e.data, e.task_seq
FROM events AS e
WHERE e.task_seq IS NOT NULL
ORDER BY e.seq
    """,
    """
CREATE VIEW recent_failures AS
SELECT t.completed_at, t.scope, t.id, t.state, t.attempt,
  COALESCE(json_extract(t.failure, '$.type'), 'owner ' || json_extract(t.evidence, '$.end')) AS error,
  json_extract(t.failure, '$.message') AS message,
  t.label, t.task_seq
FROM tasks AS t
WHERE t.completed_at IS NOT NULL AND t.state IN ('failed', 'abandoned')
ORDER BY t.completed_at DESC, t.task_seq DESC
LIMIT 100
    """,
    """
CREATE VIEW session_summary AS
SELECT s.scope, s.opened_at, s.closed_at,
  COUNT(t.task_seq) FILTER (WHERE t.completed_at IS NULL) AS live,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'completed') AS completed,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'failed') AS failed,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'cancelled') AS cancelled,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'abandoned') AS abandoned,
  MAX(t.updated_at) AS last_change
FROM sessions AS s LEFT JOIN tasks AS t ON t.scope = s.scope
GROUP BY s.session_seq
ORDER BY s.session_seq
    """,
)

UNDO = (
    "DROP VIEW session_summary",
    "DROP VIEW recent_failures",
    "DROP VIEW task_history",
    "DROP VIEW live_tasks",
    "DROP TRIGGER tasks_terminal_is_final",
    "DROP TRIGGER tasks_live_is_kept",
    "DROP TRIGGER events_are_history",
    "DROP TABLE steps",
    "DROP TABLE handles",
    "DROP TABLE events",
    "DROP TABLE tasks",
    "DROP TABLE sessions",
    "DROP TABLE owners",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement.strip())


def downgrade() -> None:
    for statement in UNDO:
        op.execute(statement)
