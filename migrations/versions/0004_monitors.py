"""Monitors: the process that runs for a task, what monitors wrote, and who reads it."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

STATEMENTS = (
    "DROP VIEW live_tasks",
    "DROP TRIGGER tasks_terminal_is_final",
    """
ALTER TABLE sessions ADD COLUMN updates_claim TEXT CONSTRAINT sessions_updates_claim_json CHECK (updates_claim IS NULL OR json_valid(updates_claim))
    """,
    "ALTER TABLE sessions ADD COLUMN update_bytes INTEGER DEFAULT 0 NOT NULL",
    "CREATE INDEX sessions_inbox_read ON sessions (scope, inbox_claim) WHERE inbox_claim IS NOT NULL",
    "CREATE INDEX sessions_updates_read ON sessions (scope, updates_claim) WHERE updates_claim IS NOT NULL",
    "CREATE INDEX inbox_unread_of_task ON inbox (task_seq) WHERE acknowledged_at IS NULL",
    "ALTER TABLE tasks ADD COLUMN process TEXT CONSTRAINT tasks_process_json CHECK (process IS NULL OR json_valid(process))",
    "CREATE INDEX tasks_process ON tasks (owner_id) WHERE process IS NOT NULL",
    """
CREATE TABLE monitors (
    task_seq INTEGER NOT NULL,
    scope TEXT NOT NULL,
    monitor_id TEXT NOT NULL,
    wake_policy TEXT NOT NULL,
    armed INTEGER NOT NULL,
    lines INTEGER DEFAULT 0 NOT NULL,
    bytes INTEGER DEFAULT 0 NOT NULL,
    dropped INTEGER DEFAULT 0 NOT NULL,
    kept_lines INTEGER DEFAULT 0 NOT NULL,
    kept_bytes INTEGER DEFAULT 0 NOT NULL,
    throttled_at TEXT,
    exit_status INTEGER,
    PRIMARY KEY (task_seq),
    CONSTRAINT monitors_wake_policy CHECK (wake_policy = 'notify' OR wake_policy = 'queue_turn'),
    CONSTRAINT monitors_armed CHECK (armed = 0 OR armed = 1),
    CONSTRAINT monitors_counts CHECK (lines >= 0 AND dropped BETWEEN 0 AND lines AND kept_lines BETWEEN 0 AND lines),
    CONSTRAINT monitors_sizes CHECK (bytes >= 0 AND kept_bytes >= 0),
    FOREIGN KEY(task_seq) REFERENCES tasks (task_seq),
    FOREIGN KEY(scope) REFERENCES sessions (scope)
)
 STRICT
    """,
    "CREATE INDEX monitors_id ON monitors (scope, monitor_id)",
    "CREATE INDEX monitors_kept ON monitors (scope, monitor_id) WHERE kept_lines > 0",
    "CREATE INDEX monitors_armed ON monitors (scope) WHERE armed = 1",
    """
CREATE TABLE updates (
    update_seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    scope TEXT NOT NULL,
    task_seq INTEGER NOT NULL,
    monitor_id TEXT NOT NULL,
    line INTEGER NOT NULL,
    stream TEXT NOT NULL,
    text TEXT NOT NULL,
    is_cut INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    at TEXT NOT NULL,
    claim TEXT,
    acknowledged_at TEXT,
    CONSTRAINT updates_stream CHECK (stream = 'stdout' OR stream = 'stderr'),
    CONSTRAINT updates_is_cut CHECK (is_cut = 0 OR is_cut = 1),
    FOREIGN KEY(scope) REFERENCES sessions (scope),
    FOREIGN KEY(task_seq) REFERENCES tasks (task_seq)
)
 STRICT
    """,
    "CREATE INDEX updates_scope ON updates (scope)",
    "CREATE INDEX updates_task ON updates (task_seq)",
    "CREATE INDEX updates_unread ON updates (scope) WHERE acknowledged_at IS NULL",
    "CREATE INDEX updates_unread_of_task ON updates (task_seq) WHERE acknowledged_at IS NULL",
    """
