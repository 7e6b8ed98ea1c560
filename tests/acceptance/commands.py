"""What tests of the command line share: a command run in this process, hostile data, and what may reach a terminal."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from lash_store.cli import main

HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n[red]\u202egnp.exe\u2066\x9b31m\x7f :bomb:"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, db: Path | None = None, **environment: str) -> Done:
    """Run a command here, which is quicker than a process of its own, and nothing else."""
    clean = {name: value for name, value in os.environ.items() if name not in {"LASH_STORE_DB", "COLUMNS"}}
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {**clean, **environment}, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main([*(["--db", str(db)] if db else []), *map(str, arguments)])
    return Done(status, out.getvalue(), err.getvalue())


def assert_harmless(output: str) -> None:
    for char in output:
        assert char == "\n" or char.isprintable(), f"{char!r} got through"
