"""When a file is looked at again: at once when it was written to, hardly ever while it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from lash_store import stirs
from lash_store.stirs import Stirs

LONG = 3_600.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(b"")
    return found


@pytest.fixture
def calm(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stirs]:
    """Those of a file to which nobody has written in a long time; without the kernel's word they would wait for ever."""
    monkeypatch.setattr(stirs, "_CALM", 0.0)
    monkeypatch.setattr(stirs, "_AT_MOST", LONG)
    calm = Stirs(file)
    yield calm
    calm.close()


async def is_waiting(waiting: asyncio.Task[None]) -> bool:
    """Whether a wait goes on after everything that can happen at once has."""
    return not (await asyncio.wait({waiting}, timeout=0.2))[0]


async def test_nobody_looks_while_nothing_is_written_and_everybody_once_it_is(calm: Stirs, file: Path) -> None:
    waiting = asyncio.create_task(calm.next())
    assert await is_waiting(waiting)

    file.write_bytes(b"more")

    await asyncio.wait_for(waiting, 20)


async def test_after_a_write_it_is_looked_at_again_and_again(
    calm: Stirs, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.create_task(calm.next())
    assert await is_waiting(waiting)
    monkeypatch.setattr(stirs, "_CALM", LONG)
    file.write_bytes(b"more")
    await asyncio.wait_for(waiting, 20)

    for _ in range(10):
        await asyncio.wait_for(calm.next(), 20)


async def test_without_a_write_it_is_looked_at_now_and_then(calm: Stirs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stirs, "_AT_MOST", 0.05)

    for _ in range(3):
        await asyncio.wait_for(calm.next(), 20)


@pytest.mark.parametrize("what", ["no file", "no inotify", "a file that has gone"])
async def test_without_the_kernels_word_it_is_looked_at_often(
    calm: Stirs, file: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "no file":
        file.unlink()
    elif what == "no inotify":
        monkeypatch.setattr(stirs, "_inotify", lambda: None)
    else:
        waiting = asyncio.create_task(calm.next())
        assert await is_waiting(waiting)
        file.unlink()
        await asyncio.wait_for(waiting, 20)

    for _ in range(5):
        await asyncio.wait_for(calm.next(), 20)


async def test_a_file_that_comes_later_is_watched(file: Path, calm: Stirs, monkeypatch: pytest.MonkeyPatch) -> None:
    file.unlink()
    monkeypatch.setattr(stirs, "_AT_MOST", 0.0)
    await asyncio.wait_for(calm.next(), 20)
    file.write_bytes(b"")
    monkeypatch.setattr(stirs, "_AT_MOST", LONG)

    waiting = asyncio.create_task(calm.next())

    assert await is_waiting(waiting)
    file.write_bytes(b"more")
    await asyncio.wait_for(waiting, 20)
