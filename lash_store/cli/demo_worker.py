"""Owns the demo's worker process: it opens the store, spawns what is missing, and is killed; it knows of no kill."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from lash_store import Recovery, StoreError, TaskContext, TaskKind, TaskStore
from lash_store.cli.demo_texts import count_words, summary, whole_words

__all__ = ["main"]

_CHUNK = 400
"""Bytes fetched at a time."""


def main() -> None:
    """Run one life of the worker; a line of JSON on stdout tells the parent of each step."""
    threading.Thread(target=_end_with_parent, name="demo parent watch", daemon=True).start()
    parser = argparse.ArgumentParser()
    parser.add_argument("db")
    parser.add_argument("runtime")
    parser.add_argument("session")
    parser.add_argument("texts", type=Path)
    parser.add_argument("effects", type=Path)
    parser.add_argument("--latency", type=float, required=True)
    parser.add_argument("--max-running", type=int, required=True)
    chosen = parser.parse_args()
    _tell(imported_at=time.time())
    try:
        asyncio.run(_work(chosen))
    except StoreError as error:
        _tell(error=str(error))
        sys.exit(1)


async def _work(chosen: argparse.Namespace) -> None:
    store = TaskStore(chosen.db, runtime=chosen.runtime, max_running=chosen.max_running)
    effects = os.open(chosen.effects, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @store.task(recovery=Recovery.RERUN)
    async def summarise(task: TaskContext, path: str) -> dict[str, JsonValue]:
        source = Path(path)
        size = _size(source)
        state: Any = task.checkpoint or {"offset": 0, "counts": {}}
        offset, counts = int(state["offset"]), Counter(state["counts"])
        while offset < size:
            os.write(effects, f"{task.scope} {task.id} {offset} {task.attempt}\n".encode())
            await asyncio.sleep(chosen.latency)
            fetched = _fetch(source, offset, _CHUNK)
            words = whole_words(fetched, is_last=offset + len(fetched) >= size)
            counts += count_words(words.decode())
            offset += len(words)
            await task.save({"offset": offset, "counts": counts})
            await task.progress(f"{counts.total()} words read", offset / size)
        return summary(_fetch(source, 0, size).decode(), counts)

    async with store:
        session = await store.session(chosen.session)
        _tell(ready=True)
        known = {record.id for record in await session.list(include_terminal=True)}
        paths = sorted(chosen.texts.glob("*.txt"))
        for path in paths:
            if path.stem not in known:
                handle = await session.spawn(summarise, str(path), id=path.stem, kind=TaskKind.OBSERVER)
                # not before: what is told from here on may not be lost
                _tell(spawned=handle.id)
        handles = [await session.handle(path.stem) for path in paths]
        await asyncio.gather(*(handle.wait() for handle in handles))


def _size(path: Path) -> int:
    return path.stat().st_size


def _fetch(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _tell(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _end_with_parent() -> None:
    # the parent keeps the other end and writes nothing: when the read returns, it is gone. Not through sys.stdin, whose
    # lock would keep the interpreter from ending
    while os.read(0, 1):
        pass
    os._exit(3)


if __name__ == "__main__":
    main()
