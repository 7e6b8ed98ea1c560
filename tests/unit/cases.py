"""Many small cases of one rule in one test: a table of hundreds of cells would spend its time in the runner's books."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["for_each"]


def for_each(
    names: str | tuple[str, ...], cases: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Call a test with each case, as ``parametrize`` would, and report every one that fails by its name.

    Stacked, it is every combination. No case at all is a mistake.
    """
    arguments = (names,) if isinstance(names, str) else names
    table = [case if isinstance(names, tuple) else (case,) for case in cases]
    assert table, f"no case of {names}"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**others: Any) -> None:
            failed = []
            for case in table:
                named = dict(zip(arguments, case, strict=True))
                try:
                    test(**named, **others)
                except Exception as error:
                    error.add_note(f"in the case {named}")
                    failed.append(error)
            if failed:
                raise failed[0] if len(failed) == 1 else ExceptionGroup(f"{len(failed)} of {len(table)} cases", failed)

        signature = inspect.signature(test)
        rest = [one for name, one in signature.parameters.items() if name not in arguments]
        run.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        return run

    return decorate
