"""Nothing that a terminal obeys gets out of any text of any table through any command, and no picture has a script in it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from lash_store.cli import _COMMANDS
from lash_store.cli.cookbook import COOKBOOK
from tests.acceptance import agent_file
from tests.acceptance.commands import assert_harmless, run

SEED = int(os.environ.get("FUZZ_SEED") or random.randrange(10**6))
COLUMNS = int(os.environ.get("FUZZ_COLUMNS") or 1)
"""How many columns a run puts such text into, one by one; ``FUZZ_COLUMNS=999`` is all of them."""

OBEYED = (
    "\x1b[2J\x1b[31m\x1b]0;title\x07\x1b]8;;http://evil\x1b\\link\x1b]52;c;ZXZpbA==\x07\x1bP1$r\x1b\\\x9b31m\x9d0;x\x9c"
    "\x00\x08\x0c\r\n\x7f\x85\u2028\u2029\u200e\u202a\u202e\u2066\u2069\ufeff<script>alert(1)</script>]]>&\"'[red]"
)

ONE = "#1"

LINES: Mapping[str, Sequence[Sequence[str]]] = {
    "sessions": [[], ["--json"]],
    "list": [["--all"], ["--all", "--json"]],
    "show": [[ONE], [ONE, "--json"], ["#2"], ["#7"]],
    "tree": [[], ["--json"]],
    "top": [["--once"], ["--once", "--all", "--json"]],
    "events": [[], ["--json"]],
    "notes": [["--all"], ["--all", "--json"]],
    "stats": [[], ["--json"]],
    "timeline": [["--all", "-o", "-"], ["--all", "--html", "-o", "-"], ["--all", "--json"], []],
    "query": [[name, *(["--set", "task=1"] if name in {"family", "steps"} else [])] for name in COOKBOOK],
    "doctor": [[], ["--json"]],
    "export": [[]],
    "current": [[]],
    "schema": [[], ["--json"]],
    "cancel": [["desktop:s1", "index"], [ONE, "--json"]],
    "signal": [[ONE, "go"]],
    "abandon": [[ONE, "--reason", "x"]],
    "prune": [["--dry-run"], ["--older-than", "0s", "--json"]],
    "backup": [["copy.db"]],
    "restore": [["copy.db", "--yes"]],
    "upgrade": [[]],
    "downgrade": [["0004", "--yes"]],
}

LEFT_OUT = {
    "demo": "makes a file of its own, and shows nothing of another",
    "history": "tells of the package's revisions, and opens no file",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "agent.db"
    asyncio.run(agent_file.make(path))
    return path


def test_every_command_is_tried_or_left_out_for_a_reason() -> None:
    assert {*LINES} | {*LEFT_OUT} == {*_COMMANDS}


def _poisoned(value: Any) -> Any:
    match value:
        case str():
            return value + OBEYED
        case list():
            return [_poisoned(one) for one in value]
        case dict():
            return {name: _poisoned(one) for name, one in value.items()} | {OBEYED: OBEYED}
    return value


def _text(value: str) -> str:
    """Put what a terminal obeys behind a text, or behind each text in a JSON object."""
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    return json.dumps(_poisoned(found), ensure_ascii=False) if isinstance(found, dict | list) else value + OBEYED


def _poison(path: Path, columns: Sequence[tuple[str, str]]) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON").fetchall()
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f'DROP TRIGGER "{name}"')
        connection.create_function("poisoned", 1, _text)
        for table, column in columns:
            # a row that must be the only one of its kind stays as it is
            connection.execute(
                f'UPDATE OR IGNORE {table} SET "{column}" = poisoned("{column}") WHERE typeof("{column}") = \'text\''
            )
        connection.commit()


def _columns(path: Path) -> list[tuple[str, str]]:
    """Return every column of text that has something in it."""
    with closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
        found = []
        for (table,) in tables.fetchall():
            for row in connection.execute(f"PRAGMA table_info({table})").fetchall():
                has_text = f"SELECT 1 FROM {table} WHERE typeof(\"{row[1]}\") = 'text' LIMIT 1"
                if connection.execute(has_text).fetchall():
                    found.append((table, row[1]))
    return found


SHOWN_FREELY = [
    ("tasks", "label"), ("tasks", "id"), ("tasks", "progress"), ("tasks", "failure"), ("tasks", "result"), ("tasks", "arguments"),
    ("tasks", "cancel_reason"), ("tasks", "cancel_requested_by"), ("tasks", "waiting_for"), ("tasks", "function"),
    ("tasks", "evidence"), ("tasks", "last_error"), ("tasks", "version"), ("tasks", "idempotency_key"),
    ("events", "task_id"), ("steps", "name"), ("steps", "value"), ("signals", "name"), ("signals", "key"),
    ("signals", "payload"), ("signals", "sent_by"), ("inbox", "text"), ("inbox", "key"), ("inbox", "data"), ("inbox", "task_id"),
    ("updates", "text"), ("updates", "monitor_id"), ("monitors", "monitor_id"), ("handles", "name"), ("handles", "namespace"),
    ("owners", "host"), ("owners", "version"), ("owners", "boot_id"), ("owners", "process_start"),
]  # fmt: skip
"""Texts of which rows stay readable, whatever they are: all at once."""


def _try_all(path: Path, folder: Path) -> int:
    """Run every command on a file, and return how many worked."""
    worked = 0
    for command, lines in LINES.items():
        for number, arguments in enumerate(lines):
            here = folder / f"{command}-{number}"
            here.mkdir()
            db = here / "agent.db"
            shutil.copy(path, db)
            os.chdir(here)
            if command == "restore":
                shutil.copy(path, "copy.db")
            done = run(command, *arguments, db=db)
            # what a rule of XML leaves out of a picture is there as another character
            assert_harmless(done.stdout)
            assert_harmless(done.stderr)
            assert "Traceback" not in done.stderr, (command, arguments, done.stderr)
            assert done.returncode in {0, 1, 3}, (command, arguments, done)
            worked += done.returncode == 0
            if done.returncode == 0 and arguments[-2:] == ["-o", "-"]:
                _check_picture(done.stdout, is_html="--html" in arguments)
            shutil.rmtree(here)
    return worked


def _check_picture(text: str, *, is_html: bool) -> None:
    assert "<script" not in text
    if not is_html:
        for one in ET.fromstring(text).iter():
            assert not one.tag.endswith(("script", "foreignObject", "image"))
            assert not any(name.lower().startswith("on") or "href" in name.lower() for name in one.attrib)


def test_texts_of_all_rows_at_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "agent.db"
    shutil.copy(made, path)
    _poison(path, SHOWN_FREELY)
    shown = run("list", "--all", db=path).stdout

    assert "\\x1b]52;c;" in shown, "it is not shown at all, so nothing was tried"
    assert _try_all(path, tmp_path) > 25


def test_texts_of_one_column_after_the_other(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    columns = _columns(made)
    assert {*SHOWN_FREELY} - {*columns} < {*SHOWN_FREELY}
    print(f"FUZZ_SEED={SEED} FUZZ_COLUMNS={COLUMNS} of {len(columns)}")
    for column in random.Random(SEED).sample(columns, min(COLUMNS, len(columns))):
        path = tmp_path / "agent.db"
        shutil.copy(made, path)
        _poison(path, [column])
        folder = tmp_path / "_".join(column)
        folder.mkdir()
        _try_all(path, folder)
        shutil.rmtree(folder)
