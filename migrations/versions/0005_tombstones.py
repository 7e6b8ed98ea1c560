"""Tombstones: what is left of a task that was pruned; and a view of monitors."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
CREATE TABLE tombstones (
    task_seq INTEGER NOT NULL,
    scope TEXT NOT NULL,
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    handle_id TEXT,
    parent_seq INTEGER,
    idempotency_key TEXT,
    completed_at TEXT NOT NULL,
    pruned_at TEXT NOT NULL,
    first_event INTEGER NOT NULL,
    last_event INTEGER NOT NULL,
    PRIMARY KEY (task_seq),
    CONSTRAINT tombstones_kind CHECK (kind = 'monitor' OR kind = 'subagent' OR kind = 'observer' OR kind = 'other'),
    CONSTRAINT tombstones_state CHECK (state = 'completed' OR state = 'failed' OR state = 'cancelled' OR state = 'abandoned'),
    CONSTRAINT tombstones_events CHECK (first_event <= last_event)
)
 STRICT
    """,
    "CREATE INDEX tombstones_events ON tombstones (last_event)",
    "CREATE INDEX tombstones_handle ON tombstones (handle_id) WHERE handle_id IS NOT NULL",
    "CREATE INDEX tombstones_id ON tombstones (scope, id)",
    "CREATE INDEX tombstones_key ON tombstones (scope, idempotency_key) WHERE idempotency_key IS NOT NULL",
    # the newest event of the session that was taken away
    "ALTER TABLE sessions ADD COLUMN pruned_event INTEGER DEFAULT 0 NOT NULL",
    "ALTER TABLE sessions ADD COLUMN pruned_at TEXT",
    # when a task is taken away, SQLite looks for its handles
    "CREATE INDEX handles_task ON handles (task_seq)",
    """
CREATE VIEW live_monitors AS
SELECT t.scope, m.monitor_id, t.state, json_extract(t.process, '$.pid') AS process,
  json_extract(t.arguments, '$.spec.command') AS command,
  CAST((julianday('now') - julianday(t.created_at)) * 86400 AS INTEGER) AS age_seconds,
  m.lines, m.dropped, m.kept_lines,
  (SELECT COUNT(*) FROM updates AS u WHERE u.task_seq = t.task_seq AND u.acknowledged_at IS NULL) AS unread_lines,
  m.armed, m.wake_policy, m.throttled_at, o.pid AS owner_pid, t.id, t.task_seq
FROM monitors AS m JOIN tasks AS t ON t.task_seq = m.task_seq LEFT JOIN owners AS o ON o.owner_id = t.owner_id
WHERE t.completed_at IS NULL
ORDER BY +t.task_seq
    """,
)

UNDO = (
    "DROP VIEW live_monitors",
    "DROP TABLE tombstones",
    "ALTER TABLE sessions DROP COLUMN pruned_at",
    "ALTER TABLE sessions DROP COLUMN pruned_event",
    "DROP INDEX handles_task",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement.strip())


def downgrade() -> None:
    """Take the tombstones away: of what was pruned nothing is left, and it is unknown."""
    for statement in UNDO:
        op.execute(statement.strip())
