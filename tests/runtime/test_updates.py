"""Updates: what monitors write is kept in bounds, given to one reader until one has dealt with it, and wakes its session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    InboxBusy,
    InvalidId,
    Limits,
    MonitorSpec,
    MonitorUpdate,
    Note,
    SessionTasks,
    StorageFull,
    StoreClosed,
    StoreReadOnly,
    Stream,
    TaskState,
    TaskStore,
    UnknownSession,
    WakePolicy,
    monitoring,
)
from tests.runtime.support import RUNTIME, cancel_at, event_types, rows
from tests.runtime.watching import (
    STAY,
    Watch,
    begun,
    check_counts,
    monitor,
    nothing_left,
    said,
    taken,
    until,
    until_so,
)


@pytest.fixture(autouse=True)
def watch(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Specs of processes; none of which, nor anything of them, may be left."""
    with nothing_left(monkeypatch) as watch:
        yield watch


FED = """
import os, sys, time
folder, number = sys.argv[1], 0
while True:
    number += 1
    fed = os.path.join(folder, str(number))
    while not os.path.exists(fed):
        time.sleep(0.005)
    text = open(fed).read()
    if text == "END":
        sys.exit(0)
    if text == "FAIL":
        sys.exit(1)
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()
"""


class Fed:
    """A monitor that writes what it is told to."""

    def __init__(self, session: SessionTasks, watch: Watch, folder: Path, **options: Any) -> None:
        self.session = session
        self._folder = folder
        self._number = 0
        folder.mkdir()
        options["env"] = watch.sh("x", "true").env
        self.spec = MonitorSpec(id=folder.name, command=[sys.executable, "-I", "-S", "-c", FED, str(folder)], **options)

    async def start(self) -> Fed:
        self.task = await self.session.start_monitor(self.spec)
        return self

    def tell(self, text: str) -> None:
        self._number += 1
        made = self._folder / f"{self._number}.tmp"
        made.write_text(text)
        made.rename(self._folder / str(self._number))

    async def say(self, *texts: str) -> None:
        """Have it write lines, and wait until they are stored."""
        self.tell("\n".join(texts))
        async with asyncio.timeout(20):
            while not rows(Path(self.session._core.path), "SELECT 1 FROM updates WHERE text = ?", texts[-1]):
                await asyncio.sleep(0.01)

    async def end(self, how: str = "END") -> TaskState:
        self.tell(how)
        return (await self.task.wait(timeout=20)).state


@pytest.fixture
async def fed(session: SessionTasks, watch: Watch, tmp_path: Path) -> Fed:
    """One that is told what to write."""
    return await Fed(session, watch, tmp_path / "fed").start()


def lines(updates: Sequence[MonitorUpdate]) -> list[str]:
    """Return what updates say."""
    return [one.text for one in updates]


async def all_lines(session: SessionTasks) -> list[str]:
    """Return all lines that are kept."""
    return lines(await session.updates(unread=False))


async def ended(session: SessionTasks, spec: MonitorSpec) -> TaskState:
    """Run a monitor to its end."""
    return (await (await session.start_monitor(spec)).wait(timeout=30)).state


# --- lines ----------------------------------------------------------------------------------------------------------


async def test_each_line_is_an_update_in_order_with_its_number(session: SessionTasks, watch: Watch) -> None:
    await ended(session, watch.sh("m", "for n in 1 2 3; do echo line $n; done"))

    updates = await session.updates()

    assert [(one.line, one.text, one.stream, one.is_cut) for one in updates] == [
        (n, f"line {n}", Stream.STDOUT, False) for n in (1, 2, 3)
    ]
    [task] = await session.list(include_terminal=True)
    assert {(one.scope, one.monitor_id, one.task_seq) for one in updates} == {(session.scope, "m", task.task_seq)}
    assert [one.update_seq for one in updates] == sorted(one.update_seq for one in updates)
    record = await monitor(session, "m")
    assert (record.lines, record.bytes, record.dropped, record.unread) == (3, 21, 0, 3)
    assert record.throttled_at is None


async def test_the_streams_are_told_apart_and_each_keeps_its_order(session: SessionTasks, watch: Watch) -> None:
    code = "import os\nfor n in range(200):\n    os.write(1 + n % 2, b'%d\\n' % n)"
    await ended(session, watch.python("m", code))

    updates = await session.updates()

    for stream, rest in ((Stream.STDOUT, 0), (Stream.STDERR, 1)):
        assert [one.text for one in updates if one.stream is stream] == [str(n) for n in range(rest, 200, 2)]
    assert sorted(one.line for one in updates) == list(range(1, 201))


