"""Sessions at work: parents, hidden and external work, close policies, the inbox and handoffs."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    "DROP VIEW live_tasks",
    "DROP VIEW session_summary",
    "ALTER TABLE sessions ADD COLUMN parent TEXT",
    """
ALTER TABLE sessions ADD COLUMN sync_needed INTEGER DEFAULT 0 NOT NULL CONSTRAINT sessions_sync_needed CHECK (sync_needed = 0 OR sync_needed = 1)
    """,
    """
ALTER TABLE sessions ADD COLUMN inbox_claim TEXT CONSTRAINT sessions_inbox_claim_json CHECK (inbox_claim IS NULL OR json_valid(inbox_claim))
    """,
    "ALTER TABLE sessions ADD COLUMN reopened_after INTEGER DEFAULT 0 NOT NULL",
    """
ALTER TABLE sessions ADD COLUMN reopened_amid TEXT CONSTRAINT sessions_reopened_amid_json CHECK (reopened_amid IS NULL OR json_valid(reopened_amid))
    """,
    "ALTER TABLE tasks ADD COLUMN parent_seq INTEGER",
    "ALTER TABLE tasks ADD COLUMN child_session_id TEXT",
    """
ALTER TABLE tasks ADD COLUMN close_policy TEXT DEFAULT 'keep' NOT NULL CONSTRAINT tasks_close_policy CHECK (close_policy = 'keep' OR close_policy = 'cancel' OR close_policy = 'transfer')
    """,
    "ALTER TABLE tasks ADD COLUMN idempotency_key TEXT",
    """
ALTER TABLE tasks ADD COLUMN notify_on_end INTEGER DEFAULT 0 NOT NULL CONSTRAINT tasks_notify_on_end CHECK (notify_on_end = 0 OR notify_on_end = 1)
    """,
    """
ALTER TABLE tasks ADD COLUMN has_callback INTEGER DEFAULT 0 NOT NULL CONSTRAINT tasks_has_callback CHECK (has_callback = 0 OR has_callback = 1)
    """,
    "ALTER TABLE tasks ADD COLUMN callback_begun_at TEXT",
    """
ALTER TABLE tasks ADD COLUMN callback_error TEXT CONSTRAINT tasks_callback_error_json CHECK (callback_error IS NULL OR json_valid(callback_error))
    """,
    """
CREATE TABLE handoffs (
    handoff_seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    handoff_id TEXT NOT NULL,
    is_named INTEGER NOT NULL,
    source TEXT NOT NULL,
    destination TEXT NOT NULL,
    kept TEXT NOT NULL,
    moved TEXT NOT NULL,
    cancelled TEXT NOT NULL,
    at TEXT NOT NULL,
    CONSTRAINT handoffs_id UNIQUE (source, handoff_id),
    CONSTRAINT handoffs_is_named CHECK (is_named = 0 OR is_named = 1),
    CONSTRAINT handoffs_kept_json CHECK (json_valid(kept)),
    CONSTRAINT handoffs_moved_json CHECK (json_valid(moved)),
    CONSTRAINT handoffs_cancelled_json CHECK (json_valid(cancelled)),
    FOREIGN KEY(source) REFERENCES sessions (scope),
    FOREIGN KEY(destination) REFERENCES sessions (scope)
)
 STRICT
    """,
    "CREATE UNIQUE INDEX handoffs_unnamed ON handoffs (source, destination) WHERE is_named = 0",
    """
