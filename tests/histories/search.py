"""
Looks for an order in which a recorded history could have happened step by step, each call between its asking and its answer.

The search is that of Wing and Gong (*Testing and Verifying Concurrent Objects*, 1993): of the calls that nothing else must come
before, try each as the next one. What Lowe (*Testing for Linearizability*, 2017) adds: a configuration (how far each call is, and
the state) that was seen leads nowhere new. Ours are: calls of several steps, calls without an answer, which may be left out, and
steps of the system, which nobody asked for. The last step of a call that is known to have changed nothing in it is taken as soon
as it can be, without an alternative: to take it later would help no other call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.histories.specification import DONE, READS, START, Call, File, drift, step

__all__ = ["History", "Search", "Undecided", "minimal", "search"]

MOST = 400_000
"""Configurations after which a search gives up: the longest that was ever needed is a hundredth of it."""


class Undecided(Exception):
    """A search met more configurations than it may."""


class History(NamedTuple):
    """The calls about one task, and the processes that may take work over."""

    task: int
    calls: tuple[Call, ...]
    owners: tuple[str, ...]


class Taken(NamedTuple):
    """One step of the order that was found: of a call (by its place in the history), or of the system (None)."""

    call: int | None
    label: str


@dataclass
class Search:
    """*order* is None if there is none; *met* counts configurations."""

    order: list[Taken] | None
    met: int


@dataclass
class _Node:
    progress: tuple[int, ...]
    file: File
    taken: Taken | None
    ways: Iterator[_Node] = field(default_factory=lambda: iter(()))


def search(history: History, most: int = MOST) -> Search:
    """
    Look for an order that explains a history.

    Raises:
        Undecided: it takes more than *most* configurations.
    """
    calls = history.calls
    first = _Node(tuple(START for _ in calls), File(), None)
    first.ways = _ways(history, first)
    seen = {(first.progress, first.file)}
    path = [first]
    while path:
        if _is_explained(calls, path[-1].progress):
            return Search([node.taken for node in path if node.taken is not None], len(seen))
        node = next(path[-1].ways, None)
        if node is None:
            path.pop()
            continue
        configuration = (node.progress, node.file)
        if configuration in seen:
            continue
        seen.add(configuration)
        if len(seen) > most:
            raise Undecided(f"task {history.task}: more than {most} configurations")
        node.ways = _ways(history, node)
        path.append(node)
    return Search(None, len(seen))


def _is_explained(calls: Sequence[Call], progress: tuple[int, ...]) -> bool:
    return all(at == DONE or call.told is None for call, at in zip(calls, progress, strict=True))


def _ways(history: History, node: _Node) -> Iterator[_Node]:
    """Yield what may come next: what was answered first comes first, what was never answered last."""
    calls, progress, file = history.calls, node.progress, node.file
    waiting = sorted((call.told, place) for place, call in enumerate(calls) if call.told and progress[place] != DONE)
    # nothing that was asked later comes before the first answer
    until = waiting[0][0] if waiting else 0
    ways: list[_Node] = []
    for _, place in waiting:
        if calls[place].asked > until:
            continue
        for after, at, label in step(file, calls[place], progress[place]):
            way = _Node((*progress[:place], at, *progress[place + 1 :]), after, Taken(place, label))
            if at == DONE and after == file and calls[place].is_only_told:
                yield way
                return
            ways.append(way)
    yield from ways
    for after, label in drift(file, history.owners):
        yield _Node(progress, after, Taken(None, label))
    for place, call in enumerate(calls):
        if call.told is None and progress[place] != DONE and (until is None or call.asked <= until):
            for after, at, label in step(file, call, progress[place]):
                if at != DONE or after != file:
                    yield _Node((*progress[:place], at, *progress[place + 1 :]), after, Taken(place, label))


def minimal(history: History, explained: Callable[[History], bool]) -> History:
    """
    Return as little of a history that cannot be explained as still cannot.

    Looks are left out; of what may change something, the answer is: then it may have happened or not, whatever was said of it.
    """
    for place in range(len(history.calls) - 1, -1, -1):
        call = history.calls[place]
        if call.told is None or call.op in {"die", "close"}:
            continue
        rest = [call._replace(told=None, answer=None)] if call.op not in READS else []
        smaller = history._replace(calls=(*history.calls[:place], *rest, *history.calls[place + 1 :]))
        if not explained(smaller):
            history = smaller
    return history
