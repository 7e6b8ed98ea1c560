"""
Owns the promises of ``docs/promises.md`` that a file and an observers' log can be asked about: each a few SQL queries.

A query returns what breaks the promise: nothing, if it is kept. ``f`` is the file; the tables of the log are those of `log`.
``differs`` and ``holes`` hold what is found in a pass over the events (`folding`), ``known`` every task that is or was there.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PROMISES", "Promise"]


class Promise(NamedTuple):
    """A promise: its number, what it says, and the queries that find it broken, by name."""

    number: str
    says: str
    queries: dict[str, str]


_ARG = "json_extract(k.args, '$.{}')"
_GOT = "json_extract(k.result, '$.{}')"


def _lost(op: str, condition: str, *, what: str = "json_extract(k.result, '$.task_seq')") -> str:
    """Return the query for acknowledged operations without effect: *condition* is what must hold in the file."""
    ops = " OR ".join(f"k.op = '{one}'" for one in op.split())
    return (
        f"SELECT k.n, k.op, 'call ' || k.who || '/' || k.call, 'of ' || coalesce({what}, k.args) "
        f"FROM acknowledged AS k WHERE ({ops}) AND NOT ({condition})"
    )


_PRUNED = "EXISTS (SELECT 1 FROM f.tombstones AS g WHERE g.task_seq = json_extract(k.result, '$.task_seq'))"
_TASK = "EXISTS (SELECT 1 FROM f.tasks AS t WHERE t.task_seq = json_extract(k.result, '$.task_seq') AND {})"
_EVENT = "EXISTS (SELECT 1 FROM f.events AS e WHERE e.task_seq = json_extract(k.result, '$.task_seq') AND {})"


def _or_pruned(condition: str) -> str:
    return f"{_PRUNED} OR {condition}"


# since a store had recovered alone, nobody else has said anything: who has not even begun has opened nothing
_QUIET = (
    "(SELECT max(n) FROM quiet) > coalesce((SELECT max(n) FROM heard "
    "WHERE who <> (SELECT q.who FROM quiet AS q ORDER BY q.n DESC LIMIT 1)), 0)"
)
_CREATED = "spawn spawn_hidden register start_monitor spawn_child"

PROMISES: tuple[Promise, ...] = (
    Promise(
        "P1",
        "an acknowledged operation is never lost",
        {
            "session": _lost(
                "session",
                "EXISTS (SELECT 1 FROM f.sessions AS s WHERE s.scope = json_extract(k.args, '$.scope'))",
                what="json_extract(k.args, '$.scope')",
            ),
            "session closed": _lost(
                "close",
                "EXISTS (SELECT 1 FROM f.events AS e WHERE e.type = 'session_closed' AND "
                "e.scope = json_extract(k.args, '$.scope'))",
                what="json_extract(k.args, '$.scope')",
            ),
            "created": _lost(
                _CREATED,
                "EXISTS (SELECT 1 FROM known AS t WHERE t.task_seq = json_extract(k.result, '$.task_seq') "
                "AND t.id = json_extract(k.args, '$.id') "
                "AND (json_extract(k.args, '$.key') IS NULL OR t.key IS json_extract(k.args, '$.key')))",
            ),
            "cancel requested": _lost(
                "cancel stop_monitor",
                _or_pruned(_TASK.format("t.completed_at IS NOT NULL OR t.cancel_requested_at IS NOT NULL")),
            ),
            "all cancels requested": (
                "SELECT k.n, k.op, 'call ' || k.who || '/' || k.call, t.task_seq, t.state "
                "FROM acknowledged AS k, json_each(k.result, '$.tasks') AS j "
                "JOIN f.tasks AS t ON t.task_seq = json_extract(j.value, '$.task_seq') "
                "WHERE k.op IN ('cancel_all', 'cancel_unreferenced') "
                "AND t.completed_at IS NULL AND t.cancel_requested_at IS NULL"
            ),
            "settled": _lost(
                "complete",
                _or_pruned(_TASK.format("t.completed_at IS NOT NULL")),
            ),
            "progress": _lost(
                "update progress",
                "coalesce(json_extract(k.result, '$.verdict'), 'applied') <> 'applied' OR "
                + _or_pruned(
                    _EVENT.format(
                        "e.type = 'progress' AND json_extract(e.data, '$.progress') = json_extract(k.args, '$.text')"
                    )
                ),
            ),
            "abandoned": _lost(
                "abandon",
                _or_pruned(
                    _TASK.format("t.completed_at IS NOT NULL OR t.attempt >= json_extract(k.result, '$.attempt')")
                ),
            ),
            "signal": _lost(
                "signal",
                "json_extract(k.result, '$.verdict') = 'superseded' OR "
                + _or_pruned(
                    "EXISTS (SELECT 1 FROM f.signals AS s WHERE s.task_seq = json_extract(k.result, '$.task_seq') "
                    "AND s.key = json_extract(k.args, '$.key'))"
                ),
            ),
            "note": _lost(
                "notify",
                _or_pruned(
                    "EXISTS (SELECT 1 FROM f.inbox AS b WHERE b.task_seq = json_extract(k.result, '$.task_seq') "
                    "AND b.key = json_extract(k.args, '$.key'))"
                ),
            ),
            "checkpoint": _lost(
                "save",
                _or_pruned(
                    "EXISTS (SELECT 1 FROM f.steps AS s WHERE s.task_seq = json_extract(k.result, '$.task_seq') "
                    "AND s.kind = 'checkpoint' AND json_extract(s.value, '$.n') >= json_extract(k.args, '$.n'))"
                ),
            ),
            "step": _lost(
                "step transact",
                _or_pruned(
                    "EXISTS (SELECT 1 FROM f.steps AS s WHERE s.task_seq = json_extract(k.result, '$.task_seq') "
                    "AND s.kind = k.op AND s.name = json_extract(k.args, '$.name') AND s.state = 'done')"
                ),
            ),
            "moved": (
                "SELECT k.n, k.op, 'call ' || k.who || '/' || k.call, j.value "
                "FROM acknowledged AS k, json_each(k.result, '$.moved') AS j "
                "WHERE k.op IN ('transfer', 'handoff') "
                "AND json_extract(k.args, '$.scope') <> json_extract(k.args, '$.to') "
                "AND NOT EXISTS (SELECT 1 FROM f.tombstones AS g WHERE g.task_seq = j.value) "
                "AND NOT EXISTS (SELECT 1 FROM f.events AS e WHERE e.task_seq = j.value AND e.type = 'transferred' "
                "AND e.scope = json_extract(k.args, '$.to') AND e.from_scope = json_extract(k.args, '$.scope'))"
            ),
            "handoff": _lost(
                "handoff",
                "EXISTS (SELECT 1 FROM f.handoffs AS h WHERE h.handoff_id = json_extract(k.result, '$.handoff_id') "
                "AND h.source = json_extract(k.args, '$.scope') AND h.destination = json_extract(k.args, '$.to'))",
                what="json_extract(k.result, '$.handoff_id')",
            ),
            "observer": _lost(
                "observe",
                _or_pruned(
                    "EXISTS (SELECT 1 FROM f.handles AS h WHERE h.handle_id = json_extract(k.result, '$.handle') "
                    "AND h.task_seq = json_extract(k.result, '$.task_seq'))"
                ),
            ),
            "read mark": _lost(
                "result",
                _or_pruned(
                    # who is given a task reads its outcome for itself, whoever waited for it before
                    "EXISTS (SELECT 1 FROM f.handles AS h WHERE h.task_seq = json_extract(k.result, '$.task_seq') "
                    "AND h.role = 'owner' AND (h.read_at IS NOT NULL OR h.scope <> json_extract(k.args, '$.scope')))"
                ),
            ),
            "acknowledged notes": (
                "SELECT k.n, k.op, 'call ' || k.who || '/' || k.call, 'note ' || j.value "
                "FROM acknowledged AS k, json_each(k.result, '$.notes') AS j JOIN f.inbox AS b ON b.note_seq = j.value "
                "WHERE k.op = 'inbox' AND b.acknowledged_at IS NULL"
            ),
            "seen ends": (
                "SELECT o.n, o.op, 'told of the end', o.task_seq, o.state FROM told AS o "
                "WHERE o.state IN ('completed', 'failed', 'cancelled', 'abandoned') "
                "AND NOT EXISTS (SELECT 1 FROM known AS t WHERE t.task_seq = o.task_seq AND t.state = o.state)"
            ),
            "seen events": (
                "SELECT d.n, d.who, 'was handed event ' || d.seq, d.type, d.task_seq FROM fed AS d "
                "LEFT JOIN f.events AS e ON e.seq = d.seq "
                "WHERE d.type <> 'pruned' AND (e.type IS NULL OR e.type <> d.type OR e.task_seq IS NOT d.task_seq) "
                "AND NOT (e.seq IS NULL AND EXISTS (SELECT 1 FROM f.tombstones AS g WHERE g.task_seq = d.task_seq))"
            ),
        },
    ),
    Promise(
        "P2",
        "nothing appears that was not asked for, and nothing twice",
        {
            "task": (
                "SELECT t.task_seq, t.scope, t.id, t.label FROM f.tasks AS t WHERE EXISTS (SELECT 1 FROM asked) "
                "AND CASE t.mode WHEN 'hidden' THEN t.label ELSE t.id END NOT IN (SELECT "
                "coalesce(json_extract(s.args, '$.id'), json_extract(s.args, '$.label')) FROM asked AS s "
                "WHERE coalesce(json_extract(s.args, '$.id'), json_extract(s.args, '$.label')) IS NOT NULL)"
            ),
            "task twice": (
                "SELECT t.key, count(*), 'tasks of one key' FROM known AS t WHERE t.key IS NOT NULL "
                "AND t.key NOT LIKE 'child:%' "
                "GROUP BY t.key, t.key_of HAVING count(*) > 1"
            ),
            "session": (
                "SELECT s.scope FROM f.sessions AS s WHERE EXISTS (SELECT 1 FROM asked) "
                "AND s.scope NOT IN (SELECT json_extract(a.args, '$.scope') FROM asked AS a WHERE a.op = 'session')"
            ),
            "signal": (
                "SELECT s.task_seq, s.name, s.key FROM f.signals AS s WHERE EXISTS (SELECT 1 FROM asked) "
                "AND s.key NOT IN (SELECT json_extract(a.args, '$.key') FROM asked AS a WHERE a.op = 'signal')"
            ),
            "handoff": (
                "SELECT h.handoff_seq, h.handoff_id FROM f.handoffs AS h WHERE EXISTS (SELECT 1 FROM asked) "
                "AND NOT EXISTS (SELECT 1 FROM asked AS a WHERE a.op = 'handoff' "
                "AND json_extract(a.args, '$.scope') = h.source AND json_extract(a.args, '$.to') = h.destination)"
            ),
            "refused, and there": (
                "SELECT s.n, s.op, r.error, s.args FROM asked AS s JOIN refused AS r ON r.who = s.who AND r.call = s.call "
                "JOIN known AS t ON t.key = json_extract(s.args, '$.key') "
                "WHERE NOT r.in_doubt AND json_extract(s.args, '$.key') IS NOT NULL "
                "AND s.op IN ('spawn', 'spawn_hidden', 'register')"
            ),
            "effect twice": "SELECT task_seq, name, n, 'times' FROM effects WHERE n > 1",
            "effect without its step": (
                "SELECT x.task_seq, x.name, 'has an effect and no step' FROM effects AS x "
                "WHERE EXISTS (SELECT 1 FROM f.tasks AS t WHERE t.task_seq = x.task_seq) AND NOT EXISTS "
                "(SELECT 1 FROM f.steps AS s WHERE s.task_seq = x.task_seq AND s.name = x.name AND s.kind = 'transact')"
            ),
        },
    ),
    Promise(
        "P3",
        "a task, its first event and its owner's handle appear together or not at all",
        {
            "first event": (
                "SELECT t.task_seq, t.id, 'first event', "
                "coalesce((SELECT e.type FROM f.events AS e WHERE e.task_seq = t.task_seq ORDER BY e.seq LIMIT 1), 'none') "
                "FROM f.tasks AS t WHERE coalesce((SELECT e.type FROM f.events AS e WHERE e.task_seq = t.task_seq "
                "ORDER BY e.seq LIMIT 1), 'none') <> 'registered' OR "
                "(SELECT count(*) FROM f.events AS e WHERE e.task_seq = t.task_seq AND e.type = 'registered') <> 1"
            ),
            "owner's handle": (
                "SELECT t.task_seq, t.id, 'owner handles', count(h.handle_seq) FROM f.tasks AS t "
                "LEFT JOIN f.handles AS h ON h.task_seq = t.task_seq AND h.role = 'owner' "
                "GROUP BY t.task_seq HAVING count(h.handle_seq) <> 1"
            ),
            "orphans": (
                "SELECT 'event', e.seq, e.task_seq FROM f.events AS e WHERE e.task_seq IS NOT NULL "
                "AND NOT EXISTS (SELECT 1 FROM f.tasks AS t WHERE t.task_seq = e.task_seq) UNION ALL "
                "SELECT 'handle', h.handle_id, h.task_seq FROM f.handles AS h "
                "WHERE NOT EXISTS (SELECT 1 FROM f.tasks AS t WHERE t.task_seq = h.task_seq) UNION ALL "
                "SELECT 'step', s.name, s.task_seq FROM f.steps AS s "
                "WHERE NOT EXISTS (SELECT 1 FROM f.tasks AS t WHERE t.task_seq = s.task_seq) UNION ALL "
                "SELECT 'signal', s.signal_seq, s.task_seq FROM f.signals AS s "
                "WHERE NOT EXISTS (SELECT 1 FROM f.tasks AS t WHERE t.task_seq = s.task_seq)"
            ),
            "row and tombstone": "SELECT t.task_seq, t.id FROM f.tasks AS t JOIN f.tombstones AS g USING (task_seq)",
        },
    ),
    Promise(
        "P4",
        "what survives is a prefix, in the order of acknowledgement",
        {
            "hole": (
                "SELECT l.n, l.op, 'is lost, and a later one is there:', "
                "(SELECT max(k.n) FROM acknowledged AS k JOIN known AS t ON t.task_seq = json_extract(k.result, '$.task_seq') "
                "WHERE k.op = 'spawn') AS last FROM acknowledged AS l WHERE l.op = 'spawn' "
                "AND NOT EXISTS (SELECT 1 FROM known AS t WHERE t.task_seq = json_extract(l.result, '$.task_seq')) "
                "AND last > l.n"
            ),
            "events are told without a hole": "SELECT first, last, 'events are missing' FROM holes",
        },
    ),
    Promise(
        "P5",
        "a row is what its events say, in every column",
        {"fold": "SELECT task_seq, what FROM differs WHERE rule = 'fold'"},
    ),
    Promise(
        "P6",
        "a task follows the table of states; the attempt rises by one at a start, or when it is given up, and never else",
        {
            "path": "SELECT task_seq, what FROM differs WHERE rule = 'path'",
            "attempt": "SELECT task_seq, what FROM differs WHERE rule = 'attempt'",
        },
    ),
    Promise(
        "P7",
        "an incarnation has at most one end, and nothing but a move follows it",
        {
            "ends": (
                "SELECT t.task_seq, t.id, t.state, 'ends:', count(e.seq) FROM f.tasks AS t LEFT JOIN f.events AS e "
                "ON e.task_seq = t.task_seq AND e.type IN ('completed', 'failed', 'cancelled', 'abandoned') "
                "GROUP BY t.task_seq HAVING count(e.seq) <> (t.completed_at IS NOT NULL)"
            ),
            "live": (
                "SELECT task_seq, state, completed_at FROM f.tasks "
                "WHERE (completed_at IS NULL) = (state IN ('completed', 'failed', 'cancelled', 'abandoned'))"
            ),
            "two live of one id": (
                "SELECT scope, id, count(*) FROM f.tasks WHERE completed_at IS NULL GROUP BY scope, id HAVING count(*) > 1"
            ),
        },
    ),
    Promise(
        "P8",
        "every answer that names an end names the one in the file: the loser of a race is told the winner",
        {
            "winner": (
                "SELECT o.n, o.op, o.task_seq, 'was told ' || o.state || ', the row says ' || t.state "
                "FROM told AS o JOIN known AS t ON t.task_seq = o.task_seq "
                "WHERE o.state IN ('completed', 'failed', 'cancelled', 'abandoned') AND t.state <> o.state"
            ),
            "live after its end": (
                "SELECT o.n, o.op, o.task_seq, 'was told ' || o.state || ' after ' || p.state FROM told AS o "
                "JOIN told AS p ON p.task_seq = o.task_seq AND p.n < o.asked_at "
                "WHERE o.state NOT IN ('completed', 'failed', 'cancelled', 'abandoned') "
                "AND p.state IN ('completed', 'failed', 'cancelled', 'abandoned')"
            ),
        },
    ),
    Promise(
        "P9",
        "one owner an attempt, and no write of a stale attempt accepted",
        {
            "claims": (
                "SELECT e.task_seq, e.attempt, count(*), 'starts' FROM f.events AS e JOIN f.tasks AS t USING (task_seq) "
                "WHERE e.type IN ('started', 'reattached') AND t.mode <> 'external' "
                "GROUP BY e.task_seq, e.attempt HAVING count(*) > 1"
            ),
            "bodies": (
                "SELECT task_seq, attempt, count(*), 'bodies', group_concat(who) FROM entered "
                "GROUP BY task_seq, attempt HAVING count(*) > 1"
            ),
            "stale progress": (
                "SELECT e.task_seq, e.seq, 'attempt ' || e.attempt || ' has what another wrote:', "
                "json_extract(e.data, '$.progress') FROM f.events AS e WHERE e.type = 'progress' "
                "AND json_extract(e.data, '$.progress') LIKE 'attempt %' "
                "AND json_extract(e.data, '$.progress') NOT LIKE 'attempt ' || e.attempt || ' %'"
            ),
            "stale step": (
                "SELECT s.task_seq, s.kind, s.name, 'of attempt ' || s.attempt || ' has what another wrote:', s.value "
                "FROM f.steps AS s WHERE json_type(s.value) = 'object' AND "
                "json_extract(s.value, '$.attempt') <> s.attempt"
            ),
            "stale save": (
                "SELECT s.task_seq, s.kind, s.name, 'is of attempt ' || s.attempt || ', its last event of', e.attempt "
                "FROM f.steps AS s JOIN f.events AS e ON e.seq = (SELECT max(l.seq) FROM f.events AS l "
                "WHERE l.task_seq = s.task_seq AND l.type = 'saved' "
                "AND coalesce(json_extract(l.data, '$.step_kind'), 'checkpoint') = s.kind "
                "AND coalesce(json_extract(l.data, '$.step'), '') = s.name) WHERE s.state = 'done' AND e.attempt <> s.attempt"
            ),
            "stale result": (
                "SELECT t.task_seq, t.id, 'of attempt ' || t.attempt || ' has what another wrote:', t.result "
                "FROM f.tasks AS t WHERE json_type(t.result) = 'object' AND "
                "json_extract(t.result, '$.attempt') <> t.attempt"
            ),
        },
    ),
    Promise(
        "P10",
        "no body runs without a claim of its attempt, by the owner that runs it",
        {
            "claimed": (
                "SELECT b.n, b.who, b.task_seq, 'attempt ' || b.attempt FROM entered AS b "
                "WHERE NOT EXISTS (SELECT 1 FROM f.tombstones AS g WHERE g.task_seq = b.task_seq) AND NOT EXISTS "
                "(SELECT 1 FROM f.events AS e WHERE e.task_seq = b.task_seq AND e.attempt = b.attempt "
                "AND e.type IN ('started', 'reattached') AND (NOT EXISTS (SELECT 1 FROM opened AS o WHERE o.who = b.who) "
                "OR json_extract(e.data, '$.owner_id') IN (SELECT o.owner_id FROM opened AS o WHERE o.who = b.who)))"
            ),
        },
    ),
    Promise(
        "P11",
        "once all owners are dead and one healthy store has opened, nothing live is left under a dead owner",
        {
            "left": (
                "SELECT t.task_seq, t.id, t.state, 'of owner ' || t.owner_id FROM f.tasks AS t "
                f"WHERE {_QUIET} "
                "AND t.completed_at IS NULL AND t.owner_id IS NOT NULL AND t.owner_id NOT IN "
                "(SELECT o.owner_id FROM opened AS o WHERE o.who = (SELECT q.who FROM quiet AS q ORDER BY q.n DESC LIMIT 1))"
            ),
            "owners": (
                "SELECT w.owner_id, w.pid, 'has not ended' FROM f.owners AS w "
                f"WHERE {_QUIET} "
                "AND w.ended_at IS NULL AND w.owner_id NOT IN "
                "(SELECT o.owner_id FROM opened AS o WHERE o.who = (SELECT q.who FROM quiet AS q ORDER BY q.n DESC LIMIT 1))"
            ),
        },
    ),
    Promise(
        "P12",
        "a cancel is durable, and 'cancelled' is written only once the body has left",
        {
            "forgotten": (
                "SELECT t.task_seq, t.id, t.state, 'had a cancel requested' FROM f.tasks AS t JOIN f.events AS e "
                "ON e.task_seq = t.task_seq AND e.type = 'cancel_requested' "
                "WHERE t.state IN ('pending', 'running', 'waiting') OR t.cancel_requested_at IS NULL"
            ),
            "early": (
                "SELECT c.task_seq, 'attempt ' || c.attempt || ' was still there when somebody saw it cancelled', first.n "
                "FROM f.events AS c JOIN (SELECT task_seq, min(n) AS n FROM "
                "(SELECT task_seq, n FROM told WHERE state = 'cancelled' UNION ALL "
                "SELECT task_seq, n FROM fed WHERE type = 'cancelled') GROUP BY task_seq) AS first "
                "ON first.task_seq = c.task_seq JOIN entered AS b ON b.task_seq = c.task_seq AND b.attempt = c.attempt "
                "WHERE c.type = 'cancelled' AND NOT EXISTS (SELECT 1 FROM departed AS x WHERE x.task_seq = c.task_seq "
                "AND x.attempt = c.attempt AND x.n < first.n) "
                "AND NOT EXISTS (SELECT 1 FROM killed AS d WHERE d.who = b.who AND d.n < first.n)"
            ),
            "begun after": (
                "SELECT b.n, b.task_seq, b.attempt, 'began after somebody saw its task ' || o.state FROM entered AS b "
                "JOIN told AS o ON o.task_seq = b.task_seq AND o.n < b.n AND b.attempt >= o.attempt "
                "AND o.state IN ('completed', 'failed', 'cancelled', 'abandoned')"
            ),
        },
    ),
    Promise(
        "P13",
        "every waiter is given the same answer, before and after a restart",
        {
            "answers": (
                "SELECT task_seq, count(DISTINCT digest), 'different answers' FROM told "
                "WHERE digest IS NOT NULL AND state IN ('completed', 'failed', 'cancelled', 'abandoned') "
                "GROUP BY task_seq HAVING count(DISTINCT digest) > 1"
            ),
            "row": (
                "SELECT o.n, o.op, o.task_seq, 'was told another outcome than the row has' FROM told AS o "
                "JOIN f.tasks AS t ON t.task_seq = o.task_seq WHERE o.digest IS NOT NULL AND t.completed_at IS NOT NULL "
                "AND o.state IN ('completed', 'failed', 'cancelled', 'abandoned') "
                "AND o.digest <> outcome(t.state, t.result, t.failure, t.completed_at)"
            ),
        },
    ),
    Promise(
        "P14",
        "a handle is in exactly one scope at every instant: that of its task",
        {
            "astray": (
                "SELECT h.handle_id, h.scope, t.scope, t.id FROM f.handles AS h JOIN f.tasks AS t USING (task_seq) "
                "WHERE h.role = 'owner' AND h.scope <> t.scope"
            ),
            "unread note astray": (
                "SELECT b.note_seq, b.scope, t.scope, t.id FROM f.inbox AS b JOIN f.tasks AS t USING (task_seq) "
                "WHERE b.acknowledged_at IS NULL AND b.claim IS NULL AND t.completed_at IS NULL AND b.scope <> t.scope"
            ),
        },
    ),
    Promise(
        "P15",
        "a transfer, a handoff and a close are all or nothing",
        {
            "handoff without its event": (
                "SELECT h.handoff_id, count(e.seq), 'events' FROM f.handoffs AS h LEFT JOIN f.events AS e "
                "ON e.type = 'handed_off' AND json_extract(e.data, '$.handoff_id') = h.handoff_id "
                "AND e.from_scope = h.source GROUP BY h.handoff_seq HAVING count(e.seq) <> 1"
            ),
            "event without its handoff": (
                "SELECT e.seq, e.data FROM f.events AS e WHERE e.type = 'handed_off' AND NOT EXISTS "
                "(SELECT 1 FROM f.handoffs AS h WHERE h.handoff_id = json_extract(e.data, '$.handoff_id') "
                "AND h.source = e.from_scope AND h.destination = e.scope)"
            ),
            "moved by a handoff": (
                "SELECT e.seq, j.value, 'was not moved' FROM f.events AS e, json_each(e.data, '$.moved') AS j "
                "WHERE e.type = 'handed_off' AND e.scope <> e.from_scope "
                "AND NOT EXISTS (SELECT 1 FROM f.tombstones AS g WHERE g.task_seq = j.value) AND NOT EXISTS "
                "(SELECT 1 FROM f.events AS m WHERE m.task_seq = j.value AND m.type = 'transferred' AND m.seq < e.seq "
                "AND m.scope = e.scope AND m.from_scope = e.from_scope)"
            ),
            "cancelled by a handoff or a close": (
                "SELECT e.seq, e.type, j.value, 'was not asked to end' FROM f.events AS e, json_each(e.data, '$.cancelled') AS j "
                "WHERE e.type IN ('handed_off', 'session_closed') "
                "AND NOT EXISTS (SELECT 1 FROM f.tombstones AS g WHERE g.task_seq = j.value) AND NOT EXISTS "
                "(SELECT 1 FROM f.events AS m WHERE m.task_seq = j.value AND m.seq < e.seq AND m.type IN "
                "('cancel_requested', 'completed', 'failed', 'cancelled', 'abandoned'))"
            ),
            "moved by a close": (
                "SELECT e.seq, j.value, 'was not moved' FROM f.events AS e, json_each(e.data, '$.transferred') AS j "
                "WHERE e.type = 'session_closed' AND NOT EXISTS (SELECT 1 FROM f.tombstones AS g WHERE g.task_seq = j.value) "
                "AND NOT EXISTS (SELECT 1 FROM f.events AS m WHERE m.task_seq = j.value AND m.type = 'transferred' "
                "AND m.seq < e.seq AND m.from_scope = e.scope)"
            ),
            "half of a transfer": (
                "SELECT d.n, d.args, count(*), 'of', json_array_length(d.args, '$.seqs'), 'were moved' FROM in_doubt AS d, "
                "json_each(d.args, '$.seqs') AS j WHERE d.op = 'transfer' AND json_extract(d.args, '$.only') AND EXISTS "
                "(SELECT 1 FROM f.events AS m WHERE m.task_seq = j.value AND m.type = 'transferred' "
                "AND m.scope = json_extract(d.args, '$.to') AND m.from_scope = json_extract(d.args, '$.scope')) "
                "GROUP BY d.n HAVING count(*) <> json_array_length(d.args, '$.seqs')"
            ),
        },
    ),
    Promise(
        "P16",
        "a closed session gets no work, but children of what was kept in it",
        {
            "born": (
                "SELECT e.seq, e.scope, e.task_id, 'in a closed session' FROM f.events AS e WHERE e.type = 'registered' "
                "AND (SELECT s.type FROM f.events AS s WHERE s.scope = e.scope AND s.seq < e.seq AND s.task_seq IS NULL "
                "AND s.type IN ('session_opened', 'session_closed') ORDER BY s.seq DESC LIMIT 1) = 'session_closed' "
                "AND json_extract(e.data, '$.parent_seq') IS NULL"
            ),
            "moved": (
                "SELECT e.seq, e.scope, e.task_id, 'into a closed session' FROM f.events AS e WHERE e.type = 'transferred' "
                "AND (SELECT s.type FROM f.events AS s WHERE s.scope = e.scope AND s.seq < e.seq AND s.task_seq IS NULL "
                "AND s.type IN ('session_opened', 'session_closed') ORDER BY s.seq DESC LIMIT 1) = 'session_closed'"
            ),
            "hidden": (
                "SELECT t.task_seq, t.id, t.state, 'hidden, in a closed session' FROM f.tasks AS t "
                "JOIN f.sessions AS s ON s.scope = t.scope WHERE s.closed_at IS NOT NULL AND t.mode = 'hidden' "
                "AND t.completed_at IS NULL AND t.state <> 'cancel_requested' AND t.parent_seq IS NULL"
            ),
        },
    ),
    Promise(
        "P17",
        "one end gives one note, and a note that was acknowledged is not handed out again",
        {
            "notes of an end": (
                "SELECT t.task_seq, t.id, t.state, 'notes:', count(b.note_seq) FROM f.tasks AS t LEFT JOIN f.inbox AS b "
                "ON b.task_seq = t.task_seq AND b.key = 'end:' || t.task_seq "
                "GROUP BY t.task_seq HAVING count(b.note_seq) <> (t.notify_on_end AND t.completed_at IS NOT NULL)"
            ),
            "in the transaction of the end": (
                "SELECT t.task_seq, t.id, 'its note and its end are not of one time' FROM f.tasks AS t JOIN f.inbox AS b "
                "ON b.task_seq = t.task_seq AND b.key = 'end:' || t.task_seq WHERE b.posted_at <> t.completed_at"
            ),
            "handed out again": (
                "SELECT k.n, 'note ' || j.value, 'had been acknowledged at', p.n FROM acknowledged AS k, "
                "json_each(k.result, '$.notes') AS j JOIN acknowledged AS p ON p.op = 'inbox' AND p.n < k.asked_at, "
                "json_each(p.result, '$.notes') AS i WHERE k.op = 'inbox' AND i.value = j.value"
            ),
        },
    ),
    Promise(
        "P18",
        "a reader of the change feed is told everything, once, in order",
        {
            "twice or out of order": (
                "SELECT a.n, a.who, a.feed, a.seq, 'after', b.seq FROM fed AS a JOIN fed AS b "
                "ON b.n = (SELECT max(c.n) FROM fed AS c WHERE c.who = a.who AND c.feed = a.feed AND c.n < a.n) "
                # what says that some were pruned has the number of the last that was told
                "WHERE a.seq < b.seq OR (a.seq = b.seq AND a.type <> 'pruned')"
            ),
            "left out": (
                "SELECT r.who, r.feed, e.seq, e.type, 'was not told' FROM (SELECT who, feed, min(seq) AS first, "
                "max(seq) AS last FROM fed GROUP BY who, feed) AS r JOIN f.events AS e ON e.seq BETWEEN r.first AND r.last "
                "WHERE NOT EXISTS (SELECT 1 FROM fed AS d WHERE d.who = r.who AND d.feed = r.feed AND d.seq = e.seq)"
            ),
        },
    ),
    Promise(
        "P19",
        "the file is whole: SQLite says so, its numbers are never used twice, and it is of one revision",
        {
            "numbers": (
                "SELECT q.name, q.seq, 'is below what is there' FROM f.sqlite_sequence AS q "
                "WHERE (q.name = 'tasks' AND q.seq < (SELECT max(task_seq) FROM f.tasks)) "
                "OR (q.name = 'events' AND q.seq < (SELECT max(seq) FROM f.events))"
            ),
            "number given again": (
                "SELECT x.task_seq, x.id, y.id, 'one number' FROM "
                "(SELECT json_extract(result, '$.task_seq') AS task_seq, json_extract(args, '$.id') AS id FROM acknowledged "
                "WHERE op = 'spawn') AS x JOIN known AS y USING (task_seq) WHERE x.id <> y.id"
            ),
        },
    ),
)
