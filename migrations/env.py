"""Alembic's environment: one transaction under BEGIN IMMEDIATE, on lash_store's own connection."""

import os
from pathlib import Path

from alembic import context
from sqlalchemy.engine import Connection, make_url

from lash_store import database, guards, migrate, schema

config = context.config


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=schema.metadata,
        version_table=schema.VERSION_TABLE,
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()


def path_given() -> Path:
    """`-x db=FILE`, or LASH_STORE_DB, or the file of `sqlalchemy.url`."""
    given = context.get_x_argument(as_dictionary=True).get("db") or os.environ.get("LASH_STORE_DB")
    return guards.resolve(given or make_url(config.get_main_option("sqlalchemy.url") or "").database or "")


def run_from_the_command_line() -> None:
    path = path_given()
    guards.check_target(path, writing=True)
    if database.has_content(path):
        database.probe(path)
    else:
        migrate.make(path, lambda made: None)
    with migrate.transaction(path) as connection:
        run(connection)


if context.is_offline_mode():
    context.configure(dialect_name="sqlite", version_table=schema.VERSION_TABLE, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif "connection" in config.attributes:
    run(config.attributes["connection"])
else:
    run_from_the_command_line()
