"""Fixtures of tests that run a store in this process, on a real file that is checked when the test is over."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from lash_store import SessionTasks, TaskStore, migrate
from tests.runtime.support import RUNTIME, check_file


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file that does not exist yet; what the test leaves in it must be whole."""
    path = tmp_path / "agent.db"
    yield path
    if path.exists():
        check_file(path)


@pytest.fixture(scope="session")
def newborn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with nothing in it, made once and only copied: to make one takes longer than most tests."""
    made = tmp_path_factory.mktemp("newborn") / "agent.db"
    migrate.prepare(made)
    return made


@pytest.fixture
def new(path: Path, newborn: Path) -> Callable[..., TaskStore]:
    """Make a store on the file, unopened."""

    def make(**options: Any) -> TaskStore:
        if not path.exists():
            shutil.copy(newborn, path)
        return TaskStore(path, **{"runtime": RUNTIME, **options})

    return make


@pytest.fixture
async def opened(new: Callable[..., TaskStore]) -> AsyncIterator[Callable[..., Any]]:
    """Open stores on the file, all closed at the end."""
    async with AsyncExitStack() as stack:

        async def open_store(**options: Any) -> TaskStore:
            return await stack.enter_async_context(new(**options))

        yield open_store


@pytest.fixture
async def store(opened: Callable[..., Any]) -> TaskStore:
    """An open store."""
    found: TaskStore = await opened()
    return found


@pytest.fixture
async def session(store: TaskStore) -> SessionTasks:
    """A session of the open store."""
    return await store.session("s1")


@pytest.fixture
async def there(store: TaskStore) -> SessionTasks:
    """Another session of it, to which work goes."""
    return await store.session("s2")


@pytest.fixture
def started() -> asyncio.Event:
    """Set by a body that runs."""
    return asyncio.Event()


@pytest.fixture
def release() -> asyncio.Event:
    """What a body waits for."""
    return asyncio.Event()