@pytest.mark.long
@pytest.mark.parametrize(
    ("written", "found"),
    [
        (b"", []),
        (b"no end", ["no end"]),
        (b"\n", [""]),
        (b"\n\n\n", ["", "", ""]),
        (b"a\r\nb\rc\n", ["a", "b\rc"]),
        (b"a\0b\n", ["a\ufffdb"]),
        (b"\xff\xfe\n", ["\ufffd\ufffd"]),
        ("ünï 🎉\n".encode(), ["ünï 🎉"]),
        (b"\xed\xa0\x80\n", ["\ufffd\ufffd\ufffd"]),
        (b"\x1b[31mred\x1b[0m\n", ["\x1b[31mred\x1b[0m"]),
    ],
)
async def test_any_bytes_are_lines(session: SessionTasks, watch: Watch, written: bytes, found: list[str]) -> None:
    await ended(session, watch.python("m", f"import os; os.write(1, {written!r})"))

    assert await all_lines(session) == found
    assert (await monitor(session, "m")).bytes == len(written)


async def test_a_character_that_comes_in_two_parts_is_one(session: SessionTasks, watch: Watch) -> None:
    code = "import os, time\nfor one in '🎉'.encode():\n    os.write(1, bytes([one])); time.sleep(0.02)"
    await ended(session, watch.python("m", code))

    assert await all_lines(session) == ["🎉"]


@pytest.mark.parametrize("size", [63, 64, 65, 200_000])
@pytest.mark.parametrize("end", ["", "\n", "\nnext\n"])
async def test_a_long_line_is_cut_and_says_so(opened: Callable[..., Any], watch: Watch, size: int, end: str) -> None:
    session = await (await opened(limits=Limits(line_bytes=64))).session("s1")
    await ended(session, watch.python("m", f"print('x' * {size}, end={end!r})"))

    updates = await session.updates()

    assert [(one.text, one.is_cut, one.line) for one in updates] == [
        ("x" * min(size, 64), size > 64, 1),
        *([("next", False, 2)] if "next" in end else []),
    ]
    assert (await monitor(session, "m")).bytes == size + len(end)


async def test_a_line_is_cut_between_two_characters(opened: Callable[..., Any], watch: Watch) -> None:
    session = await (await opened(limits=Limits(line_bytes=16))).session("s1")
    await ended(session, watch.python("m", "import os; os.write(1, ('€' * 10 + '\\n').encode())"))

    assert [(one.text, one.is_cut) for one in await session.updates()] == [("€" * 5, True)]


async def test_a_line_without_an_end_is_bounded_while_it_goes_on(opened: Callable[..., Any], watch: Watch) -> None:
    session = await (await opened(limits=Limits(line_bytes=100))).session("s1")
    code = "import os, sys, time\nfor _ in range(40): sys.stdout.write('x' * 100_000); sys.stdout.flush()\n"
    await session.start_monitor(
        watch.python("m", code + "time.sleep(0.3); print('done', file=sys.stderr); time.sleep(1000)")
    )
    await said(session, "done")

    update, _ = await session.updates()

    assert (update.text, update.is_cut) == ("x" * 100, True)
    record = await monitor(session, "m")
    assert (record.lines, record.dropped, record.bytes) == (2, 0, 4_000_005)
    assert (await session.stop_monitor("m")).state is TaskState.CANCELLED


async def test_the_bytes_of_a_line_without_an_end_are_told_while_it_goes_on(
    session: SessionTasks, watch: Watch
) -> None:
    await session.start_monitor(watch.sh("m", "cat /dev/zero"))

    async def has_much() -> bool:
        return (await monitor(session, "m")).bytes > 4_000_000

    async with asyncio.timeout(3):
        await until_so(has_much)


async def test_random_bytes_are_bounded_and_counted(opened: Callable[..., Any], watch: Watch, path: Path) -> None:
    session = await (await opened(limits=Limits(line_bytes=64, update_bytes=20_000))).session("s1")

    await ended(session, watch.sh("m", "head -c 3000000 /dev/urandom"))

    record, kept = await monitor(session, "m"), await session.updates(unread=False)
    assert record.bytes == 3_000_000
    assert sum(len(one.text.encode()) for one in kept) <= 20_000
    check_counts(record, len(kept))
    assert path.stat().st_size < 3_000_000


# --- the ring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "keep"), [(9, 10), (10, 10), (11, 10), (35, 10), (20_000, 10), (3, 1)])
async def test_the_newest_lines_are_kept_and_the_rest_counted(
    session: SessionTasks, watch: Watch, written: int, keep: int
) -> None:
    await ended(session, watch.sh("m", f"seq 1 {written}", keep_lines=keep))

    updates, record = await session.updates(), await monitor(session, "m")

    kept = list(range(max(1, written - keep + 1), written + 1))
    assert [(one.line, one.text) for one in updates] == [(n, str(n)) for n in kept]
    assert (record.lines, record.dropped, record.unread) == (written, written - len(kept), len(kept))


