"""What bodies remember: steps, sleeps and signals; retries, time-outs, deadlines, and the version of the code."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STATEMENTS = (
    "DROP VIEW live_tasks",
    "DROP TRIGGER tasks_terminal_is_final",
    "ALTER TABLE tasks ADD COLUMN version TEXT",
    "ALTER TABLE tasks ADD COLUMN timeout REAL CONSTRAINT tasks_timeout CHECK (timeout > 0.0)",
    "ALTER TABLE tasks ADD COLUMN deadline TEXT",
    """
ALTER TABLE tasks ADD COLUMN not_before TEXT CONSTRAINT tasks_not_before CHECK (not_before IS NULL OR state = 'pending')
    """,
    """
ALTER TABLE tasks ADD COLUMN last_error TEXT CONSTRAINT tasks_last_error_json CHECK (last_error IS NULL OR json_valid(last_error))
    """,
    """
ALTER TABLE tasks ADD COLUMN waiting_for TEXT CONSTRAINT tasks_waiting_for CHECK (waiting_for IS NULL OR state = 'waiting')
    """,
    """
ALTER TABLE steps ADD COLUMN state TEXT DEFAULT 'done' NOT NULL CONSTRAINT steps_state CHECK (state = 'begun' OR state = 'retrying' OR state = 'done' OR state = 'failed')
    """,
    "ALTER TABLE steps ADD COLUMN tries INTEGER DEFAULT 1 NOT NULL CONSTRAINT steps_tries CHECK (tries >= 0)",
    """
ALTER TABLE steps ADD COLUMN failure TEXT CONSTRAINT steps_failure_json CHECK (failure IS NULL OR json_valid(failure))
    """,
    "ALTER TABLE steps ADD COLUMN begun_at TEXT",
    "ALTER TABLE steps ADD COLUMN wake_at TEXT",
    "CREATE INDEX steps_begun ON steps (task_seq) WHERE state = 'begun'",
    """
CREATE TABLE signals (
    signal_seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    task_seq INTEGER NOT NULL,
    name TEXT NOT NULL,
    "key" TEXT,
    payload TEXT NOT NULL,
    sent_at TEXT NOT NULL,
    sent_by TEXT NOT NULL,
    taken_at TEXT,
    taken_attempt INTEGER,
    CONSTRAINT signals_key UNIQUE (task_seq, "key"),
    CONSTRAINT signals_payload_json CHECK (json_valid(payload)),
    FOREIGN KEY(task_seq) REFERENCES tasks (task_seq)
)
 STRICT
    """,
    "CREATE INDEX signals_untaken ON signals (task_seq, name) WHERE taken_at IS NULL",
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

UNDO = (
    "DROP VIEW live_tasks",
    "DROP TRIGGER tasks_terminal_is_final",
    "DROP TABLE signals",
    "DROP INDEX steps_begun",
    "DELETE FROM steps WHERE kind <> 'checkpoint'",
    "ALTER TABLE steps DROP COLUMN wake_at",
    "ALTER TABLE steps DROP COLUMN begun_at",
    "ALTER TABLE steps DROP COLUMN failure",
    "ALTER TABLE steps DROP COLUMN tries",
    "ALTER TABLE steps DROP COLUMN state",
    "ALTER TABLE tasks DROP COLUMN waiting_for",
    "ALTER TABLE tasks DROP COLUMN last_error",
    "ALTER TABLE tasks DROP COLUMN not_before",
    "ALTER TABLE tasks DROP COLUMN deadline",
    "ALTER TABLE tasks DROP COLUMN timeout",
    "ALTER TABLE tasks DROP COLUMN version",
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
)
BEGIN
  SELECT RAISE(ABORT, 'a finished task keeps its outcome');
END
    """,
    """
CREATE VIEW live_tasks AS
SELECT t.scope, t.id, t.kind, t.state, t.attempt,
  CASE WHEN t.fraction IS NULL THEN NULL ELSE printf('%.0f%%', t.fraction * 100) END AS done,
  t.progress,
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
    """Take the new columns and tables away, and with them steps, sleeps, signals and deadlines; tasks and checkpoints stay."""
    for statement in UNDO:
        op.execute(statement.strip())