CREATE TRIGGER tasks_terminal_is_final
BEFORE UPDATE ON tasks
WHEN OLD.completed_at IS NOT NULL AND (
  NEW.task_seq IS NOT OLD.task_seq
  OR NEW.id IS NOT OLD.id
  OR NEW.kind IS NOT OLD.kind
  OR NEW.mode IS NOT OLD.mode
  OR NEW.state IS NOT OLD.state
  OR NEW.label IS NOT OLD.label
  OR NEW.function IS NOT OLD.function
  OR NEW.recovery IS NOT OLD.recovery
  OR NEW.cancel_policy IS NOT OLD.cancel_policy
  OR NEW.arguments IS NOT OLD.arguments
  OR NEW.attempt IS NOT OLD.attempt
  OR NEW.attempts_spent IS NOT OLD.attempts_spent
  OR NEW.max_attempts IS NOT OLD.max_attempts
  OR NEW.owner_id IS NOT OLD.owner_id
  OR NEW.progress IS NOT OLD.progress
  OR NEW.fraction IS NOT OLD.fraction
  OR NEW.result IS NOT OLD.result
  OR NEW.failure IS NOT OLD.failure
  OR NEW.evidence IS NOT OLD.evidence
  OR NEW.cancel_reason IS NOT OLD.cancel_reason
  OR NEW.cancel_requested_by IS NOT OLD.cancel_requested_by
  OR NEW.cancel_requested_at IS NOT OLD.cancel_requested_at
  OR NEW.created_at IS NOT OLD.created_at
  OR NEW.started_at IS NOT OLD.started_at
  OR NEW.updated_at IS NOT OLD.updated_at
  OR NEW.completed_at IS NOT OLD.completed_at
  OR NEW.parent_seq IS NOT OLD.parent_seq
  OR NEW.child_session_id IS NOT OLD.child_session_id
  OR NEW.close_policy IS NOT OLD.close_policy
  OR NEW.idempotency_key IS NOT OLD.idempotency_key
  OR NEW.notify_on_end IS NOT OLD.notify_on_end
  OR NEW.has_callback IS NOT OLD.has_callback
  OR NEW.callback_begun_at IS NOT OLD.callback_begun_at
  OR NEW.callback_error IS NOT OLD.callback_error
  OR NEW.version IS NOT OLD.version
  OR NEW.timeout IS NOT OLD.timeout
  OR NEW.deadline IS NOT OLD.deadline
  OR NEW.not_before IS NOT OLD.not_before
  OR NEW.last_error IS NOT OLD.last_error
  OR NEW.waiting_for IS NOT OLD.waiting_for
  OR NEW.process IS NOT OLD.process
)
BEGIN
  SELECT RAISE(ABORT, 'a finished task keeps its outcome');
END
    """,
    """
CREATE VIEW live_tasks AS
SELECT t.scope, t.id, t.kind, t.state, t.attempt,
  CASE WHEN t.fraction IS NULL THEN NULL ELSE printf('%.0f%%', t.fraction * 100) END AS done,
  t.progress, t.waiting_for, t.not_before, t.deadline,
  CAST((julianday('now') - julianday(t.created_at)) * 86400 AS INTEGER) AS age_seconds,
  o.pid, json_extract(t.process, '$.pid') AS process,
  t.owner_id, t.label, t.mode, t.recovery, t.task_seq, t.parent_seq, t.child_session_id
FROM tasks AS t LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL
ORDER BY +t.task_seq
    """,
)

UNDO = (
    "DROP VIEW live_tasks",
    "DROP TRIGGER tasks_terminal_is_final",
    "DROP TABLE updates",
    "DROP TABLE monitors",
    "DROP INDEX sessions_updates_read",
    "DROP INDEX sessions_inbox_read",
    "DROP INDEX inbox_unread_of_task",
    "DROP INDEX tasks_process",
    "ALTER TABLE tasks DROP COLUMN process",
    "ALTER TABLE sessions DROP COLUMN update_bytes",
    "ALTER TABLE sessions DROP COLUMN updates_claim",
    """
