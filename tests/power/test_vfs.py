"""The layer under SQLite: it is in the way of a store, of every kind of call, and can make one fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.processes import Worker, workers
from tests.power import vfs
from tests.power.observed_programs import count_and_fail
from tests.runtime.support import check_file, rows


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start workers that end with the test."""
    reason = vfs.available()
    if reason is not None:
        pytest.skip(reason)
    with workers() as start:
        yield start


def test_every_call_of_a_store_goes_through_the_layer(start: Callable[..., Worker], tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    worker = start(count_and_fail, str(path))
    assert worker.wait_for("result") == ["result", 8]
    counts = worker.wait_for("counts")[1]
    seen = {"write wal", "sync wal", "open wal", "write main", "sync main", "read main", "lock main", "size wal"}
    assert seen <= counts.keys()
    # two commits a step of a life cycle would be too few to be true
    assert counts["sync wal"] >= 4
    # of the -wal, of the -making file's journal and -wal: the folder is synced by SQLite itself
    assert counts["sync_folder other"] >= 3
    worker.wait_for("end")
    worker.join()
    assert worker.exit_code == 0
    check_file(path)
    assert [row["state"] for row in rows(path, "SELECT state FROM tasks WHERE id = 'before'")] == ["completed"]


def test_a_call_that_the_observer_fails_reaches_the_caller_as_a_typed_error(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    path = tmp_path / "agent.db"
    worker = start(count_and_fail, str(path))
    _, error, was_used = worker.wait_for("failed")
    assert was_used
    assert error == "StorageError"
    worker.join()
    assert worker.exit_code == 0
    check_file(path)
    assert rows(path, "SELECT id FROM tasks WHERE id = 'failing'") == []


def test_an_unknown_kind_of_call_is_refused_before_anything_is_changed() -> None:
    with pytest.raises(ValueError, match="no such calls"):
        vfs.install(_Nobody(), {"write", "wirte"})


class _Nobody:
    def before(self, call: vfs.Call) -> int | None:
        raise AssertionError(call)

    def after(self, call: vfs.Call) -> int | None:
        raise AssertionError(call)
