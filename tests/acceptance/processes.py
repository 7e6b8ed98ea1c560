"""Starts real worker processes from a warm server that has imported everything and opened nothing, and listens to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.acceptance.processes",
        "tests.acceptance.step_programs",
        "tests.acceptance.wait_programs",
        "tests.histories.programs",
        "lash_store.store",
        "lash_store.sessions",
        "alembic.command",
        "alembic.script",
    ]
)


class Report:
    """How a worker speaks: one JSON value a line, one ``write(2)`` a line, so that no kill tears one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, *words: Any) -> None:
        line = json.dumps(words).encode() + b"\n"
        assert len(line) <= select.PIPE_BUF
        os.write(self._descriptor, line)


Main = Callable[..., Coroutine[Any, Any, None]]


def _enter(main: Main, connection: Any, arguments: tuple[Any, ...]) -> None:
    # the file is not the harness's to open: the worker gets a path, and a pipe to speak on
    report = Report(connection.fileno())
    try:
        asyncio.run(main(report, *arguments))
    except BaseException as error:
        report("died", repr(error)[:1000], traceback.format_exc()[-1500:])
        raise


class Worker:
    """One worker process and what it has said so far."""

    def __init__(self, main: Main, *arguments: Any) -> None:
        self._pipe, theirs = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_enter, args=(main, theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._buffer = b""
        self.said: list[list[Any]] = []

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def listen(self, seconds: float) -> bool:
        """Take in what the worker says within *seconds*; False once it says nothing more."""
        if not self._pipe.poll(max(0.0, seconds)):
            return True
        data = os.read(self._pipe.fileno(), 1 << 16)
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        self.said += [json.loads(line) for line in lines]
        return bool(data)

    def wait_for(self, *beginning: Any, seconds: float = 30.0) -> list[Any]:
        """Return the first line that begins so, waiting for it."""
        deadline = time.monotonic() + seconds
        while True:
            for words in self.said:
                if words[: len(beginning)] == list(beginning):
                    return words
            assert time.monotonic() < deadline, f"{beginning} was not said in {seconds} s: {self.said[-5:]}"
            assert self.listen(0.2), f"the worker ended without {beginning}: {self.said[-5:]}"

    async def says(self, *beginning: Any, seconds: float = 30.0) -> list[Any]:
        """Wait for a line without holding up the event loop."""
        return await asyncio.to_thread(self.wait_for, *beginning, seconds=seconds)

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Stop the worker, and wait until every thread of it stands: one may be in the middle of a commit."""
        self.signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.pid}/task")
        while any(
            (thread / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "T"
            for thread in threads.iterdir()
        ):
            time.sleep(0.005)

    def kill(self) -> list[list[Any]]:
        """End the worker with SIGKILL, and return everything it said to its last breath."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        return self.join()

    def join(self) -> list[list[Any]]:
        """Wait for the worker's end, and return everything it said."""
        while self.listen(30.0):
            pass
        self._process.join(30)
        assert self._process.exitcode is not None, "the worker does not end"
        self._pipe.close()
        return self.said

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def close(self) -> None:
        """End the worker if it still lives."""
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
        self._process.join(30)
        if not self._pipe.closed:
            self._pipe.close()


@contextlib.contextmanager
def workers() -> Iterator[Callable[..., Worker]]:
    """Give a way to start workers, all of which end with the block."""
    started: list[Worker] = []

    def start(main: Main, *arguments: Any) -> Worker:
        worker = Worker(main, *arguments)
        started.append(worker)
        return worker

    try:
        yield start
    finally:
        for worker in started:
            worker.close()
