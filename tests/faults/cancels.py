"""Owns the caller cancelled at the k-th suspension of an operation: while it waits, or when what it waits for has come."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.operations import Operation, Stage, staged
from tests.faults.statements import Asked, Fault, by_harness, closed, faulty, lets_go, settled, still_works, word
from tests.runtime.support import Stepped, cancel_at, threads

__all__ = ["Cancelled", "cancelled_at"]


@dataclass
class Cancelled:
    """What one point came to: whether there is such a suspension, how the caller was answered, and what is *wrong* with it."""

    operation: str
    at: int
    late: bool
    reached: bool
    answer: str
    effect: str
    wrong: list[str]

    def __str__(self) -> str:
        when = "late" if self.late else "waiting"
        return f"{self.operation} k={self.at} {when} -> {self.answer}, {self.effect}: {'; '.join(self.wrong) or 'fine'}"


async def _stepped(operation: Operation, stage: Stage, at: int, *, late: bool) -> Stepped:
    if not operation.body:
        return await cancel_at(_coroutine(operation.act(stage)), at, late=late)
    found = await stage.do(lambda task: cancel_at(_coroutine(operation.act(stage, task)), at, late=late))
    assert isinstance(found, Stepped)
    return found


async def _coroutine(asked: Any) -> Any:
    return await asked


async def cancelled_at(operation: Operation, born: Path, folder: Path, at: int, late: bool, check: Asked) -> Cancelled:
    """
    Cancel the caller of an operation at one of its suspensions, and hold what must be true then.

    Cancelled: the effect is there or it is not, and never a part of it. Answered: as if nobody had cancelled.
    """
    before, path, wrong = threads(), folder / "agent.db", list[str]()
    quiet = logging.getLogger("lash_store")
    quiet.setLevel(logging.CRITICAL)
    fault = Fault()
    try:
        with faulty(fault):
            async with staged(operation, born, folder) as stage:
                stepped = await _stepped(operation, stage, at, late=late)
                effect = await settled(operation, stage, stepped.error)
                if stepped.error is not None and not stepped.was_cancelled:
                    wrong.append(f"an error of its own: {stepped.error!r}")
                if operation.ask is not None:
                    if effect not in (operation.absent, operation.whole, *operation.parts):
                        wrong.append(f"torn: {effect!r}")
                    elif stepped.error is None and effect != operation.whole and operation.lax is None:
                        wrong.append(f"answered, and the file says {effect!r}")
                if operation.alone and stepped.was_cancelled:
                    await asyncio.sleep(0.02)
                wrong += await still_works(operation, stage, stepped.error)
                wrong += await lets_go(fault.connections, path)
            wrong += closed(path, before)
        with by_harness():
            wrong += [str(broken) for broken in check(path)]
    finally:
        quiet.setLevel(logging.NOTSET)
    answer = "cancelled" if stepped.was_cancelled else "success"
    return Cancelled(operation.name, at, late, stepped.reached, answer, word(operation, effect), wrong)
