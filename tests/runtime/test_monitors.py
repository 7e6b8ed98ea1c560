"""Monitors: a real process is started once it is recorded, ends as its row says, and leaves nothing behind, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    ArmOn,
    CancelPolicy,
    DuplicateFunction,
    FunctionError,
    HandleNotVisible,
    InvalidArguments,
    InvalidId,
    LimitExceeded,
    Limits,
    MonitorSpec,
    ProcessFate,
    Recovery,
    SessionClosed,
    SessionTasks,
    StorageFull,
    StoreClosed,
    StoreError,
    StoreReadOnly,
    TaskContext,
    TaskError,
    TaskExists,
    TaskFailed,
    TaskFilter,
    TaskHandle,
    TaskKind,
    TaskNotFound,
    TaskState,
    TaskStore,
    launching,
    migrate,
    monitoring,
    monitors,
    processes,
    programs,
    supervising,
)
from lash_store.launching import Launched
from lash_store.pipes import Output
from tests.runtime.support import (
    RUNTIME,
    cancel_at,
    check_file,
    event_types,
    hold,
    left_over,
    rows,
    states,
    sweep_up,
    threads,
)
from tests.runtime.watching import (
    STAY,
    STUBBORN,
    Watch,
    begun,
    monitor,
    nothing_left,
    pipes,
    said,
    taken,
    until,
    until_so,
    zombies,
)


@pytest.fixture(autouse=True)
def watch(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Specs of processes; none of which, nor anything of them, may be left."""
    with nothing_left(monkeypatch) as watch:
        yield watch


@pytest.fixture
async def quick(opened: Callable[..., Any]) -> TaskStore:
    """A store that gives processes little time to go."""
    found: TaskStore = await opened(cancel_grace=0.2)
    return found


# --- how a process ends ---------------------------------------------------------------------------------------------


async def test_status_0_is_completed(session: SessionTasks, watch: Watch, path: Path) -> None:
    task = await session.start_monitor(watch.sh("m", "exit 0"))

    assert await task == {"exit_status": 0}

    assert (watch.running(), zombies()) == ([], [])
    record = await monitor(session, "m")
    assert (record.state, record.exit_status, record.task.process) == (TaskState.COMPLETED, 0, None)
    assert (record.task.id, record.task.kind, record.task.attempt) == ("monitor:m", TaskKind.MONITOR, 1)
    assert event_types(path, task.task_seq) == ["registered", "started", "state_changed", "noted", "completed"]


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("exit 3", 3, "exit status 3"),
        ("exit 255", 255, "exit status 255"),
        ("kill -KILL $$", -9, "killed by signal 9 (SIGKILL)"),
        ("kill -TERM $$", -15, "killed by signal 15 (SIGTERM)"),
        ("kill -SEGV $$", -11, "killed by signal 11 (SIGSEGV)"),
    ],
)
async def test_any_other_status_is_failed(
    session: SessionTasks, watch: Watch, line: str, status: int, message: str
) -> None:
    task = await session.start_monitor(watch.sh("m", line))

    with pytest.raises(TaskFailed, match=rf"{message.partition('(')[0]}"):
        await task

    assert (watch.running(), zombies()) == ([], [])
    record = await monitor(session, "m")
    assert record.task.failure is not None
    assert (record.task.failure.type, record.task.failure.message) == ("ProcessFailed", message)
    assert (record.state, record.exit_status, record.task.process) == (TaskState.FAILED, status, None)


async def test_one_whose_time_is_up_is_failed_once_it_is_gone(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.sh("m", STAY, timeout=0.3))

    record = await task.wait(timeout=20)

    assert watch.running() == []
    assert record.failure is not None
    assert (record.state, record.failure.type, record.process) == (TaskState.FAILED, "Timeout", None)
    assert (await monitor(session, "m")).exit_status == -signal.SIGTERM


async def test_one_whose_time_is_up_is_killed_if_it_does_not_heed_it(quick: TaskStore, watch: Watch) -> None:
    session = await quick.session("s1")
    task = await session.start_monitor(watch.python("m", STUBBORN, timeout=0.5))
    await said(session, "up")

    record = await task.wait(timeout=20)

    assert watch.running() == []
    assert record.failure is not None
    assert (record.state, record.failure.type) == (TaskState.FAILED, "Timeout")
    assert (await monitor(session, "m")).exit_status == -signal.SIGKILL


@pytest.mark.parametrize("options", [{"persistent": True, "timeout": 0.05}, {"timeout": None}])
async def test_a_persistent_one_has_no_end_of_its_time(
    session: SessionTasks, watch: Watch, options: dict[str, Any], tmp_path: Path
) -> None:
    task = await session.start_monitor(
        watch.sh("m", f"echo up; until [ -e {tmp_path}/go ]; do sleep 0.05; done", **options)
    )
    await said(session, "up")
    before = time.monotonic()
    await until(lambda: time.monotonic() > before + 0.2)

    (tmp_path / "go").touch()

    assert await task == {"exit_status": 0}


async def test_stopping_is_cancelled_and_returns_when_nothing_lives(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.sh("m", f"echo up; {STAY}"))
    await said(session, "up")

    record = await session.stop_monitor("m", "enough")

    assert (watch.running(), zombies()) == ([], [])
    assert (record.state, record.cancel_reason, record.process) == (TaskState.CANCELLED, "enough", None)
    assert record == await task.record()
    assert (await monitor(session, "m")).exit_status == -signal.SIGTERM


@pytest.mark.parametrize(
    "how", ["handle", "cancel", "cancel_all", "cancel_unreferenced", "handoff", "close", "parent", "connect"]
)
async def test_however_it_is_cancelled_the_group_is_gone_by_then(
    store: TaskStore, session: SessionTasks, there: SessionTasks, watch: Watch, path: Path, how: str
) -> None:
    parent = await there.spawn(
        asyncio.Event().wait(), id="agent", kind=TaskKind.SUBAGENT, child_session_id=session.scope.session_id
    )
    task = await session.start_monitor(watch.sh("m", f"sleep 1000 & echo up; {STAY}"))
    await said(session, "up")

    match how:
        case "handle":
            await task.cancel()
        case "cancel":
            await session.cancel("monitor:m")
        case "cancel_all":
            await session.cancel_all()
        case "cancel_unreferenced":
            await session.cancel_unreferenced([])
        case "handoff":
            await session.handoff(there, [])
        case "close":
            await session.close()
        case "parent":
            await parent.cancel()
        case "connect":
            async with TaskStore.connect(path, runtime=RUNTIME) as asking:
                await (await asking.session("s1")).stop_monitor("m")
    record = await task.wait(timeout=20)

    assert watch.running() == []
    assert (record.state, record.process) == (TaskState.CANCELLED, None)


TREE = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {STUBBORN!r}])
if os.fork() == 0:
    if os.fork() == 0:
        print("orphan", flush=True)
        time.sleep(1000)
    os._exit(0)
