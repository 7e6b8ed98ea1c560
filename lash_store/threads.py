"""Owns how a plain function runs beside the event loop, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["in_thread"]


async def in_thread(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """
    Call a plain function in a thread of its own, with the caller's context variables, and return what it returns.

    It may hang without keeping the loop, or the process, from its end. A caller that is cancelled leaves it running.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    def call() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = context.run(function, *arguments, **named)
        except BaseException as raised:
            # a future takes no StopIteration
            error = RuntimeError(repr(raised)) if isinstance(raised, StopIteration) else raised
        with contextlib.suppress(RuntimeError):
            # the loop may be gone by now
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=call, name="lash_store call", daemon=True).start()
    return await answer