CREATE TRIGGER tasks_terminal_is_final
BEFORE UPDATE ON tasks
WHEN OLD.completed_at IS NOT NULL AND (
  NEW.task_seq IS NOT OLD.task_seq
  OR NEW.id IS NOT OLD.id
  OR NEW.kind IS NOT OLD.kind
  OR NEW.mode IS NOT OLD.mode
  OR NEW.state IS NOT OLD.state
  OR NEW.label IS NOT OLD.label
  OR NEW.function IS NOT OLD.function
  OR NEW.recovery IS NOT OLD.recovery
  OR NEW.cancel_policy IS NOT OLD.cancel_policy
  OR NEW.arguments IS NOT OLD.arguments
  OR NEW.attempt IS NOT OLD.attempt
  OR NEW.attempts_spent IS NOT OLD.attempts_spent
  OR NEW.max_attempts IS NOT OLD.max_attempts
  OR NEW.owner_id IS NOT OLD.owner_id
  OR NEW.progress IS NOT OLD.progress
  OR NEW.fraction IS NOT OLD.fraction
  OR NEW.result IS NOT OLD.result
  OR NEW.failure IS NOT OLD.failure
  OR NEW.evidence IS NOT OLD.evidence
  OR NEW.cancel_reason IS NOT OLD.cancel_reason
  OR NEW.cancel_requested_by IS NOT OLD.cancel_requested_by
  OR NEW.cancel_requested_at IS NOT OLD.cancel_requested_at
  OR NEW.created_at IS NOT OLD.created_at
  OR NEW.started_at IS NOT OLD.started_at
  OR NEW.updated_at IS NOT OLD.updated_at
  OR NEW.completed_at IS NOT OLD.completed_at
  OR NEW.parent_seq IS NOT OLD.parent_seq
  OR NEW.child_session_id IS NOT OLD.child_session_id
  OR NEW.close_policy IS NOT OLD.close_policy
  OR NEW.idempotency_key IS NOT OLD.idempotency_key
  OR NEW.notify_on_end IS NOT OLD.notify_on_end
  OR NEW.has_callback IS NOT OLD.has_callback
  OR NEW.callback_begun_at IS NOT OLD.callback_begun_at
  OR NEW.callback_error IS NOT OLD.callback_error
  OR NEW.version IS NOT OLD.version
  OR NEW.timeout IS NOT OLD.timeout
  OR NEW.deadline IS NOT OLD.deadline
  OR NEW.not_before IS NOT OLD.not_before
  OR NEW.last_error IS NOT OLD.last_error
  OR NEW.waiting_for IS NOT OLD.waiting_for
)
BEGIN
  SELECT RAISE(ABORT, 'a finished task keeps its outcome');
END
    """,
    """
CREATE VIEW live_tasks AS
SELECT t.scope, t.id, t.kind, t.state, t.attempt,
  CASE WHEN t.fraction IS NULL THEN NULL ELSE printf('%.0f%%', t.fraction * 100) END AS done,
  t.progress, t.waiting_for, t.not_before, t.deadline,
  CAST((julianday('now') - julianday(t.created_at)) * 86400 AS INTEGER) AS age_seconds,
  o.pid, t.owner_id, t.label, t.mode, t.recovery, t.task_seq, t.parent_seq, t.child_session_id
FROM tasks AS t LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL
ORDER BY +t.task_seq
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement.strip())


def downgrade() -> None:
    """Take monitors' updates and counts away, and what was recorded of their processes; their tasks stay."""
    for statement in UNDO:
        op.execute(statement.strip())
