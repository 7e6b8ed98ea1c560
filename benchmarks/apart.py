"""Owns one way in a process, a process group and a folder of its own, of which nothing is left when it ends or is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from .measuring import Missing

__all__ = ["run_apart", "stop_on_signals"]

_is_stopping = False


def stop_on_signals() -> None:
    """
    Let SIGINT and SIGTERM stop what runs apart; a second one ends this process at once.

    An exception raised wherever the process happens to be would leave a folder or a process behind: between making one and
    knowing it, or in the middle of removing it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    global _is_stopping
    if _is_stopping:
        raise KeyboardInterrupt
    _is_stopping = True


def run_apart(case: str, way: str, scale: float, timeout: float) -> dict[str, float]:
    """
    Run one way in a process of its own.

    Raises:
        Missing: it cannot run here.
        RuntimeError: it failed.
        KeyboardInterrupt: a signal stopped it.
    """
    with tempfile.TemporaryDirectory(prefix="lash_store-bench-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "benchmarks.one", case, way, folder, str(scale)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        output, errors = _run_group(command, environment, timeout)
    last = output.strip().rpartition("\n")[2]
    try:
        answer: dict[str, Any] = json.loads(last)
    except ValueError:
        raise RuntimeError(f"{output[-1000:]}\n{errors[-4000:]}".strip() or "it ended without a word") from None
    if "missing" in answer:
        raise Missing(answer["missing"])
    return {name: float(value) for name, value in answer["figures"].items()}


def _run_group(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> tuple[str, str]:
    until = time.monotonic() + timeout
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    ) as process:
        try:
            while not _is_stopping:
                try:
                    return process.communicate(timeout=0.2)
                except subprocess.TimeoutExpired:
                    if time.monotonic() > until:
                        raise RuntimeError(f"not done after {timeout:g} s") from None
            raise KeyboardInterrupt
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