async def test_the_ring_holds_across_commits_and_counts_what_nobody_read(
    session: SessionTasks, watch: Watch, tmp_path: Path
) -> None:
    fed = await Fed(session, watch, tmp_path / "fed", keep_lines=3).start()
    for n in range(4):
        await fed.say(str(n))
    assert await taken(session) == ["1", "2", "3"]
    # what was read is kept until newer ones take its place
    assert await all_lines(session) == ["1", "2", "3"]
    check_counts(await monitor(session, "fed"), 3)

    await fed.say("4")
    assert await all_lines(session) == ["2", "3", "4"]
    record = await monitor(session, "fed")
    assert (record.dropped, record.unread) == (1, 1)
    check_counts(record, 3, gone=1)

    await fed.say("5", "6", "7")
    record = await monitor(session, "fed")
    assert await taken(session) == ["5", "6", "7"]
    assert record.dropped == 2
    check_counts(record, 3, gone=3)


async def test_each_monitor_has_a_ring_of_its_own(session: SessionTasks, watch: Watch) -> None:
    await ended(session, watch.sh("one", "seq 1 5", keep_lines=2))
    await ended(session, watch.sh("two", "seq 1 5", keep_lines=3))

    assert lines(await session.updates(monitor="one")) == ["4", "5"]
    assert lines(await session.updates(monitor="monitor:two")) == ["3", "4", "5"]


async def test_a_successor_leaves_the_unread_lines_of_the_one_before(session: SessionTasks, watch: Watch) -> None:
    await ended(session, watch.sh("m", "echo old"))
    await ended(session, watch.sh("m", "echo new"))

    updates = await session.updates()

    assert lines(updates) == ["old", "new"]
    assert [one.line for one in updates] == [1, 1]
    record = await monitor(session, "m")
    assert (record.lines, record.unread) == (1, 1)


async def test_an_id_that_is_started_again_and_again_keeps_so_many_lines_and_no_more(
    session: SessionTasks, watch: Watch
) -> None:
    for _ in range(4):
        await ended(session, watch.sh("m", "seq 1 5", keep_lines=5))

    assert len(await session.updates()) <= 5


async def test_a_session_keeps_so_many_bytes_the_oldest_go_first(opened: Callable[..., Any], watch: Watch) -> None:
    session = await (await opened(limits=Limits(update_bytes=110))).session("s1")
    for name in ("one", "two", "three"):
        await ended(session, watch.python(name, f"for n in range(4): print('{name[0]}' * 9 + str(n))"))

    kept = await session.updates()

    assert lines(kept) == ["o" * 9 + str(n) for n in (2, 3)] + [c * 9 + str(n) for c in "tt" for n in range(4)]
    for name, there in (("one", 2), ("two", 4), ("three", 4)):
        record = await monitor(session, name)
        assert (record.lines, record.dropped, record.unread) == (4, 4 - there, there)


async def test_the_bytes_of_one_session_are_not_anothers(opened: Callable[..., Any], watch: Watch) -> None:
    store = await opened(limits=Limits(update_bytes=22))
    session, there = await store.session("s1"), await store.session("s2")
    for one in (session, there):
        await ended(one, watch.python("m", "for n in range(3): print('x' * 10)"))

    assert [len(await one.updates()) for one in (session, there)] == [2, 2]


async def test_a_line_larger_than_all_that_may_be_kept_is_dropped_and_counted(
    opened: Callable[..., Any], watch: Watch
) -> None:
    session = await (await opened(limits=Limits(update_bytes=5))).session("s1")
    await ended(session, watch.sh("m", "echo 123456789; echo ab"))

    record = await monitor(session, "m")
    assert (await all_lines(session), record.lines, record.dropped) == (["ab"], 2, 1)


async def test_what_is_handed_over_counts_where_it_is(opened: Callable[..., Any], watch: Watch) -> None:
    store = await opened(limits=Limits(update_bytes=44))
    session, there = await store.session("s1"), await store.session("s2")
    await ended(there, watch.python("own", "for n in range(4): print('x' * 10)"))
    await session.start_monitor(watch.python("m", "for n in range(4): print('y' * 9 + str(n), flush=True)"))
    await said(session, "y" * 9 + "3")
    await session.transfer(there, ["monitor:m"])

    await ended(there, watch.sh("more", "echo 0123456789"))

    assert sum(len(one.text) for one in await there.updates()) == 40
    for name in ("own", "m", "more"):
        check_counts(await monitor(there, name), len(await there.updates(monitor=name)))


# --- floods ---------------------------------------------------------------------------------------------------------


