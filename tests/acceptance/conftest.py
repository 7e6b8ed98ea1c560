"""Fixtures of tests that start real processes on a real file, which is checked when the test is over."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.processes import Worker, workers
from tests.runtime.support import check_file


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Let programs be interrupted: a shell's background job ignores SIGINT, and so would all it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