os.wait()
time.sleep(1000)
"""


async def test_a_tree_that_does_not_heed_sigterm_goes_too(quick: TaskStore, watch: Watch) -> None:
    """Children, and one whose parent is gone; each holds the pipes open."""
    session = await quick.session("s1")
    await session.start_monitor(watch.python("m", TREE))
    await said(session, "orphan")
    await said(session, "up")
    assert len(watch.running()) >= 3

    record = await session.stop_monitor("m")

    assert watch.running() == []
    assert record.state is TaskState.CANCELLED


async def test_the_row_is_not_cancelled_while_one_of_the_group_lives(
    opened: Callable[..., Any], watch: Watch, path: Path
) -> None:
    store = await opened(cancel_grace=1.0)
    session = await store.session("s1")
    code = f"import os\nif os.fork():\n    import time; time.sleep(1000)\n{STUBBORN}"
    task = await session.start_monitor(watch.python("m", code))
    await said(session, "up")

    record = await session.stop_monitor("m", timeout=0)
    assert record.state is TaskState.CANCEL_REQUESTED
    # the leader heeds it
    await until(lambda: len(watch.running()) == 1)
    [state] = rows(path, "SELECT state, process FROM tasks")
    assert (state["state"], state["process"] is None) == ("cancel_requested", False)

    await task.wait(timeout=20)
    assert watch.running() == []


async def test_one_that_is_stopped_by_a_signal_is_ended(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.sh("m", f"echo up; {STAY}"))
    await said(session, "up")
    os.kill(await begun(task), signal.SIGSTOP)

    async with asyncio.timeout(4):
        assert (await session.stop_monitor("m")).state is TaskState.CANCELLED


async def test_one_that_moved_to_another_group_of_its_session_is_ended(quick: TaskStore, watch: Watch) -> None:
    session = await quick.session("s1")
    code = f"import os\nif os.fork():\n    import time; time.sleep(1000)\nos.setpgid(0, 0)\n{STUBBORN}"
    await session.start_monitor(watch.python("m", code))
    await said(session, "up")

    await session.stop_monitor("m")

    assert watch.running() == []


async def test_what_a_process_leaves_in_its_group_is_ended_before_it_is_completed(
    quick: TaskStore, watch: Watch
) -> None:
    session = await quick.session("s1")
    task = await session.start_monitor(
        watch.python("m", f"import os, time\nif os.fork():\n    time.sleep(0.2); os._exit(0)\n{STUBBORN}")
    )

    assert await task == {"exit_status": 0}
    assert watch.running() == []


async def test_one_that_ended_by_itself_is_completed_though_its_stop_comes_before_the_rest_has_gone(
    opened: Callable[..., Any], watch: Watch
) -> None:
    store = await opened(cancel_grace=0.5)
    session = await store.session("s1")
    task = await session.start_monitor(
        watch.python("m", f"import os, time\nif os.fork():\n    time.sleep(0.2); os._exit(0)\n{STUBBORN}")
    )
    pid = await begun(task)
    await until(lambda: pid in zombies())

    record = await session.stop_monitor("m")

    assert (record.state, record.result) == (TaskState.COMPLETED, {"exit_status": 0})
    assert watch.running() == []


@pytest.mark.parametrize(("status", "state"), [(0, TaskState.COMPLETED), (3, TaskState.FAILED)])
async def test_a_stop_that_comes_before_an_end_is_noticed_comes_too_late(
    session: SessionTasks, watch: Watch, monkeypatch: pytest.MonkeyPatch, status: int, state: TaskState
) -> None:
    watched: list[int] = []

    def exit_watched(launched: Launched, exited: asyncio.Event) -> contextlib.nullcontext[None]:
        # nothing tells of the exit
        watched.append(launched.pid)
        return contextlib.nullcontext()

    monkeypatch.setattr(supervising, "_exit_watched", exit_watched)
    task = await session.start_monitor(watch.sh("m", f"exit {status}"))
    pid = await begun(task)
    await until(lambda: pid in zombies() and watched == [pid])

    assert (await session.stop_monitor("m")).state == state


async def test_one_that_ends_by_itself_once_its_stop_was_asked_for_wakes_nobody(
    opened: Callable[..., Any], watch: Watch
) -> None:
    store = await opened(cancel_grace=0.5)
    session = await store.session("s1")
    task = await session.start_monitor(
        watch.python("m", f"import os, time\nif os.fork():\n    time.sleep(0.2); os._exit(3)\n{STUBBORN}")
    )
    pid = await begun(task)
    await until(lambda: pid in zombies())
    await session.notes()
    async with session.inbox():
        # what it wrote before is read
        pass

    record = await session.stop_monitor("m")

    assert (record.state, record.cancel_requested_at is None) == (TaskState.FAILED, False)
    assert await session.notes() == []


async def test_who_left_for_a_session_of_its_own_and_holds_the_pipes_keeps_nobody_waiting(
    session: SessionTasks, watch: Watch
) -> None:
    task = await session.start_monitor(watch.sh("m", "setsid sleep 1000 & sleep 0.2; echo last"))

    async with asyncio.timeout(10):
        assert await task == {"exit_status": 0}

    assert await taken(session) == ["last"]
    assert len(watch.running()) == 1
    watch.kill()


async def test_what_it_says_when_it_is_stopped_is_kept(session: SessionTasks, watch: Watch) -> None:
    code = """
import os, signal, time
def end(*_):
    os.write(1, b"bye\\n" + b"really")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(1000)
"""
    await session.start_monitor(watch.python("m", code))
    await said(session, "up")

    record = await session.stop_monitor("m")

    assert record.state is TaskState.CANCELLED
    assert await taken(session) == ["up", "bye", "really"]
    assert (await monitor(session, "m")).exit_status == 0


async def test_a_process_that_somebody_else_waited_for_is_failed_and_says_so(
    session: SessionTasks, watch: Watch
) -> None:
    task = await session.start_monitor(watch.sh("m", "echo up; sleep 0.3"))
    pid = await begun(task)
    await said(session, "up")

    await asyncio.get_running_loop().run_in_executor(None, os.waitpid, pid, 0)

    with pytest.raises(TaskFailed, match="lost"):
        await task
    assert (await monitor(session, "m")).exit_status is None
    launching._children.pop(pid, None)


# --- how it is run --------------------------------------------------------------------------------------------------


async def test_it_leads_a_group_and_a_session_and_has_no_input(session: SessionTasks, watch: Watch) -> None:
    code = "import os, sys; print(os.getpid() == os.getpgrp() == os.getsid(0), os.getpgrp(), repr(sys.stdin.read()))"
    task = await session.start_monitor(watch.python("m", code))
    await task

    [line] = await taken(session)
    leads, group, heard = line.split()
    assert (leads, heard) == ("True", "''")
    assert int(group) != os.getpgrp()


async def test_it_has_of_the_environment_what_is_named_and_nothing_else(
    session: SessionTasks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "hidden")
    monkeypatch.setenv("A_TOKEN", "by name")
    code = "import os; print(*sorted(os.environ), sep='\\n'); print(os.environ['A_TOKEN'], os.environ['SAID'])"
    task = await session.start_monitor(
        watch.python("m", code, env={"SAID": "so, ünïcode"}, inherit_env=("A_TOKEN", "NOT_THERE"))
    )
    await task

    *found, values = await taken(session)
    assert values == "by name so, ünïcode"
    own = {"A_TOKEN", "SAID", "LASH_STORE_MONITOR", "LASH_TEST_MARK"}
    assert own <= set(found) <= own | set(programs.INHERITED) | {"LC_CTYPE"}


async def test_it_has_no_descriptor_of_its_owner(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.python("m", "import os; print(sorted(os.listdir('/proc/self/fd')))"))
    await task

    # one is that of the listing
    assert await taken(session) == [str(["0", "1", "2", "3"])]


async def test_signals_are_as_a_program_expects_them(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.sh("m", "grep -E 'Sig(Ign|Blk)' /proc/self/status"))
    await task

    # 32 and 33 are the C library's own, and ignored in all that is started by posix_spawn()
    own = 0b11 << 31
    # under nohup, say, what the program was started with goes on to what it starts; Python's own two do not
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            own |= 1 << (number - 1)
    assert [int(line.split()[1], 16) & ~own for line in await taken(session)] == [0, 0]


async def test_it_runs_in_its_folder_and_a_program_is_found_from_there(
    session: SessionTasks, watch: Watch, tmp_path: Path
) -> None:
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\npwd -P\n")
    program.chmod(0o755)

    for command in (["./tool"], [program]):
        await (await session.start_monitor(MonitorSpec(id="m", command=command, cwd=tmp_path)))
    assert await taken(session) == [str(tmp_path.resolve())] * 2


async def test_a_relative_folder_is_the_one_it_was_when_it_was_started(
    session: SessionTasks, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    task = await session.start_monitor(watch.sh("m", "pwd -P", cwd="here"))
    await task

    assert await taken(session) == [str((tmp_path / "here").resolve())]
    assert (await monitor(session, "m")).spec.cwd == str(tmp_path / "here")


def unusable(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Return what cannot be run."""
    (tmp_path / "plain").write_text("no program")
    return {
        "no program": {"command": ["no-such-program-anywhere"]},
        "no file": {"command": [str(tmp_path / "missing")]},
        "a folder": {"command": [str(tmp_path)]},
        "not executable": {"command": [str(tmp_path / "plain")]},
        "no folder": {"command": ["true"], "cwd": str(tmp_path / "missing")},
        "a file for a folder": {"command": ["true"], "cwd": str(tmp_path / "plain")},
        "not on its own path": {"command": ["true"], "env": {"PATH": str(tmp_path)}},
    }


@pytest.mark.parametrize(
    "what",
    ["no program", "no file", "a folder", "not executable", "no folder", "a file for a folder", "not on its own path"],
)
async def test_what_cannot_be_run_is_refused_and_nothing_stored(
    session: SessionTasks, path: Path, tmp_path: Path, what: str
) -> None:
    with pytest.raises(InvalidArguments):
        await session.start_monitor(MonitorSpec(id="m", **unusable(tmp_path)[what]))

    assert (rows(path, "SELECT * FROM tasks"), await session.monitors()) == ([], [])


@pytest.mark.parametrize("spec", [None, "m", {"id": "m", "command": ["true"]}, MonitorSpec])
async def test_only_a_spec_is_started(session: SessionTasks, path: Path, spec: Any) -> None:
    with pytest.raises(InvalidArguments):
        await session.start_monitor(spec)
    assert rows(path, "SELECT * FROM tasks") == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"command": []},
        {"command": [""]},
        {"command": ""},
        {"command": "echo hello"},
        {"command": "  ", "shell": True},
        {"command": ["echo"], "shell": True},
        {"command": ["echo", "a\0b"]},
        {"command": "echo \0", "shell": True},
        {"command": ["echo", "\ud800"]},
        {"command": ["echo", 5]},
        {"command": b"echo"},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": 86_401},
        {"timeout": "5"},
        {"timeout": True},
        {"cwd": ""},
        {"cwd": "a\0b"},
        {"env": {"A": "b\0c"}},
        {"env": {"A\0": "b"}},
        {"env": {"": "b"}},
        {"env": {"A=B": "c"}},
        {"env": {"A": 5}},
        {"inherit_env": ("A=B",)},
        {"id": ""},
        {"id": "monitor:m"},
        {"id": "a\0b"},
        {"keep_lines": 0},
        {"keep_lines": 100_001},
        {"keep_lines": 2.5},
        {"wake_policy": "shout"},
        {"arm_on": "never"},
        {"unknown": 1},
    ],
    ids=repr,
)
def test_a_spec_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, InvalidId)):
        MonitorSpec(**{"id": "m", "command": ["true"], **wrong})