async def test_one_that_floods_is_throttled_and_its_row_says_so(opened: Callable[..., Any], watch: Watch) -> None:
    store = await opened(limits=Limits(lines_per_second=20))
    session = await store.session("s1")
    task = await session.start_monitor(watch.sh("m", "yes flood", keep_lines=50))

    async def throttled() -> Any:
        return (await monitor(session, "m")).throttled_at

    await until_so(throttled)
    record = await task.record()
    assert record.progress is not None
    assert "throttled" in record.progress

    async def dropped() -> bool:
        return (await monitor(session, "m")).dropped > 1000

    await until_so(dropped)
    assert len(await session.updates(unread=False)) <= 50

    await session.stop_monitor("m")
    record = await monitor(session, "m")
    kept = await session.updates(unread=False)
    assert len(kept) == 50
    check_counts(record, 50)
    assert kept[-1].line == record.lines
    assert [one.text for one in kept[:-1]] == ["flood"] * 49


async def test_a_burst_that_fits_the_ring_is_kept_whole_though_it_comes_late(
    opened: Callable[..., Any], watch: Watch
) -> None:
    store = await opened(limits=Limits(lines_per_second=100))
    session = await store.session("s1")
    task = await session.start_monitor(watch.sh("m", f"seq 1 600; {STAY}", keep_lines=1000))
    await said(session, "600")

    assert await all_lines(session) == [str(n) for n in range(1, 601)]

    async def calm() -> bool:
        return (await monitor(session, "m")).throttled_at is None

    await until_so(calm)
    assert (await task.record()).progress is None
    assert (await monitor(session, "m")).dropped == 0
    await task.cancel()


async def test_its_row_is_not_rewritten_for_each_line_of_a_flood(
    opened: Callable[..., Any], watch: Watch, path: Path
) -> None:
    session = await (await opened(limits=Limits(lines_per_second=1000))).session("s1")
    task = await session.start_monitor(watch.sh("m", "yes flood", keep_lines=20))

    async def much() -> bool:
        return (await monitor(session, "m")).lines > 200_000

    await until_so(much)
    await task.cancel()

    assert len(event_types(path, task.task_seq)) < 20
    assert len(await session.notes()) == 1


async def test_other_work_is_not_held_up_by_floods(opened: Callable[..., Any], watch: Watch) -> None:
    store = await opened()
    session = await store.session("s1")

    async def work() -> float:
        started = time.perf_counter()
        for _ in range(10):
            await (await session.spawn(asyncio.sleep(0)))
        return (time.perf_counter() - started) / 10

    await work()
    alone = await work()
    for n in range(2):
        await session.start_monitor(watch.sh(f"m{n}", "yes 'a line of some length, as they are'"))

    async def flooding() -> bool:
        return all(record.lines > 10_000 for record in await session.monitors())

    await until_so(flooding)
    # two processes have taken both processors by now
    assert await work() < alone * 20 + 0.5
    await session.cancel_all()


# --- taking ---------------------------------------------------------------------------------------------------------


