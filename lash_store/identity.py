"""Owns what tells a file of ours from any other, and how new it is; the words alone, so that looking needs no more."""

from __future__ import annotations

__all__ = ["APPLICATION_ID", "HEAD", "TABLES", "VERSION_TABLE"]

APPLICATION_ID = 0x6C617368
"""``lash`` in ASCII; stands in the header of every store."""

HEAD = "0005"
"""The revision this package reads and writes; a test holds it equal to Alembic's head."""

VERSION_TABLE = "lash_store_version"

TABLES = frozenset(
    {
        "events",
        "handles",
        "handoffs",
        "inbox",
        "lash_store_version",
        "monitors",
        "owners",
        "sessions",
        "signals",
        "steps",
    }
    | {"tasks", "tombstones", "updates"}
)
"""What is a table in every store that has something of the name; a test holds it equal to the schema's."""