@pytest.mark.parametrize(
    ("text", "error"), [("", "OSError"), ("#!/no/such/interpreter\n", "FileNotFoundError"), ("\x7fELF", "OSError")]
)
async def test_a_file_that_is_no_program_fails_and_leaves_nothing(
    session: SessionTasks, watch: Watch, tmp_path: Path, text: str, error: str
) -> None:
    program = tmp_path / "program"
    program.write_text(text)
    program.chmod(0o755)

    task = await session.start_monitor(MonitorSpec(id="m", command=[program]))
    record = await task.wait(timeout=20)

    assert record.failure is not None
    assert (record.state, record.failure.type) == (TaskState.FAILED, error)
    assert str(program) in record.failure.message
    assert zombies() == []


async def test_arguments_too_long_for_the_system_fail_and_leave_nothing(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.python("m", "#" * 200_000))

    record = await task.wait(timeout=20)

    assert record.failure is not None
    assert (record.state, record.failure.type) == (TaskState.FAILED, "OSError")
    assert zombies() == []


async def test_arguments_come_as_they_were_given(session: SessionTasks, watch: Watch) -> None:
    given = ["a b", "", "$HOME", "ünï", "new\nline", "'\"", "*"]
    code = "import sys; print(ascii(sys.argv[1:]))"
    task = await session.start_monitor(MonitorSpec(id="m", command=[sys.executable, "-c", code, *given]))
    await task

    assert await taken(session) == [ascii(given)]