async def test_updates_only_looks(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one", "two")

    assert lines(await session.updates()) == lines(await session.updates()) == ["one", "two"]
    assert lines(await session.updates(limit=1)) == ["one"]
    async with session.take_updates() as claimed:
        assert lines(await session.updates()) == lines(claimed) == ["one", "two"]
    assert await session.updates() == []
    assert [(one.text, one.acknowledged_at is None) for one in await session.updates(unread=False)] == [
        ("one", False),
        ("two", False),
    ]


async def test_leaving_in_order_acknowledges_and_an_exception_gives_again(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one", "two")

    async def fail() -> None:
        async with session.take_updates() as updates:
            assert lines(updates) == ["one", "two"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await taken(session) == ["one", "two"]

    assert await taken(session) == []
    assert (await monitor(session, "fed")).unread == 0


async def test_awaited_it_is_acknowledged_at_once(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one", "two", "three")

    assert lines(await session.take_updates(2)) == ["one", "two"]
    assert lines(await session.take_updates()) == ["three"]
    assert await session.take_updates() == []


async def test_at_most_limit_are_given_the_oldest_first(session: SessionTasks, fed: Fed) -> None:
    await fed.say(*"abcde")

    assert [await taken(session, 2), await taken(session, 1), await taken(session, 9)] == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
    ]


@pytest.mark.parametrize("limit", [0, -1, 2**63, 1.5, "2", True])
async def test_a_limit_that_is_no_number_of_lines_is_refused(session: SessionTasks, limit: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        session.take_updates(limit)
    with pytest.raises((ValueError, TypeError)):
        await session.updates(limit=limit)


async def test_those_of_one_monitor_are_taken_and_the_rest_stays(session: SessionTasks, watch: Watch) -> None:
    for name in ("one", "two"):
        await ended(session, watch.sh(name, f"echo {name} 1; echo {name} 2"))

    assert await taken(session, monitor="two") == ["two 1", "two 2"]
    assert await taken(session, monitor="monitor:one", limit=1) == ["one 1"]
    assert await taken(session, monitor="nobody") == []
    assert await taken(session) == ["one 2"]
    for wrong in ("", "a\0b", 5):
        with pytest.raises((InvalidId, TypeError)):
            await taken(session, monitor=wrong)


async def test_a_second_reader_is_refused_and_the_first_undisturbed(
    session: SessionTasks, fed: Fed, opened: Callable[..., Any], path: Path
) -> None:
    await fed.say("one")
    other = await (await opened()).session("s1")
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        beside = await asking.session("s1")

        async with session.take_updates() as updates:
            for second in (session, other, beside):
                with pytest.raises(InboxBusy, match=r"updates of 'desktop:s1'.*one reader a session"):
                    await taken(second)
                with pytest.raises(InboxBusy):
                    await second.take_updates(monitor="other")
            # the inbox is another thing
            async with session.inbox() as notes:
                assert len(notes) == 1
            assert lines(updates) == ["one"]

        await fed.say("two")
        assert [await taken(beside), await taken(other), await taken(session)] == [["two"], [], []]


async def test_what_is_written_while_somebody_reads_is_for_the_next(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one")

    async with session.take_updates() as updates:
        await fed.say("two")
        assert lines(updates) == ["one"]
        assert lines(await session.updates()) == ["one", "two"]

    assert await taken(session) == ["two"]


async def test_what_the_ring_took_from_a_reader_does_not_disturb_it(
    session: SessionTasks, watch: Watch, tmp_path: Path
) -> None:
    fed = await Fed(session, watch, tmp_path / "fed", keep_lines=2).start()
    await fed.say("one", "two")

    async with session.take_updates() as updates:
        await fed.say("three")
        assert lines(updates) == ["one", "two"]

    assert await taken(session) == ["three"]
    assert (await monitor(session, "fed")).dropped == 0


async def test_a_reader_that_is_cancelled_gives_its_updates_back(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one")
    reading = asyncio.Event()

    async def reader() -> None:
        async with session.take_updates():
            reading.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(reader())
    await reading.wait()
    task.cancel()
    await asyncio.wait({task})

    assert await taken(session) == ["one"]


@pytest.mark.parametrize("late", [False, True])
async def test_a_reader_that_is_cancelled_anywhere_loses_no_line_and_keeps_nobody_out(
    session: SessionTasks, fed: Fed, late: bool
) -> None:
    at = 0
    while True:
        at += 1
        await fed.say(f"line {at}")
        seen: list[str] = []

        async def reader(seen: list[str] = seen) -> None:
            async with session.take_updates() as updates:
                seen += lines(updates)

        stepped = await cancel_at(reader(), at, late=late)

        rest = await taken(session)
        assert rest == [f"line {at}"] if not seen else rest in ([], seen)
        assert stepped.was_cancelled or (seen == [f"line {at}"] and rest == [])
        if not stepped.reached:
            break
    assert at > 2


READER = """
import asyncio, sys
from lash_store import TaskStore
async def main():
    async with TaskStore.connect(sys.argv[1], runtime="desktop") as store:
        async with (await store.session("s1")).take_updates() as updates:
            print([one.text for one in updates], flush=True)
            await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.long
async def test_the_claim_of_a_dead_reader_is_given_again(session: SessionTasks, fed: Fed, path: Path) -> None:
    await fed.say("one")
    with subprocess.Popen([sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert await asyncio.to_thread(reader.stdout.readline) == "['one']\n"
        with pytest.raises(InboxBusy, match=f"process {reader.pid} "):
            await taken(session)
        # a stopped process is not dead
        reader.send_signal(signal.SIGSTOP)
        with pytest.raises(InboxBusy):
            await taken(session)
        reader.kill()

    assert await taken(session) == ["one"]
    assert await taken(session) == []


@pytest.mark.parametrize("failing", [False, True])
async def test_a_store_that_closes_in_the_block_leaves_its_updates_to_the_next(
    new: Callable[..., TaskStore], watch: Watch, failing: bool
) -> None:
    async with new() as store:
        session = await store.session("s1")
        await ended(session, watch.sh("m", "echo one"))

        async def close_in_the_block() -> None:
            async with session.take_updates() as updates:
                assert lines(updates) == ["one"]
                await store.close()
                if failing:
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError if failing else StoreClosed):
            await close_in_the_block()

    async with new() as store:
        assert await taken(await store.session("s1")) == ["one"]


async def test_a_reading_store_looks_and_claims_nothing(session: SessionTasks, fed: Fed, path: Path) -> None:
    await fed.say("one")

    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reading:
        beside = await reading.session("s1")
        assert await all_lines(beside) == ["one"]
        assert (await monitor(beside, "fed")).unread == 1
        with pytest.raises(StoreReadOnly):
            await taken(beside)

    assert await taken(session) == ["one"]


@pytest.mark.parametrize("claim", ["{", "null", "[]", "5", '"o-1"', "{}", '{"token": 7}', '{"token": ["o-1"]}'])
async def test_a_claim_that_no_reader_wrote_holds_nobody_up(
    session: SessionTasks, there: SessionTasks, fed: Fed, path: Path, claim: str
) -> None:
    with sqlite3.connect(path) as hand:
        hand.execute("PRAGMA ignore_check_constraints = 1")
        hand.execute("UPDATE sessions SET updates_claim = ?, inbox_claim = ?", [claim, claim])
    hand.close()
    await fed.say("one")

    assert await taken(there) == []
    assert await taken(session) == ["one"]
    await fed.say("two")
    assert len(await session.notes()) == 1


async def test_the_updates_of_a_closed_session_are_read(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one")
    await session.close()

    assert await taken(session) == ["one"]


async def test_of_a_session_that_is_not_there_nothing_is_read(store: TaskStore, session: SessionTasks) -> None:
    nobody = type(session)(session._core, type(session.scope)("desktop", "nobody"))

    for refused in (nobody.updates(), nobody.monitors(), taken(nobody)):
        with pytest.raises(UnknownSession):
            await refused


async def test_unread_updates_go_with_their_monitor_and_a_reader_of_the_source_deals_with_its_own(
    session: SessionTasks, there: SessionTasks, fed: Fed
) -> None:
    await fed.say("one", "two")

    async with session.take_updates(1) as updates:
        assert lines(updates) == ["one"]
        await session.handoff(there, [fed.task])
        assert lines(await there.updates()) == ["one", "two"]
        # somebody has the first
        assert await taken(there) == ["two"]

    assert (await taken(there), await taken(session)) == ([], [])
    await fed.say("three")
    assert (await taken(there), await taken(session)) == (["three"], [])


async def test_what_a_reader_of_the_source_gives_back_is_given_to_the_successor(
    session: SessionTasks, there: SessionTasks, fed: Fed
) -> None:
    await fed.say("one")

    async def hand_over_and_fail() -> None:
        async with session.take_updates():
            await session.transfer(there, [fed.task])
            assert await taken(there) == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await hand_over_and_fail()
    assert (await taken(session), await taken(there)) == ([], ["one"])


# --- waking ---------------------------------------------------------------------------------------------------------


async def read(session: SessionTasks) -> list[str]:
    """Claim the notes of a session, deal with them, and return what they said."""
    async with session.inbox() as notes:
        return [note.text for note in notes]


def data(notes: Sequence[Note]) -> list[Any]:
    """Return what notes carry."""
    return [note.data for note in notes]


async def test_one_note_stands_while_it_is_unread_and_tells_of_all_that_came(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one")
    [first] = await session.notes()
    assert (first.text, first.task_id) == ("monitor 'fed' wrote 1 line", "monitor:fed")
    assert first.data == {"monitor": "fed", "state": "running", "lines": 1}

    await fed.say("two", "three")
    [second] = await session.notes()
    assert (second.note_seq, second.text) == (first.note_seq, "monitor 'fed' wrote 3 lines")

    await fed.end("FAIL")
    [third] = await session.notes()
    assert third.text == "monitor 'fed' wrote 3 lines, and failed: exit status 1"
    assert third.data == {
        "monitor": "fed",
        "state": "failed",
        "lines": 3,
        "exit_status": 1,
        "type": "ProcessFailed",
        "message": "exit status 1",
    }
    assert await read(session) == [third.text]


async def test_once_its_note_was_read_it_wakes_again(session: SessionTasks, fed: Fed, path: Path) -> None:
    for n in range(3):
        await fed.say(f"line {n}")
        assert await read(session) == ["monitor 'fed' wrote 1 line"]

    await fed.end()

    assert await read(session) == ["monitor 'fed' completed"]
    assert event_types(path, fed.task.task_seq).count("noted") == 4


async def test_while_its_note_is_being_read_what_comes_is_a_second(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one")

    async with session.inbox() as notes:
        await fed.say("two")
        await fed.say("three")
        assert [note.text for note in notes] == ["monitor 'fed' wrote 1 line"]
        assert [note.text for note in await session.notes()] == [
            "monitor 'fed' wrote 1 line",
            "monitor 'fed' wrote 2 lines",
        ]

    assert await read(session) == ["monitor 'fed' wrote 2 lines"]


async def test_its_end_while_its_note_is_being_read_is_a_second(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one")

    with contextlib.suppress(ZeroDivisionError):
        async with session.inbox():
            await fed.end("FAIL")
            raise ZeroDivisionError

    assert await read(session) == ["monitor 'fed' wrote 1 line", "monitor 'fed' failed: exit status 1"]


async def test_reading_its_lines_does_not_read_its_note(session: SessionTasks, fed: Fed) -> None:
    await fed.say("one")
    await taken(session)
    await fed.say("two")

    assert await read(session) == ["monitor 'fed' wrote 2 lines"]


async def test_each_monitor_has_a_note_of_its_own(session: SessionTasks, watch: Watch) -> None:
    for name in ("one", "two", "one"):
        await ended(session, watch.sh(name, "echo hello"))

    assert await read(session) == [f"monitor {name!r} wrote 1 line, and completed" for name in ("one", "two", "one")]


@pytest.mark.parametrize(("line", "text"), [("exit 0", "completed"), ("exit 7", "failed: exit status 7")])
async def test_a_silent_one_wakes_by_its_end(session: SessionTasks, watch: Watch, line: str, text: str) -> None:
    await ended(session, watch.sh("m", line))

    assert await read(session) == [f"monitor 'm' {text}"]


async def test_one_whose_time_was_up_wakes(session: SessionTasks, watch: Watch) -> None:
    await ended(session, watch.sh("m", STAY, timeout=0.1))

    [note] = await session.notes()
    assert note.data is not None
    assert (note.data["state"], note.data["type"]) == ("failed", "Timeout")


async def test_one_that_was_abandoned_wakes(new: Callable[..., TaskStore], watch: Watch) -> None:
    async with new() as store:
        session = await store.session("s1")
        await begun(await session.start_monitor(watch.sh("by hand", STAY)))
        await session.abandon("monitor:by hand", "it hangs")
        assert await read(session) == ["monitor 'by hand' was abandoned"]
        await begun(await session.start_monitor(watch.sh("by the close", STAY)))

    async with new() as store:
        assert await read(await store.session("s1")) == ["monitor 'by the close' was abandoned"]


async def test_one_that_is_run_again_does_not_wake_by_that(new: Callable[..., TaskStore], watch: Watch) -> None:
    for _ in range(2):
        async with new() as store:
            session = await store.session("s1")
            if not await session.monitors():
                await session.start_monitor(watch.sh("m", STAY, restart_on_restore=True))
            await begun(await session.handle("monitor:m"))
            assert await session.notes() == []


async def test_one_that_was_stopped_does_not_wake_by_that(session: SessionTasks, fed: Fed, watch: Watch) -> None:
    await session.start_monitor(watch.sh("silent", STAY))
    await fed.say("one")
    await session.cancel_all()

    assert await read(session) == ["monitor 'fed' wrote 1 line"]


async def test_notify_posts_no_note_and_tells_the_feed_of_the_first_line_that_is_unread(
    session: SessionTasks, watch: Watch, tmp_path: Path, path: Path
) -> None:
    fed = await Fed(session, watch, tmp_path / "fed", wake_policy=WakePolicy.NOTIFY).start()

    def told() -> int:
        return event_types(path, fed.task.task_seq).count("progress")

    await fed.say("one")
    assert told() == 1
    await fed.say("two")
    assert told() == 1
    assert await taken(session) == ["one", "two"]
    await fed.say("three")
    assert told() == 2
    async with session.take_updates():
        await fed.say("four")
    assert told() == 3
    assert await fed.end("FAIL") is TaskState.FAILED
    assert await session.notes() == []
    assert EventType.NOTED not in event_types(path, fed.task.task_seq)


async def test_who_follows_the_feed_is_told_of_the_first_line(
    session: SessionTasks, watch: Watch, tmp_path: Path
) -> None:
    fed = await Fed(session, watch, tmp_path / "fed", wake_policy=WakePolicy.NOTIFY).start()

    async def first() -> list[str]:
        async with asyncio.timeout(20):
            async for _ in session.events(0, types=[EventType.PROGRESS]):
                return await taken(session)
        raise AssertionError

    following = asyncio.create_task(first())
    await fed.say("hello")
    assert await following == ["hello"]


async def test_the_note_of_a_line_and_the_line_are_there_at_once(session: SessionTasks, fed: Fed) -> None:
    async def first() -> tuple[int, int]:
        async with asyncio.timeout(20):
            async for _ in session.events(0, types=[EventType.NOTED]):
                return len(await session.updates()), len(await session.notes())
        raise AssertionError

    following = asyncio.create_task(first())
    fed.tell("hello")
    assert await following == (1, 1)


async def test_what_it_wrote_is_stored_before_its_end(session: SessionTasks, watch: Watch) -> None:
    for n in range(5):
        task = await session.start_monitor(watch.sh(f"m{n}", "seq 1 500"))
        await task
        assert lines(await session.updates(monitor=f"m{n}")) == [str(k) for k in range(1, 501)]


async def test_the_note_goes_with_its_monitor_and_is_added_to_there(
    session: SessionTasks, there: SessionTasks, fed: Fed
) -> None:
    await fed.say("one")
    await session.transfer(there, [fed.task])
    await fed.say("two")
    await fed.end()

    assert (await read(session), await read(there)) == ([], ["monitor 'fed' wrote 2 lines, and completed"])


# --- a full disk ----------------------------------------------------------------------------------------------------


class Disk:
    """Room on the disk of a store."""

    def __init__(self, store: TaskStore) -> None:
        core = store._core
        assert core is not None
        assert core.writer is not None
        assert core.writer._connection is not None
        self._connection = core.writer._connection

    async def fill(self) -> None:
        """Leave none."""
        pages = await self._connection.run(lambda raw: raw.execute("PRAGMA page_count").fetchone()[0])
        await self._connection.run(lambda raw: raw.execute(f"PRAGMA max_page_count={pages}").fetchall())

    async def free(self) -> None:
        """Make some."""
        await self._connection.run(lambda raw: raw.execute("PRAGMA max_page_count=1000000").fetchall())


WIDE = "w" * 3000


async def refused(caplog: pytest.LogCaptureFixture, times: int = 1) -> None:
    """Wait until lines could not be stored, so many *times* from now on, or at all."""
    before = 0 if times == 1 else len(caplog.records)
    await until(lambda: [one.message for one in caplog.records[before:]].count("monitor_not_stored") >= times)


async def test_on_a_full_disk_it_runs_on_and_its_lines_are_stored_once_there_is_room(
    store: TaskStore, session: SessionTasks, fed: Fed, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, pid = Disk(store), await begun(fed.task)
    await fed.say("before")
    await disk.fill()
    fed.tell("\n".join(f"{n} {WIDE}" for n in range(20)))
    await refused(caplog)
    assert pid in watch.running()
    assert (await fed.task.record()).state is TaskState.RUNNING

    await disk.free()

    await said(session, f"19 {WIDE}")
    assert lines(await session.updates()) == ["before", *(f"{n} {WIDE}" for n in range(20))]
    check_counts(await monitor(session, "fed"), 21)
    assert (await fed.task.record()).state is TaskState.RUNNING


@pytest.mark.parametrize("how", ["exits", "stopped"])
async def test_what_it_wrote_on_a_full_disk_is_stored_though_it_ended_before_there_was_room(
    session: SessionTasks,
    fed: Fed,
    watch: Watch,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    def refuse(*_: Any) -> Any:
        raise StorageFull("the disk is full")

    await fed.say("before")
    with monkeypatch.context() as full:
        full.setattr(monitoring, "store_lines", refuse)
        fed.tell("one\ntwo")
        await refused(caplog)
        if how == "exits":
            fed.tell("END")
        else:
            await session.cancel(fed.task, timeout=0)
        await until(lambda: not watch.running())
        # by then its end is known here, too
        await refused(caplog, 3)
    record = await fed.task.wait(timeout=20)

    assert record.state is (TaskState.COMPLETED if how == "exits" else TaskState.CANCELLED)
    assert lines(await session.updates()) == ["before", "one", "two"]
    check_counts(await monitor(session, "fed"), 3)


async def test_a_store_that_closes_on_a_full_disk_leaves_no_process(
    new: Callable[..., TaskStore], watch: Watch, caplog: pytest.LogCaptureFixture, path: Path, tmp_path: Path
) -> None:
    store = new(cancel_grace=0.2)
    await store.open()
    session = await store.session("s1")
    fed = await Fed(session, watch, tmp_path / "fed").start()
    disk = Disk(store)
    await fed.say("before")
    await disk.fill()
    fed.tell("\n".join(f"{n} {WIDE}" for n in range(20)))
    await refused(caplog)

    with contextlib.suppress(Exception):
        await store.close(timeout=0.5)

    assert watch.running() == []
    async with new() as store:
        await store.session("s1")
        [row] = rows(path, "SELECT state, evidence FROM tasks")
        assert row["state"] == "abandoned"


async def test_the_log_is_quiet_about_a_monitor_that_does_well(
    session: SessionTasks, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await ended(session, watch.sh("m", "seq 1 50"))
    await session.start_monitor(watch.sh("n", STAY))
    await session.stop_monitor("n")

    assert [record.message for record in caplog.records] == []
    assert json.loads(json.dumps((await session.monitors())[0].model_dump(mode="json")))["lines"] == 50