CREATE TABLE inbox (
    note_seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    scope TEXT NOT NULL,
    "key" TEXT NOT NULL,
    task_seq INTEGER,
    task_id TEXT,
    text TEXT NOT NULL,
    data TEXT NOT NULL,
    posted_at TEXT NOT NULL,
    claim TEXT,
    acknowledged_at TEXT,
    CONSTRAINT inbox_key UNIQUE (task_seq, "key"),
    CONSTRAINT inbox_data_json CHECK (json_valid(data)),
    FOREIGN KEY(scope) REFERENCES sessions (scope)
)
 STRICT
    """,
    "CREATE INDEX inbox_scope ON inbox (scope)",
    "CREATE INDEX inbox_unread ON inbox (scope) WHERE acknowledged_at IS NULL",
    "CREATE INDEX tasks_agents ON tasks (scope, child_session_id) WHERE child_session_id IS NOT NULL",
    "CREATE INDEX tasks_child_session ON tasks (child_session_id) WHERE child_session_id IS NOT NULL",
    "CREATE INDEX tasks_children ON tasks (parent_seq) WHERE parent_seq IS NOT NULL",
    """
CREATE INDEX tasks_hidden_failed ON tasks (scope) WHERE mode = 'hidden' AND (state = 'failed' OR state = 'abandoned')
    """,
    "CREATE INDEX tasks_idempotency ON tasks (scope, idempotency_key) WHERE idempotency_key IS NOT NULL",
    """
CREATE INDEX tasks_live_agents ON tasks (child_session_id) WHERE completed_at IS NULL AND child_session_id IS NOT NULL
    """,
    "CREATE INDEX tasks_live_children ON tasks (parent_seq) WHERE completed_at IS NULL AND parent_seq IS NOT NULL",
    "DROP TRIGGER tasks_terminal_is_final",
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
    "CREATE UNIQUE INDEX handles_observers ON handles (scope, task_seq) WHERE role = 'observer'",
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
    """
CREATE VIEW session_summary AS
SELECT s.scope, s.parent, s.opened_at, s.closed_at,
  COUNT(t.task_seq) FILTER (WHERE t.completed_at IS NULL) AS live,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'completed') AS completed,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'failed') AS failed,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'cancelled') AS cancelled,
  COUNT(t.task_seq) FILTER (WHERE t.state = 'abandoned') AS abandoned,
  (SELECT COUNT(*) FROM inbox AS n WHERE n.scope = s.scope AND n.acknowledged_at IS NULL) AS unread_notes,
  MAX(t.updated_at) AS last_change
FROM sessions AS s LEFT JOIN tasks AS t ON t.scope = s.scope
GROUP BY s.session_seq
ORDER BY s.session_seq
    """,
)

UNDO = (
    "DROP VIEW live_tasks",
    "DROP VIEW session_summary",
    "DROP TABLE handoffs",
    "DROP TABLE inbox",
    "DROP INDEX handles_observers",
    "DROP INDEX tasks_live_agents",
    "DROP INDEX tasks_live_children",
    "DROP INDEX tasks_agents",
    "DROP INDEX tasks_idempotency",
    "DROP INDEX tasks_hidden_failed",
    "DROP INDEX tasks_children",
    "DROP INDEX tasks_child_session",
    "DROP TRIGGER tasks_terminal_is_final",
    "ALTER TABLE tasks DROP COLUMN callback_error",
    "ALTER TABLE tasks DROP COLUMN callback_begun_at",
    "ALTER TABLE tasks DROP COLUMN has_callback",
    "ALTER TABLE tasks DROP COLUMN notify_on_end",
    "ALTER TABLE tasks DROP COLUMN idempotency_key",
    "ALTER TABLE tasks DROP COLUMN close_policy",
    "ALTER TABLE tasks DROP COLUMN child_session_id",
    "ALTER TABLE tasks DROP COLUMN parent_seq",
    "ALTER TABLE sessions DROP COLUMN reopened_amid",
    "ALTER TABLE sessions DROP COLUMN reopened_after",
    "ALTER TABLE sessions DROP COLUMN inbox_claim",
    "ALTER TABLE sessions DROP COLUMN sync_needed",
    "ALTER TABLE sessions DROP COLUMN parent",
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


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement.strip())


def downgrade() -> None:
    """Take the new columns and tables away, and with them parents, notes and handoffs; the tasks stay."""
    for statement in UNDO:
        op.execute(statement.strip())
