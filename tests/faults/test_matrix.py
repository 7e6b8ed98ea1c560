"""The matrix names tests that are there, and ``docs/faults.md`` is written from it."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.faults.__main__ import SWEEPS
from tests.faults.matrix import MATRIX, page

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_matrix_names_is_there() -> None:
    """Found in the source: to collect them all takes longer than everything else here; the command runs them."""
    known: dict[str, set[str]] = {}
    for row in MATRIX:
        assert row.shown or row.sweep, f"{row.name} is shown by nothing"
        for shown in row.shown:
            file, _, name = shown.partition("::")
            if file not in known:
                tree = ast.parse((ROOT / file).read_text())
                known[file] = {one.name for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert name in known[file], f"{row.name}: {shown} is not there"
            assert name.startswith("test_")


def test_every_row_has_a_name_of_its_own_and_a_sweep_that_is_there() -> None:
    names = [row.name for row in MATRIX]
    assert len(names) == len(set(names))
    assert {row.sweep for row in MATRIX if row.sweep is not None} == SWEEPS.keys()


def test_the_page_is_written_from_the_matrix() -> None:
    assert (ROOT / "docs" / "faults.md").read_text() == page(), "run: python -m tests.faults --write-docs"
