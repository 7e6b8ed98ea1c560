"""Owns what the SQL of several commands shares: the words of states, and the one line that tells most of a task."""

from __future__ import annotations

__all__ = ["ENDED", "LIVE", "SAYS", "STATES", "said"]

LIVE = ("pending", "running", "waiting", "cancel_requested")
ENDED = ("completed", "failed", "cancelled", "abandoned")
STATES = (*LIVE, *ENDED)
"""The words of `TaskState`, which is not imported to print help."""


def said(column: str, name: str) -> str:
    """Return what a JSON column of `tasks AS t` says under a name."""
    # a hand may have put anything there: one bad row must not take the list down
    return f"iif(json_valid(t.{column}), json_extract(t.{column}, '$.{name}'), t.{column})"


SAYS = f"""CASE
  WHEN t.failure IS NOT NULL THEN {said("failure", "type")} || ': ' || {said("failure", "message")}
  WHEN t.evidence IS NOT NULL THEN
    'owner ' || COALESCE({said("evidence", "owner_id")}, '-') || ' ' || {said("evidence", "end")} || '; outcome unknown'
  WHEN t.cancel_reason IS NOT NULL THEN t.cancel_reason
  WHEN t.waiting_for IS NOT NULL THEN 'waits for ' || t.waiting_for
  WHEN t.not_before IS NOT NULL AND t.last_error IS NOT NULL THEN
    'tries again ' || replace(t.not_before, 'T', ' ') || ' after '
    || {said("last_error", "type")} || ': ' || {said("last_error", "message")}
  ELSE t.progress
END"""
"""The one line that tells most of a task: how it ended badly, else how far it is."""