async def test_where_no_process_can_be_started_it_fails_and_leaves_nothing(
    session: SessionTasks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(11, "no more processes")

    monkeypatch.setattr(launching.subprocess, "Popen", refuse)
    record = await (await session.start_monitor(watch.sh("m", "exit 0"))).wait(timeout=20)

    assert record.failure is not None
    assert (record.state, record.process) == (TaskState.FAILED, None)
    assert "no more processes" in record.failure.message


@pytest.mark.parametrize("count", range(1, 5))
async def test_where_no_descriptor_is_left_it_fails_and_leaves_none(
    session: SessionTasks, watch: Watch, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    made, pipe = iter(range(1, 100)), os.pipe

    def scarce() -> tuple[int, int]:
        if next(made) == count:
            raise OSError(24, "too many open files")
        return pipe()

    with monkeypatch.context() as patched:
        patched.setattr(launching.os, "pipe", scarce)
        record = await (await session.start_monitor(watch.sh("m", "exit 0"))).wait(timeout=20)

    assert record.failure is not None
    assert (record.state, record.failure.type) == (TaskState.FAILED, "OSError")


async def test_a_program_without_an_interpreter_of_its_own_is_told_so(
    session: SessionTasks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = watch.sh("m", "exit 0")
    monkeypatch.setattr(sys, "executable", "")

    with pytest.raises(TaskFailed, match=r"sys\.executable"):
        await (await session.start_monitor(spec))


# --- at each phase --------------------------------------------------------------------------------------------------

PHASES = ["before it is launched", "at the gate", "recorded", "begun"]


class Held:
    """A monitor that is held in one phase of its start."""

    phase = ""

    def __init__(self) -> None:
        self._at = threading.Event()
        self._go = threading.Event()

    def stay(self) -> None:
        self._at.set()
        assert self._go.wait(20)

    @property
    def is_reached(self) -> bool:
        return self._at.is_set()

    async def reached(self) -> None:
        await until(self._at.is_set)

    def go_on(self) -> None:
        self._go.set()


@pytest.fixture(params=PHASES)
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Held:
    """Hold the next monitor in each phase of its start."""
    held, launch, open_gate = Held(), launching.launch, Launched.open_gate

    def hold_launch(*arguments: Any) -> Launched:
        if request.param == PHASES[0]:
            held.stay()
        launched = launch(*arguments)
        if request.param == PHASES[1]:
            held.stay()
        return launched

    def hold_gate(self: Launched, *arguments: Any) -> None:
        if request.param == PHASES[2]:
            held.stay()
        open_gate(self, *arguments)
        if request.param == PHASES[3]:
            held.stay()

    monkeypatch.setattr(launching, "launch", hold_launch)
    monkeypatch.setattr(Launched, "open_gate", hold_gate)
    held.phase = request.param
    return held


def ran(held: Held, tmp_path: Path) -> bool:
    """Say whether the program began though nobody wanted it any more."""
    return held.phase in PHASES[:2] and (tmp_path / "ran").exists()


async def test_stopped_in_any_phase_of_its_start_it_is_cancelled_and_gone(
    session: SessionTasks, watch: Watch, held: Held, tmp_path: Path
) -> None:
    task = await session.start_monitor(watch.sh("m", f"touch {tmp_path}/ran; {STAY}"))
    await held.reached()

    assert (await session.stop_monitor("m", timeout=0)).state is TaskState.CANCEL_REQUESTED
    held.go_on()
    record = await task.wait(timeout=20)

    assert watch.running() == []
    assert (record.state, record.process) == (TaskState.CANCELLED, None)
    assert not ran(held, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("timeout", [0.0, 10.0])
async def test_a_store_that_closes_in_any_phase_of_its_start_leaves_nothing(
    new: Callable[..., TaskStore],
    watch: Watch,
    held: Held,
    path: Path,
    tmp_path: Path,
    restart: bool,
    timeout: float,
) -> None:
    before = threads()
    async with new() as store:
        session = await store.session("s1")
        await session.start_monitor(watch.sh("m", f"touch {tmp_path}/ran; {STAY}", restart_on_restore=restart))
        await held.reached()
        closing = asyncio.create_task(store.close(timeout=timeout))
        await until(lambda: store._core is None or store._core.is_closing)
        held.go_on()
        await closing

    assert watch.running() == []
    assert await left_over(path, before) == []
    [row] = rows(path, "SELECT * FROM tasks")
    if restart:
        assert (row["state"], row["owner_id"], row["attempts_spent"]) == ("pending", None, 0)
    else:
        assert (row["state"], row["process"]) == ("abandoned", None)
    assert not ran(held, tmp_path)


async def test_abandoned_in_any_phase_of_its_start_it_is_gone(
    session: SessionTasks, watch: Watch, held: Held, tmp_path: Path
) -> None:
    await session.start_monitor(watch.sh("m", f"touch {tmp_path}/ran; {STAY}"))
    await held.reached()

    abandoning = asyncio.create_task(session.abandon("monitor:m", "it hangs"))
    await until(lambda: rows(Path(session._core.path), "SELECT 1 FROM tasks WHERE state = 'abandoned'"))
    held.go_on()

    assert (await abandoning).state is TaskState.ABANDONED
    await until(lambda: watch.running() == [])
    assert not ran(held, tmp_path)


async def test_one_whose_time_is_up_in_any_phase_of_its_start_is_failed_and_gone(
    session: SessionTasks, watch: Watch, held: Held, tmp_path: Path
) -> None:
    task = await session.start_monitor(watch.sh("m", f"touch {tmp_path}/ran; {STAY}", timeout=0.2))
    bodies = session._core.runner._bodies  # type: ignore[union-attr]
    body = await until(lambda: bodies.get(task.task_seq))
    # on a busy machine it may be up before
    await until(lambda: held.is_reached or body.timed_out)
    await until(lambda: body.timed_out)

    held.go_on()
    record = await task.wait(timeout=20)

    assert watch.running() == []
    assert record.failure is not None
    assert (record.state, record.failure.type) == (TaskState.FAILED, "Timeout")
    assert not ran(held, tmp_path)


@pytest.mark.parametrize("late", [False, True])
async def test_a_caller_cancelled_anywhere_in_starting_leaves_a_monitor_or_none(
    session: SessionTasks, watch: Watch, late: bool
) -> None:
    at = 0
    while True:
        at += 1
        spec = watch.sh(f"m{at}", STAY)
        stepped = await cancel_at(session.start_monitor(spec), at, late=late)
        # what was asked for before is committed by then
        await asyncio.sleep(0)
        await session.unregister("nobody")

        live = {record.id for record in await session.monitors() if not record.state.is_terminal}
        assert live in (set(), {spec.id})
        assert stepped.was_cancelled or live == {spec.id}
        if live:
            assert (await session.stop_monitor(spec.id)).state is TaskState.CANCELLED
        assert watch.running() == []
        if not stepped.reached:
            break
    assert at > 2


@pytest.mark.parametrize("late", [False, True])
async def test_a_caller_cancelled_anywhere_in_stopping_has_stopped_it_or_not(
    session: SessionTasks, watch: Watch, late: bool
) -> None:
    at = 0
    while True:
        at += 1
        task = await session.start_monitor(watch.sh("m", STAY))
        await begun(task)
        stepped = await cancel_at(session.stop_monitor("m"), at, late=late)

        if (await task.record()).state is TaskState.RUNNING:
            assert stepped.was_cancelled
            await session.stop_monitor("m")
        assert (await task.wait(timeout=20)).state is TaskState.CANCELLED
        assert watch.running() == []
        if not stepped.reached:
            break
    assert at > 1


async def test_a_stop_that_races_with_the_end_gives_one_end(session: SessionTasks, watch: Watch, path: Path) -> None:
    ends = set()
    for turn in range(12):
        task = await session.start_monitor(watch.sh("m", f"sleep 0.0{turn % 6}"))
        if turn % 2:
            await begun(task)
        record = await session.stop_monitor("m")
        ends.add(record.state)
        assert record.state in {TaskState.COMPLETED, TaskState.CANCELLED}
        assert (watch.running(), record.process) == ([], None)
    check_file(path)


async def test_all_who_stop_it_at_once_are_given_one_end(session: SessionTasks, watch: Watch, path: Path) -> None:
    task = await session.start_monitor(watch.sh("m", f"echo up; {STAY}"))
    await said(session, "up")

    records = await asyncio.gather(*(session.stop_monitor("m", str(n)) for n in range(5)), session.close())

    assert {record.state for record in records[:-1]} == {TaskState.CANCELLED}  # type: ignore[union-attr]
    assert event_types(path, task.task_seq).count("cancelled") == 1


async def test_nobody_else_may_end_it(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.sh("m", STAY))

    for ending in (session.complete(task, TaskState.COMPLETED), session.unregister(task)):
        with pytest.raises(TaskError):
            await ending
    assert (await task.record()).state is TaskState.RUNNING


async def test_a_full_disk_before_it_is_recorded_is_no_failure_of_its_own(
    store: TaskStore, session: SessionTasks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store._core is not None
    record_process, refused = monitoring.record_process, []

    def refuse_once(*arguments: Any) -> Any:
        if not refused:
            refused.append(arguments)
            raise StorageFull("the disk is full")
        return record_process(*arguments)

    monkeypatch.setattr(monitoring, "record_process", refuse_once)
    task = await session.start_monitor(watch.sh("m", "exit 0"))

    record = await task.wait(timeout=20)

    assert refused
    assert (record.state, record.failure) == (TaskState.COMPLETED, None)


# --- when its store closes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heeds", [True, False])
async def test_a_store_that_closes_ends_it_and_says_what_became_of_it(
    new: Callable[..., TaskStore], watch: Watch, path: Path, heeds: bool
) -> None:
    before = threads()
    async with new(cancel_grace=0.2) as store:
        session = await store.session("s1")
        task = await session.start_monitor(watch.sh("m", f"echo up; {STAY}") if heeds else watch.python("m", STUBBORN))
        await said(session, "up")
        pid = await begun(task)

    assert watch.running() == []
    assert await left_over(path, before) == []
    [row] = rows(path, "SELECT * FROM tasks")
    process = json.loads(row["evidence"])["process"]
    assert (row["state"], row["process"]) == ("abandoned", None)
    assert (process["pid"], process["became"]) == (pid, ProcessFate.ENDED)


@pytest.mark.parametrize("restart", [False, True])
async def test_one_that_does_not_heed_sigterm_is_killed_when_the_time_to_close_is_up(
    new: Callable[..., TaskStore], watch: Watch, path: Path, restart: bool
) -> None:
    before = threads()
    store = new(cancel_grace=30.0)
    await store.open()
    session = await store.session("s1")
    await session.start_monitor(watch.python("m", STUBBORN, restart_on_restore=restart))
    await said(session, "up")

    started = time.monotonic()
    await store.close(timeout=0.1)

    assert time.monotonic() - started < 5
    assert watch.running() == []
    assert await left_over(path, before) == []
    [row] = rows(path, "SELECT * FROM tasks")
    assert row["process"] is None
    assert row["state"] == ("pending" if restart else "abandoned")


async def test_a_stop_under_way_is_finished_when_the_store_closes(
    new: Callable[..., TaskStore], watch: Watch, path: Path
) -> None:
    async with new(cancel_grace=30.0) as store:
        session = await store.session("s1")
        await session.start_monitor(watch.python("m", STUBBORN))
        await said(session, "up")
        await session.stop_monitor("m", "enough", timeout=0)
        await store.close(timeout=0.1)

    assert watch.running() == []
    [row] = rows(path, "SELECT * FROM tasks")
    assert (row["state"], row["cancel_reason"]) == ("cancelled", "enough")


async def test_with_restart_on_restore_it_runs_again_in_the_next_store(
    new: Callable[..., TaskStore], watch: Watch, tmp_path: Path
) -> None:
    spec = watch.sh("m", f"echo up; until [ -e {tmp_path}/go ]; do sleep 0.05; done", restart_on_restore=True)
    async with new() as store:
        session = await store.session("s1")
        task = await session.start_monitor(spec)
        await said(session, "up")
        first = await begun(task)
    assert watch.running() == []

    (tmp_path / "go").touch()
    async with new() as store:
        session = await store.session("s1")
        again = await session.handle("monitor:m")
        assert again.task_seq == task.task_seq
        assert await again == {"exit_status": 0}
        record = await monitor(session, "m")
        assert (record.task.attempt, record.task.attempts_spent) == (2, 0)
        updates = await session.updates()
        # lines are numbered on
        assert [(one.line, one.text) for one in updates] == [(1, "up"), (2, "up")]
        assert (record.lines, record.exit_status) == (2, 0)
    assert first > 0


async def test_while_it_runs_again_no_exit_status_is_told(new: Callable[..., TaskStore], watch: Watch) -> None:
    spec = watch.sh("m", f"echo up $$; {STAY}", restart_on_restore=True)
    async with new() as store:
        session = await store.session("s1")
        await session.start_monitor(spec)
        await until_so(session.updates)
        assert (await monitor(session, "m")).exit_status is None

    async with new() as store:
        session = await store.session("s1")
        await begun(await session.handle("monitor:m"))
        record = await monitor(session, "m")
        assert (record.state, record.exit_status) == (TaskState.RUNNING, None)
        await session.stop_monitor("m")


async def test_without_it_the_next_store_starts_nothing(new: Callable[..., TaskStore], watch: Watch) -> None:
    async with new() as store:
        await begun(await (await store.session("s1")).start_monitor(watch.sh("m", STAY)))

    async with new() as store:
        session = await store.session("s1")
        assert states(await session.monitors()) == ["abandoned"]
        assert (await store.recover()).abandoned == ()
        assert watch.running() == []


async def test_a_store_on_a_loop_of_another_thread_supervises_like_any(
    new: Callable[..., TaskStore], watch: Watch, path: Path
) -> None:
    async def begin() -> None:
        async with new() as store:
            session = await store.session("s1")
            assert await (await session.start_monitor(watch.sh("one", "exit 0"))) == {"exit_status": 0}
            await session.start_monitor(watch.sh("two", f"echo up; {STAY}"))
            await said(session, "up")

    await asyncio.to_thread(lambda: asyncio.run(begin()))

    assert watch.running() == []
    assert [row["state"] for row in rows(path, "SELECT state FROM tasks")] == ["completed", "abandoned"]


# --- given up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heeds", [True, False])
async def test_abandoning_ends_the_process(quick: TaskStore, watch: Watch, path: Path, heeds: bool) -> None:
    session = await quick.session("s1")
    await session.start_monitor(watch.sh("m", f"echo up; {STAY}") if heeds else watch.python("m", STUBBORN))
    await said(session, "up")

    record = await session.abandon("monitor:m", "it hangs")

    assert record.state is TaskState.ABANDONED
    assert watch.running() == []
    assert zombies() == []


async def test_the_evidence_of_one_that_was_abandoned_names_its_process(session: SessionTasks, watch: Watch) -> None:
    task = await session.start_monitor(watch.sh("m", STAY))
    pid = await begun(task)

    record = await session.abandon("monitor:m", "it hangs")

    assert record.evidence is not None
    assert record.evidence.process is not None
    assert record.evidence.process.pid == pid


async def test_one_given_up_that_may_restart_runs_again_once_it_is_recovered(
    quick: TaskStore, watch: Watch, path: Path
) -> None:
    session = await quick.session("s1")
    task = await session.start_monitor(watch.sh("m", f"echo up $$; {STAY}", restart_on_restore=True))
    first = await begun(task)

    record = await session.abandon("monitor:m", "it hangs")
    assert (record.state, record.owner_id) == (TaskState.PENDING, None)
    assert first not in watch.running()
    await quick.recover()

    second = await begun(task)
    assert second != first
    await until(lambda: watch.running() == [second] or len(watch.running()) == 2)
    assert (await session.stop_monitor("m")).state is TaskState.CANCELLED
    assert watch.running() == []


async def test_recovering_while_one_given_up_still_goes_starts_no_second_beside_it(
    opened: Callable[..., Any], watch: Watch, path: Path
) -> None:
    store = await opened(cancel_grace=0.5)
    session = await store.session("s1")
    task = await session.start_monitor(watch.python("m", STUBBORN, restart_on_restore=True))
    await said(session, "up")
    first = await begun(task)
    recorded: list[bool] = []
    launch = supervising.monitoring.record_process

    def spy(*arguments: Any) -> Any:
        recorded.append(first in watch.running())
        return launch(*arguments)

    supervising.monitoring.record_process = spy  # type: ignore[assignment]
    try:
        await asyncio.gather(session.abandon(task, "it hangs"), store.recover(), store.recover())
        await store.recover()
        await until(lambda: recorded)
    finally:
        supervising.monitoring.record_process = launch
    assert not any(recorded)
    await session.stop_monitor("m")
    assert watch.running() == []


# --- stores ---------------------------------------------------------------------------------------------------------


async def test_two_stores_of_one_process_keep_their_monitors_apart(
    new: Callable[..., TaskStore], opened: Callable[..., Any], watch: Watch
) -> None:
    one = await opened()
    session = await one.session("s1")
    mine = await session.start_monitor(watch.sh("mine", STAY))
    async with new() as two:
        beside = await two.session("s1")
        theirs = await beside.start_monitor(watch.sh("theirs", STAY))
        await begun(theirs)
        pid = await begun(mine)
        assert [record.id for record in await beside.monitors()] == ["mine", "theirs"]

    assert states(await session.monitors()) == ["running", "abandoned"]
    assert pid in watch.running()
    async with new() as two:
        # whoever asks, who runs it ends it
        assert (await (await two.session("s1")).stop_monitor("mine")).state is TaskState.CANCELLED
    assert watch.running() == []


async def test_a_store_that_does_not_own_starts_none_and_a_reading_one_stops_none(
    session: SessionTasks, watch: Watch, path: Path
) -> None:
    await session.start_monitor(watch.sh("m", STAY))

    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        beside = await asking.session("s1")
        with pytest.raises(StoreError):
            await beside.start_monitor(watch.sh("n", STAY))
        assert states(await beside.monitors()) == ["running"]
    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reading:
        beside = await reading.session("s1")
        for refused in (beside.start_monitor(watch.sh("n", STAY)), beside.stop_monitor("m")):
            with pytest.raises(StoreReadOnly):
                await refused
        assert states(await beside.monitors()) == ["running"]


async def test_a_closed_store_starts_none(new: Callable[..., TaskStore], watch: Watch, path: Path) -> None:
    async with new() as store:
        session = await store.session("s1")

    with pytest.raises(StoreClosed):
        await session.start_monitor(watch.sh("m", STAY))
    assert rows(path, "SELECT * FROM tasks") == []


async def test_many_cycles_leave_nothing(opened: Callable[..., Any], watch: Watch, path: Path) -> None:
    store = await opened()
    session = await store.session("s1")
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(8):
        await asyncio.gather(*(session.start_monitor(watch.sh(f"m{n}", f"echo up; {STAY}")) for n in range(6)))
        reports = await session.cancel_all()
        assert {report.record.state for report in reports} == {TaskState.CANCELLED}
        assert (watch.running(), zombies()) == ([], [])

    assert launching._children == {}
    # the store may have opened a second connection to read by now
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


# --- when its session starts ----------------------------------------------------------------------------------------


def armed(watch: Watch, line: str = STAY, **options: Any) -> MonitorSpec:
    """Return a monitor that is started with its session."""
    return watch.sh("m", line, arm_on=ArmOn.SESSION_START, **options)


async def test_an_armed_one_is_started_when_a_new_store_takes_its_session_up(
    new: Callable[..., TaskStore], watch: Watch
) -> None:
    async with new() as store:
        session = await store.session("s1")
        first = await session.start_monitor(armed(watch))
        assert (await monitor(session, "m")).armed

    for _ in range(2):
        async with new() as store:
            assert watch.running() == []
            session = await store.session("s1")
            record = await monitor(session, "m")
            assert (record.state, record.armed) == (TaskState.RUNNING, True)
            assert record.task.task_seq > first.task_seq
            assert record.spec == armed(watch, cwd=str(Path.cwd()))


async def test_an_armed_one_is_started_once_a_store(store: TaskStore, watch: Watch) -> None:
    session = await store.session("s1")
    await (await session.start_monitor(armed(watch, "exit 0")))

    await store.session("s1")

    assert states(await session.monitors()) == ["completed"]
    assert len(await session.list(include_terminal=True)) == 1


async def test_an_armed_one_that_runs_is_not_started_again(
    opened: Callable[..., Any], store: TaskStore, watch: Watch
) -> None:
    session = await store.session("s1")
    task = await session.start_monitor(armed(watch))

    beside = await (await opened()).session("s1")

    assert [record.task.task_seq for record in await beside.monitors()] == [task.task_seq]
    assert states(await beside.monitors()) == ["running"]


async def test_an_armed_one_that_restarts_is_not_started_beside_itself(
    new: Callable[..., TaskStore], watch: Watch
) -> None:
    async with new() as store:
        task = await (await store.session("s1")).start_monitor(armed(watch, restart_on_restore=True))
        await begun(task)

    async with new() as store:
        session = await store.session("s1")
        [record] = await session.monitors()
        assert (record.task.task_seq, record.task.attempt) == (task.task_seq, 2)
        assert len(await session.list(include_terminal=True)) == 1


async def test_an_armed_one_is_started_when_its_session_is_opened_again(
    store: TaskStore, session: SessionTasks, watch: Watch
) -> None:
    await session.start_monitor(armed(watch))
    await session.close()
    assert states(await session.monitors()) == ["cancelled"]

    await store.session("s1")
    assert states(await session.monitors()) == ["cancelled"]
    await store.session("s1", reopen=True)

    assert states(await session.monitors()) == ["running"]


async def test_an_armed_one_is_not_started_in_a_session_that_is_closed(
    new: Callable[..., TaskStore], watch: Watch
) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.start_monitor(armed(watch))
        await session.close()

    async with new() as store:
        session = await store.session("s1")
        assert states(await session.monitors()) == ["cancelled"]


@pytest.mark.parametrize("running", [True, False])
async def test_one_that_was_stopped_is_not_started_with_its_session(
    new: Callable[..., TaskStore], watch: Watch, running: bool
) -> None:
    async with new() as store:
        session = await store.session("s1")
        task = await session.start_monitor(armed(watch, STAY if running else "exit 0"))
        if not running:
            await task
        assert (await session.stop_monitor("m")).state.is_terminal
        assert not (await monitor(session, "m")).armed

    async with new() as store:
        session = await store.session("s1")
        assert len(await session.list(include_terminal=True)) == 1
        await store.session("s1", reopen=True)
        assert len(await session.list(include_terminal=True)) == 1


async def test_a_manual_one_is_not_started_with_its_session(new: Callable[..., TaskStore], watch: Watch) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.start_monitor(armed(watch, "exit 0"))
        await session.stop_monitor("m")
        # of an id the newest counts
        await (await session.start_monitor(watch.sh("m", "exit 0")))
        assert not (await monitor(session, "m")).armed

    async with new() as store:
        assert states(await (await store.session("s1")).monitors()) == ["completed"]


@pytest.mark.parametrize("how", ["cancel", "cancel_all", "handle", "unreferenced", "handoff"])
async def test_an_armed_one_that_was_cancelled_stays_so(
    new: Callable[..., TaskStore], watch: Watch, path: Path, how: str
) -> None:
    async with new() as store:
        session = await store.session("s1")
        task = await session.start_monitor(armed(watch))
        match how:
            case "cancel":
                await session.cancel("monitor:m")
            case "cancel_all":
                await session.cancel_all()
            case "handle":
                await task.cancel()
            case "unreferenced":
                await session.cancel_unreferenced([])
            case _:
                await store.session("s2")
                await session.handoff("s2", [])
        assert (await task.wait(timeout=20)).state is TaskState.CANCELLED
        assert not (await monitor(session, "m")).armed

    async with new() as store:
        await store.session("s1")
        assert await store.list(TaskFilter(include_terminal=False)) == []
    check_file(path)


async def test_a_model_may_stop_a_monitor_by_what_it_carries(session: SessionTasks, watch: Watch) -> None:
    for name, by in (("a", "json"), ("b", "handle id"), ("c", "task id"), ("h-d", "id")):
        task = await session.start_monitor(watch.sh(name, STAY))
        named: Any = {"json": task.to_json(), "handle id": task.handle_id, "task id": task.id, "id": name}[by]
        assert (await session.stop_monitor(named)).id == task.id


async def test_one_that_runs_is_named_before_the_room_that_is_not_there(
    opened: Callable[..., Any], watch: Watch
) -> None:
    session = await (await opened(limits=Limits(monitors=1))).session("s1")
    await session.start_monitor(watch.sh("m", STAY))

    with pytest.raises(TaskExists, match=r"monitor 'm' runs .*stop_monitor\('m'\)"):
        await session.start_monitor(watch.sh("m", STAY))


async def test_an_armed_one_that_cannot_be_run_any_more_fails_and_its_session_opens(
    new: Callable[..., TaskStore], watch: Watch, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    async with new() as store:
        await (await (await store.session("s1")).start_monitor(armed(watch, "exit 0", cwd=str(folder))))
    folder.rmdir()

    async with new() as store:
        session = await store.session("s1")
        with pytest.raises(TaskFailed, match="does not exist"):
            await (await session.handle("monitor:m"))


async def test_an_armed_one_for_which_there_is_no_room_does_not_keep_its_session_from_opening(
    new: Callable[..., TaskStore], watch: Watch
) -> None:
    async with new() as store:
        session = await store.session("s1")
        for name in ("one", "two"):
            await session.start_monitor(watch.sh(name, STAY, arm_on=ArmOn.SESSION_START))

    async with new(limits=Limits(monitors=1)) as store:
        session = await store.session("s1")
        assert states(await session.monitors()) == ["abandoned", "running"] or states(await session.monitors()) == [
            "running",
            "abandoned",
        ]
        # the other one was told of
        texts = [note.text for note in await session.notes()]
        assert any(
            "was not started: session 'desktop:s1' runs 1 monitors, which is its limit" in text for text in texts
        )


async def test_an_armed_one_starts_with_the_session_it_was_handed_to(
    new: Callable[..., TaskStore], watch: Watch
) -> None:
    async with new() as store:
        session, there = await store.session("s1"), await store.session("s2")
        await session.start_monitor(armed(watch))
        await session.handoff(there, ["monitor:m"])

    async with new() as store:
        assert await (await store.session("s1")).monitors() == []
        assert watch.running() == []
        assert states(await (await store.session("s2")).monitors()) == ["running"]


@pytest.mark.parametrize("late", [False, True])
async def test_a_caller_cancelled_in_opening_a_session_leaves_its_armed_one_to_the_next_who_opens_it(
    new: Callable[..., TaskStore], watch: Watch, late: bool
) -> None:
    async with new() as store:
        await (await (await store.session("s1")).start_monitor(armed(watch, "exit 0")))
    at, started = 0, 1
    while True:
        at += 1
        async with new() as store:
            stepped = await cancel_at(store.session("s1"), at, late=late)

            session = await store.session("s1")
            await until_so(lambda session=session: session.list(include_terminal=True))
            found = await session.list(include_terminal=True)
            assert len(found) == started + 1, f"cancelled at suspension {at}"
            started = len(found)
            await (await session.handle("monitor:m")).wait(timeout=20)
        if not stepped.reached:
            break
    assert at > 2


# --- how many -------------------------------------------------------------------------------------------------------


async def test_a_session_runs_so_many_and_no_more(opened: Callable[..., Any], watch: Watch, path: Path) -> None:
    store = await opened(limits=Limits(monitors=2))
    session, there = await store.session("s1"), await store.session("s2")
    for name in ("one", "two"):
        await session.start_monitor(watch.sh(name, STAY))

    with pytest.raises(LimitExceeded, match="2 monitors"):
        await session.start_monitor(watch.sh("three", STAY))

    assert len(rows(path, "SELECT * FROM tasks")) == 2
    # other work, other sessions, and one in the place of another
    await (await session.spawn(asyncio.sleep(0), kind=TaskKind.MONITOR))
    await there.start_monitor(watch.sh("three", STAY))
    await session.stop_monitor("one")
    await session.start_monitor(watch.sh("three", STAY))


@pytest.mark.parametrize("how", ["transfer", "handoff", "close"])
async def test_what_comes_from_elsewhere_counts_too(opened: Callable[..., Any], watch: Watch, how: str) -> None:
    store = await opened(limits=Limits(monitors=2))
    session, there = await store.session("s1"), await store.session("s2")
    for name in ("one", "two"):
        await session.start_monitor(watch.sh(name, STAY))
    await there.start_monitor(watch.sh("three", STAY))
    await session.register("external", TaskKind.OTHER)
    if how == "close":
        await session.transfer(there, ["monitor:one"])
        with pytest.raises(LimitExceeded):
            await session.transfer(there, ["monitor:two"])
        return

    with pytest.raises(LimitExceeded):
        await getattr(session, how)(there, ["monitor:one", "monitor:two", "external"])

    assert [record.id for record in await there.monitors()] == ["three"]
    assert states(await session.monitors()) == ["running", "running"]
    await getattr(session, how)(there, ["monitor:one", "external"])
    assert [record.id for record in await there.monitors()] == ["one", "three"]


async def test_of_an_id_one_runs_and_an_ended_one_has_a_successor(session: SessionTasks, watch: Watch) -> None:
    first = await session.start_monitor(watch.sh("m", STAY))
    with pytest.raises(TaskExists):
        await session.start_monitor(watch.sh("m", STAY))
    await session.stop_monitor("m")

    second = await session.start_monitor(watch.sh("m", "exit 0"))

    assert second.task_seq > first.task_seq
    await second
    assert [record.task.task_seq for record in await session.monitors()] == [second.task_seq]
    assert (await first.record()).state is TaskState.CANCELLED


async def test_of_two_that_start_an_id_at_once_one_does(session: SessionTasks, watch: Watch) -> None:
    got = await asyncio.gather(*(session.start_monitor(watch.sh("m", STAY)) for _ in range(3)), return_exceptions=True)

    assert sorted(type(one).__name__ for one in got) == ["TaskExists", "TaskExists", "TaskHandle"]
    await begun(await session.handle("monitor:m"))
    # one that becomes its program has no environment for a moment
    await until(lambda: len([pid for pid in watch.running() if os.getsid(pid) == pid]) == 1)


@pytest.mark.parametrize("running", [False, True])
async def test_a_closed_session_starts_none(session: SessionTasks, watch: Watch, running: bool) -> None:
    if running:
        await session.start_monitor(watch.sh("m", STAY))
    await session.close()

    with pytest.raises(SessionClosed):
        await session.start_monitor(watch.sh("m", STAY))
    assert watch.running() == []


async def test_stopping_what_is_no_monitor_is_refused(session: SessionTasks, watch: Watch) -> None:
    external = await session.register("monitor:external", TaskKind.MONITOR)
    await session.register("job", TaskKind.MONITOR)

    for unknown in ("nothing", "monitor:nothing", "job", "external", external):
        with pytest.raises(TaskNotFound):
            await session.stop_monitor(unknown)
    for wrong in ("", "a\0b", 5, None):
        with pytest.raises((InvalidId, TypeError)):
            await session.stop_monitor(wrong)  # type: ignore[arg-type]
    assert (await external.record()).state is TaskState.RUNNING


async def test_it_is_stopped_by_its_id_its_tasks_id_and_its_handle(session: SessionTasks, watch: Watch) -> None:
    for name in ("m", "monitor:m", None):
        task = await session.start_monitor(watch.sh("m", STAY))
        record = await session.stop_monitor(task if name is None else name)
        assert (record.state, record.task_seq) == (TaskState.CANCELLED, task.task_seq)


async def test_stopping_one_that_has_ended_changes_nothing(session: SessionTasks, watch: Watch, path: Path) -> None:
    task = await session.start_monitor(watch.sh("m", "exit 0"))
    await task
    before = event_types(path, task.task_seq)

    assert await session.stop_monitor("m") == await task.record()
    assert event_types(path, task.task_seq) == before


async def test_a_handle_of_another_sessions_monitor_does_not_stop_ones_own(
    session: SessionTasks, there: SessionTasks, watch: Watch
) -> None:
    await session.start_monitor(watch.sh("m", STAY))
    mine = await there.start_monitor(watch.sh("m", STAY))
    theirs = await there.observe(session, "monitor:m")

    with pytest.raises((TaskNotFound, HandleNotVisible)):
        await there.stop_monitor(theirs, timeout=0)
    assert (await mine.record()).state is TaskState.RUNNING


async def test_a_handle_of_an_ended_incarnation_does_not_stop_its_successor(
    session: SessionTasks, watch: Watch
) -> None:
    first = await session.start_monitor(watch.sh("m", "exit 0"))
    await first
    second = await session.start_monitor(watch.sh("m", STAY))

    assert (await session.stop_monitor(first, timeout=0)).task_seq == first.task_seq
    assert (await second.record()).state is TaskState.RUNNING


async def test_they_take_no_slot(opened: Callable[..., Any], watch: Watch, started: asyncio.Event) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    busy = await session.spawn(hold(started, asyncio.Event()))
    await started.wait()
    monitors = [await session.start_monitor(watch.sh(f"m{n}", f"echo up; {STAY}")) for n in range(3)]
    for one in monitors:
        await begun(one)
    await busy.cancel()

    async with asyncio.timeout(10):
        assert await (await session.spawn(asyncio.sleep(0, "ran"))) == "ran"
    for one in monitors:
        await one.cancel()
    # nor does their end give one back
    started.clear()
    await session.spawn(hold(started, asyncio.Event()))
    await started.wait()
    assert (await (await session.spawn(asyncio.sleep(0))).record()).state is TaskState.PENDING


async def test_those_that_restart_take_no_slot(new: Callable[..., TaskStore], watch: Watch) -> None:
    async with new(max_running=1) as store:
        session = await store.session("s1")
        for n in range(3):
            await session.start_monitor(watch.sh(f"m{n}", STAY, restart_on_restore=True))

    async with new(max_running=1) as store:
        session = await store.session("s1")
        for n in range(3):
            await begun(await session.handle(f"monitor:m{n}"))
        async with asyncio.timeout(10):
            assert await (await session.spawn(asyncio.sleep(0, "ran"))) == "ran"


# --- under whom -----------------------------------------------------------------------------------------------------


async def test_under_an_agent_that_was_cancelled_it_is_born_cancelled_and_no_process_runs(
    store: TaskStore, session: SessionTasks, there: SessionTasks, watch: Watch, path: Path, tmp_path: Path
) -> None:
    agent = await there.spawn(
        asyncio.Event().wait(), id="agent", kind=TaskKind.SUBAGENT, child_session_id=session.scope.session_id
    )
    await agent.cancel("enough")

    task = await session.start_monitor(watch.sh("m", f"touch {tmp_path}/ran"))

    record = await task.wait(timeout=20)
    assert (record.state, record.cancel_reason, record.attempt) == (TaskState.CANCELLED, "enough", 0)
    assert states(await session.monitors()) == ["cancelled"]
    assert (await session.notes(), (tmp_path / "ran").exists()) == ([], False)


async def test_a_body_may_start_one_and_its_end_leaves_it(
    store: TaskStore, session: SessionTasks, watch: Watch
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        return (await session.start_monitor(watch.sh("m", STAY))).id

    assert await (await session.spawn(work)) == "monitor:m"
    await begun(await session.handle("monitor:m"))


# --- handing over ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["transfer", "handoff"])
async def test_a_process_that_is_handed_over_runs_on_and_is_the_successors(
    session: SessionTasks, there: SessionTasks, watch: Watch, tmp_path: Path, how: str
) -> None:
    line = f"echo one; until [ -e {tmp_path}/go ]; do sleep 0.02; done; echo two; {STAY}"
    task = await session.start_monitor(watch.sh("m", line))
    await said(session, "one")
    pid = await begun(task)

    await getattr(session, how)(there, ["monitor:m"])

    assert (await session.monitors(), await session.updates(unread=False), await session.notes()) == ([], [], [])
    [note] = await there.notes()
    assert note.scope == there.scope
    (tmp_path / "go").touch()
    await said(there, "two")
    assert await taken(there) == ["one", "two"]
    assert await session.updates(unread=False) == []
    moved = await monitor(there, "m")
    assert (moved.scope, moved.lines, moved.task.task_seq) == (there.scope, 2, task.task_seq)
    assert moved.task.process is not None
    assert moved.task.process.pid == pid
    with pytest.raises(TaskNotFound):
        await session.stop_monitor("m")
    assert pid in watch.running()
    assert (await there.stop_monitor("m")).state is TaskState.CANCELLED
    assert watch.running() == []


async def test_one_handed_over_ends_with_its_new_session_and_not_with_its_old(
    session: SessionTasks, there: SessionTasks, watch: Watch
) -> None:
    task = await session.start_monitor(watch.sh("m", STAY))
    await begun(task)
    await session.transfer(there, [task])

    await session.close()
    assert (await task.record()).state is TaskState.RUNNING
    await there.close()

    assert (await task.record()).state is TaskState.CANCELLED
    assert watch.running() == []


async def test_after_one_was_handed_over_its_id_is_free(
    session: SessionTasks, there: SessionTasks, watch: Watch
) -> None:
    await session.start_monitor(watch.sh("m", f"echo old; {STAY}"))
    await said(session, "old")
    await session.transfer(there, ["monitor:m"])

    await session.start_monitor(watch.sh("m", f"echo new; {STAY}"))
    await said(session, "new")

    assert (await taken(session), await taken(there)) == (["new"], ["old"])
    await there.stop_monitor("m")
    assert states(await session.monitors()) == ["running"]


async def test_one_handed_to_where_one_of_its_id_has_ended_is_the_newest_there(
    session: SessionTasks, there: SessionTasks, watch: Watch
) -> None:
    task = await session.start_monitor(watch.sh("m", STAY))
    later = await there.start_monitor(watch.sh("m", "exit 0"))
    await later

    await session.transfer(there, [task])

    assert [record.task.task_seq for record in await there.monitors()] == [task.task_seq]
    assert (await there.stop_monitor("m")).task_seq == task.task_seq


# --- beside other work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lash_store:monitor", "lash_store:x", "lash_store:"])
def test_no_function_of_a_program_is_named_like_the_packages_own(new: Callable[..., TaskStore], name: str) -> None:
    async def work(task: TaskContext) -> None: ...

    with pytest.raises((FunctionError, DuplicateFunction)):
        new().task(recovery=Recovery.RERUN, name=name)(work)


async def test_a_task_of_kind_monitor_is_like_any_other(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    task = await session.spawn(hold(started, release), kind=TaskKind.MONITOR, id="monitor:mine")
    await started.wait()
    waiting = await session.spawn(asyncio.sleep(0, "ran"), kind=TaskKind.MONITOR)
    assert (await waiting.record()).state is TaskState.PENDING
    assert await session.monitors() == []

    with pytest.raises(TaskExists):
        await session.start_monitor(MonitorSpec(id="mine", command=["true"]))
    release.set()

    await task
    assert await waiting == "ran"
    assert await session.notes() == []


async def test_a_program_that_does_not_know_of_it_lists_it_like_any_task(
    store: TaskStore, session: SessionTasks, watch: Watch
) -> None:
    task = await session.start_monitor(watch.sh("m", STAY, label="the build"))

    [record] = await session.list(kinds=[TaskKind.MONITOR])
    assert (record.id, record.label, record.cancel_policy) == (task.id, "the build", CancelPolicy.ABORT_LOCAL)
    assert [one.id for one in await store.list()] == ["monitor:m"]


async def test_waiting_for_one_gives_its_slot_back(opened: Callable[..., Any], watch: Watch, tmp_path: Path) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    task = await session.start_monitor(watch.sh("m", f"until [ -e {tmp_path}/go ]; do sleep 0.02; done"))

    async def wait_for(one: TaskHandle) -> Any:
        return await one

    async def let_go() -> None:
        (tmp_path / "go").touch()

    waiting = await session.spawn(wait_for(task))
    await session.spawn(let_go())
    assert await waiting == {"exit_status": 0}


@pytest.mark.parametrize("whose", ["another's", "our own group", "unreadable"])
async def test_nothing_is_signalled_that_is_not_provably_the_process_that_was_recorded(
    new: Callable[..., TaskStore], watch: Watch, path: Path, whose: str
) -> None:
    """The number may be somebody else's by now; a hand may have written anything."""
    async with new() as store:
        await begun(await (await store.session("s1")).start_monitor(watch.sh("m", STAY, restart_on_restore=True)))
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as bystander:
        pid, group, started = bystander.pid, bystander.pid, "1"
        if whose == "our own group":
            pid, group, started = os.getpid(), os.getpgrp(), processes.started(os.getpid()) or ""
        identity = processes.identify(pid, "token").model_copy(update={"group": group, "started": started})
        hand = sqlite3.connect(path)
        with hand:
            hand.execute(
                "UPDATE tasks SET process = ?", ["{}" if whose == "unreadable" else identity.model_dump_json()]
            )
        hand.close()

        async with new() as store:
            session = await store.session("s1")
            task = await session.handle("monitor:m")

            async def runs_again() -> bool:
                record = await task.record()
                return record.process is not None and record.process.token not in {"token", ""}

            await until_so(runs_again)
            await session.stop_monitor("m")
        assert bystander.poll() is None
        bystander.kill()


# --- where something is wanting, or a hand was at the file ------------------------------------------------------------


@pytest.mark.parametrize("what", ["boot_id", "stat"])
async def test_a_stop_that_cannot_look_for_want_of_a_descriptor_is_not_confirmed_while_it_cannot(
    quick: TaskStore, watch: Watch, what: str
) -> None:
    session = await quick.session("s1")
    task = await session.start_monitor(watch.sh("m", f"echo up; {STAY}"))
    await said(session, "up")
    real_open, real_read = os.open, Path.read_text

    def refuse_stat(path: Any, *arguments: Any, **options: Any) -> int:
        if what == "stat" and isinstance(path, str) and Path(path).match("/proc/*/stat"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real_open(path, *arguments, **options)

    def refuse_boot_id(self: Path, *arguments: Any, **options: Any) -> str:
        if what == "boot_id" and self.name == "boot_id":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real_read(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "open", refuse_stat)
        monkeypatch.setattr(Path, "read_text", refuse_boot_id)
        processes.boot_id.cache_clear()

        record = await session.stop_monitor("m", timeout=0.3)
    assert record.state is TaskState.CANCEL_REQUESTED

    assert (await task.wait(timeout=20)).state is TaskState.CANCELLED
    assert watch.running() == []


def by_hand(path: Path, statement: str, *values: Any) -> None:
    """Change the file as somebody with a shell may, and who knows how also what is final."""
    guard = "tasks_terminal_is_final"
    with contextlib.closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        [made] = shell.execute("SELECT sql FROM sqlite_schema WHERE name = ?", [guard]).fetchone()
        shell.execute(f"DROP TRIGGER {guard}")
        shell.execute(statement, values)
        shell.execute(made)
        shell.execute("COMMIT")


@pytest.mark.parametrize("data", ["[]", '{"lines": null}', '"three"', '{"lines": "3"}'])
async def test_a_note_that_a_hand_has_changed_does_not_keep_a_monitor_from_ending(
    session: SessionTasks, watch: Watch, path: Path, tmp_path: Path, data: str
) -> None:
    task = await session.start_monitor(watch.sh("m", f"echo a; until [ -e {tmp_path}/go ]; do sleep 0.02; done"))
    await said(session, "a")
    by_hand(path, "UPDATE inbox SET data = ?", data)

    (tmp_path / "go").touch()

    assert (await task.wait(timeout=10)).state is TaskState.COMPLETED
    assert [note.text for note in await session.notes()] == ["monitor 'm' completed"]


@pytest.mark.parametrize(
    ("change", "starts"),
    [
        ("json_set(arguments, '$.spec.new_field', 1)", True),
        ("json_set(arguments, '$.spec.keep_lines', 'many')", False),
        ("json_remove(arguments, '$.spec')", False),
        ("'[]'", False),
    ],
    ids=["an unknown word", "a wrong value", "no spec", "no object"],
)
async def test_a_spec_that_cannot_be_read_keeps_neither_its_session_nor_the_others_from_opening(
    new: Callable[..., TaskStore], watch: Watch, path: Path, change: str, starts: bool
) -> None:
    async with new() as store:
        session = await store.session("s1")
        for id in ("m", "other"):
            spec = watch.sh(id, "exit 0", arm_on=ArmOn.SESSION_START)
            await (await session.start_monitor(spec)).wait(timeout=10)
    [before] = rows(path, "SELECT arguments FROM tasks WHERE id = 'monitor:m'")
    by_hand(path, f"UPDATE tasks SET arguments = {change} WHERE id = 'monitor:m'")

    async with new() as store:
        session = await store.session("s1")
        started = {task.id for task in await store.list() if task.task_seq > 2}
        notes = [note.text for note in await session.notes() if "was not started" in note.text]
        for id in started:
            await (await session.handle(id)).wait(timeout=10)
        assert {record.id for record in await session.monitors()} == {"m", "other"}
    by_hand(path, "UPDATE tasks SET arguments = ? WHERE task_seq = 1", before["arguments"])
    assert started == ({"monitor:m", "monitor:other"} if starts else {"monitor:other"})
    assert len(notes) == (not starts)


async def test_an_armed_one_that_is_stopped_while_its_session_is_being_begun_is_not_started(
    new: Callable[..., TaskStore], watch: Watch, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with new() as store:
        await (await (await store.session("s1")).start_monitor(armed(watch, "exit 0"))).wait(timeout=10)
    async with new() as store, TaskStore.connect(path, runtime=RUNTIME) as other:
        elsewhere, start = await other.session("s1"), monitors.start

        async def stop_and_start(*arguments: Any, **options: Any) -> TaskHandle:
            await elsewhere.stop_monitor("m")
            return await start(*arguments, **options)

        monkeypatch.setattr(monitors, "start", stop_and_start)

        session = await store.session("s1")

        record = await monitor(session, "m")
        assert (record.state, record.task.task_seq, record.armed) == (TaskState.COMPLETED, 1, False)
        assert len(rows(path, "SELECT 1 FROM tasks")) == 1


async def test_one_that_restarts_is_watched_again_after_its_file_went_down_and_up(
    new: Callable[..., TaskStore], watch: Watch, path: Path
) -> None:
    async with new() as store:
        session = await store.session("s1")
        await session.start_monitor(watch.sh("m", f"echo up $$; {STAY}", restart_on_restore=True))
        await until_so(lambda: session.updates(unread=False))
    migrate.downgrade(path, "0003")
    migrate.upgrade(path)

    async with new() as store:
        session = await store.session("s1")
        [update] = await until_so(lambda: session.updates(unread=False))
        record = await monitor(session, "m")

        assert (record.state, record.task.attempt, record.lines) == (TaskState.RUNNING, 2, 1)
        assert record.task.process is not None
        assert update.text == f"up {record.task.process.pid}"


# --- one that writes too much ----------------------------------------------------------------------------------------


async def test_while_nothing_of_a_throttled_one_may_be_stored_nothing_is_written_to_the_file(
    opened: Callable[..., Any], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(limits=Limits(lines_per_second=0.1))
    session = await store.session("s1")
    looks, stores, take, store_lines = 0, 0, Output.take, monitoring.store_lines

    def count_looks(self: Output, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return take(self, **options)

    def count_stores(*arguments: Any) -> Any:
        nonlocal stores
        stores += 1
        return store_lines(*arguments)

    monkeypatch.setattr(Output, "take", count_looks)
    monkeypatch.setattr(monitoring, "store_lines", count_stores)
    await session.start_monitor(watch.sh("m", f"echo a; echo b; echo c; {STAY}"))

    async def all_is_counted() -> bool:
        record = await monitor(session, "m")
        return record.lines == 3 and record.throttled_at is not None

    await until_so(all_is_counted)
    before, seen = stores, looks
    await until(lambda: looks >= seen + 6)

    assert stores == before
    assert [update.text for update in await session.updates()] == ["a"]


async def test_a_burst_that_is_over_is_told_of_no_more_within_seconds(opened: Callable[..., Any], watch: Watch) -> None:
    store = await opened(limits=Limits(lines_per_second=10_000.0))
    session = await store.session("s1")
    task = await session.start_monitor(watch.sh("m", f"seq 1000; {STAY}", keep_lines=10))

    async def throttled() -> bool:
        record = await monitor(session, "m")
        return record.throttled_at is not None and (record.task.progress or "").startswith("throttled")

    async def calm() -> bool:
        return (await monitor(session, "m")).throttled_at is None

    await until_so(throttled)
    async with asyncio.timeout(8):
        await until_so(calm)

    assert (await task.record()).progress is None
    assert (await monitor(session, "m")).lines == 1000


# --- when its loop goes away without a word ---------------------------------------------------------------------------


def test_what_a_loop_that_was_closed_leaves_open_is_closed_once_a_store_of_this_process_opens(
    new: Callable[..., TaskStore], watch: Watch, tmp_path: Path
) -> None:
    before = pipes()
    loop, store, cores = asyncio.new_event_loop(), new(), []

    async def leave() -> None:
        await store.open()
        cores.append(store._core)
        session = await store.session("s1")
        await session.start_monitor(watch.sh("m", f"echo up; {STAY}"))
        await said(session, "up")

    loop.run_until_complete(leave())
    loop.close()
    assert pipes() - before

    async def come_back() -> None:
        # on another file, so that it recovers nothing
        async with TaskStore(tmp_path / "another.db", runtime=RUNTIME):
            left = {one for one in pipes() - before if "pipe:" in one}
            assert left == set()
        async with new(cancel_grace=0.2):
            assert watch.running() == []

    with warnings.catch_warnings():
        # a loop that was closed in the midst of everything is complained of
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(come_back())
        sweep_up(*cores)
        cores.clear()
        store._forget_dead_loop()
        gc.collect()


def test_the_body_of_one_whose_loop_has_gone_kills_it_and_says_nothing(
    new: Callable[..., TaskStore], watch: Watch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    loop, store, cores = asyncio.new_event_loop(), new(), []

    async def leave() -> tuple[int, Any]:
        await store.open()
        cores.append(store._core)
        session = await store.session("s1")
        task = await session.start_monitor(watch.sh("m", f"echo up; {STAY}"))
        await said(session, "up")
        body = session._core.runner._bodies[task.task_seq]  # type: ignore[union-attr]
        assert body.coroutine is not None
        return await begun(task), body.coroutine.get_coro()

    pid, body = loop.run_until_complete(leave())
    loop.close()

    body.close()

    deadline = time.monotonic() + 10
    while pid not in zombies() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert pid in zombies()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    launching.sweep()
    sweep_up(*cores)
    store._forget_dead_loop()
