"""Fixtures of tests that start real processes on a real file, which is checked when the test is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.processes import Worker, workers
from tests.runtime.support import check_file


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start worker processes."""
    with workers() as start:
        yield start


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file that does not exist yet; what the test leaves in it must be whole."""
    path = tmp_path / "agent.db"
    yield path
    if path.exists():
        check_file(path)
