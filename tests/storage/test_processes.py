"""Rules of which process is which and how a group ends, and of how a program is started; with real processes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

from lash_store import processes, programs
from lash_store.errors import InvalidArguments, StoreError
from lash_store.launching import Exit, Launched, launch, reap
from lash_store.models import ProcessFate, ProcessIdentity
from lash_store.processes import TOKEN, end_group, identify, survivors
from lash_store.programs import Program, resolve
from tests.storage.conftest import Spawn

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs a Linux /proc")

PYTHON = (sys.executable, "-I", "-S", "-c")
GRACE = 0.15
"""Seconds that are let pass where SIGTERM is ignored; where it is obeyed, nobody waits for them."""

LONG = 30.0


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)
    return found


def lives(pid: int) -> bool:
    return processes.started(pid) is not None


def of_session(number: int) -> set[int]:
    """What lives of a session or a group, by the kernel's files and nothing of ours."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            if number in {int(fields[2]), int(fields[3])} and fields[0] not in {b"Z", b"X"}:
                found.add(int(entry.name))
    return found


class Tree:
    """A process that leads a session, with what it started; it writes a line once it is ready."""

    def __init__(self, *command: str, ready: int = 1) -> None:
        self.popen: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={"PATH": os.environ["PATH"], TOKEN: "mine"},
        )
        self.identity = identify(self.popen.pid, "mine")
        self.said = [self.line() for _ in range(ready)]

    @property
    def output(self) -> IO[bytes]:
        assert self.popen.stdout is not None
        return self.popen.stdout

    def line(self) -> str:
        ready, _, _ = select.select([self.output], [], [], 10.0)
        assert ready, "it says nothing"
        return self.output.readline().decode().strip()

    @property
    def members(self) -> set[int]:
        return of_session(self.popen.pid)

    def kill_leader(self, *, reaped: bool) -> None:
        os.kill(self.popen.pid, signal.SIGKILL)
        if reaped:
            self.popen.wait()
        else:
            until(lambda: not lives(self.popen.pid))

    def clear(self) -> None:
        until(lambda: not self._kill())
        self.popen.wait()
        self.output.close()

    def _kill(self) -> set[int]:
        members = self.members
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return members


Grow = Callable[..., Tree]


@pytest.fixture
def grow() -> Iterator[Grow]:
    """Start trees of processes, of which nothing is left at the end of the test."""
    grown: list[Tree] = []

    def run(*command: str, ready: int = 1) -> Tree:
        tree = Tree(*command, ready=ready)
        grown.append(tree)
        return tree

    yield run
    for tree in grown:
        tree.clear()


def sh(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


OBEDIENT = sh("echo ready; exec sleep 100")
STUBBORN = sh("trap '' TERM; echo ready; exec sleep 100")
TELLS = (*PYTHON, """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"term\\n"))
os.write(1, b"ready\\n")
while True:
    signal.pause()
""")  # fmt: skip

# --- which process is which -----------------------------------------------------------------------------------------


def test_a_process_is_named_by_what_no_other_has(grow: Grow) -> None:
    tree = grow(*OBEDIENT)
    pid = tree.popen.pid

    assert (tree.identity.pid, tree.identity.group, tree.identity.token) == (pid, pid, "mine")
    assert tree.identity.started == Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    assert all((tree.identity.boot_id, tree.identity.host, tree.identity.namespace))
    assert ProcessIdentity.model_validate_json(tree.identity.model_dump_json()) == tree.identity


def test_a_process_keeps_its_name_when_it_becomes_another_program(grow: Grow) -> None:
    tree = grow(*sh("echo ready; read x </dev/null; exec sleep 100"))
    until(lambda: b"sleep" in Path(f"/proc/{tree.popen.pid}/cmdline").read_bytes())

    assert identify(tree.popen.pid, "mine") == tree.identity
    assert survivors(tree.identity) == [tree.popen.pid]


def test_a_start_time_is_told_of_what_lives_and_of_nothing_else(grow: Grow) -> None:
    tree = grow(*OBEDIENT)
    alive = processes.started(tree.popen.pid)
    tree.kill_leader(reaped=False)
    zombie = processes.started(tree.popen.pid)
    tree.popen.wait()

    assert alive == tree.identity.started
    assert (zombie, processes.started(tree.popen.pid), processes.started(2**22 + 1)) == (None, None, None)


@pytest.mark.parametrize("name", [b") Z 1 1 (", b"(a b) (c", b"a\nb) R", b"\xff\xfe)", b"))))", b"   "], ids=repr)
def test_a_programs_name_may_have_brackets_and_spaces_of_its_own(grow: Grow, name: bytes) -> None:
    script = f"open('/proc/self/comm', 'wb').write({name!r}); print('ready', flush=True); signal.pause()"
    tree = grow(*PYTHON, f"import signal; {script}")

    assert Path(f"/proc/{tree.popen.pid}/comm").read_bytes() == name + b"\n"
    assert identify(tree.popen.pid, "mine") == tree.identity
    assert survivors(tree.identity) == [tree.popen.pid]
    assert end_group(tree.identity, LONG) is ProcessFate.ENDED
    assert tree.popen.wait() == -signal.SIGTERM


# --- what is left of it ---------------------------------------------------------------------------------------------

FORKS = sh("sleep 100 & sleep 100 & echo $!; wait")
DOUBLE_FORK = sh("(sleep 100 & echo $!); echo done; exec sleep 100")
LEAVES_GROUP = (*PYTHON, """
import os, signal, sys
if os.fork() == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "ignores" else signal.SIG_DFL)
    print(os.getpid(), flush=True)
while True:
    signal.pause()
""")  # fmt: skip


def test_what_lives_of_a_group_is_its_leader_and_all_it_started(grow: Grow) -> None:
    tree = grow(*FORKS)

    assert set(survivors(tree.identity) or ()) == tree.members
    assert (len(tree.members), tree.popen.pid in tree.members) == (3, True)


def test_a_member_that_init_has_adopted_is_one_still(grow: Grow) -> None:
    tree = grow(*DOUBLE_FORK, ready=2)

    assert int(tree.said[0]) in (survivors(tree.identity) or ())


def test_who_left_the_group_is_one_as_long_as_it_is_in_the_session(grow: Grow) -> None:
    tree = grow(*LEAVES_GROUP, "obeys")

    assert survivors(tree.identity) is not None
    assert set(survivors(tree.identity) or ()) == {tree.popen.pid, int(tree.said[0])}


def test_nothing_is_left_of_a_process_that_is_gone(grow: Grow) -> None:
    tree = grow(*OBEDIENT)
    tree.kill_leader(reaped=True)

    assert survivors(tree.identity) == []
    assert end_group(tree.identity, LONG) is ProcessFate.GONE


def test_a_zombie_is_gone(grow: Grow) -> None:
    tree = grow(*OBEDIENT)
    tree.kill_leader(reaped=False)

    assert survivors(tree.identity) == []
    assert end_group(tree.identity, LONG) is ProcessFate.GONE


def test_a_zombie_that_leads_proves_what_it_left(grow: Grow) -> None:
    tree = grow(*FORKS)
    left = tree.members - {tree.popen.pid}
    tree.kill_leader(reaped=False)
    unproven_by_token = tree.identity.model_copy(update={"token": "another"})

    assert set(survivors(unproven_by_token) or ()) == left
    assert end_group(unproven_by_token, LONG) is ProcessFate.ENDED
    assert tree.members == set()


def test_once_the_leader_was_reaped_a_member_proves_the_group_by_its_environment(grow: Grow) -> None:
    tree = grow(*FORKS)
    left = tree.members - {tree.popen.pid}
    tree.kill_leader(reaped=True)

    assert set(survivors(tree.identity) or ()) == left
    assert end_group(tree.identity, LONG) is ProcessFate.ENDED
    assert tree.members == set()


def test_one_member_proves_the_others(grow: Grow) -> None:
    tree = grow(*sh("sleep 100 & env -i sleep 100 & echo $!; wait"))
    until(lambda: Path(f"/proc/{tree.said[0]}/environ").read_bytes() == b"" or None)
    tree.kill_leader(reaped=True)

    assert len(survivors(tree.identity) or ()) == 2


@pytest.mark.parametrize("token", ["another", "min", "mine2", ""])
def test_a_group_that_nothing_proves_is_let_be(grow: Grow, token: str) -> None:
    tree = grow(*FORKS)
    left = tree.members - {tree.popen.pid}
    tree.kill_leader(reaped=True)
    unproven = tree.identity.model_copy(update={"token": token})

    assert survivors(unproven) is None
    assert end_group(unproven, 0.0) is ProcessFate.UNPROVEN
    assert tree.members == left


def test_members_that_are_zombies_all_leave_nothing_to_prove(grow: Grow) -> None:
    tree = grow(*OBEDIENT)
    tree.kill_leader(reaped=True)

    assert survivors(tree.identity.model_copy(update={"token": "another"})) == []


# --- what is another's ----------------------------------------------------------------------------------------------

ANOTHERS: dict[str, dict[str, str]] = {
    "another start time": {"started": "1"},
    "no start time": {"started": ""},
    "another boot": {"boot_id": "00000000-0000-0000-0000-000000000000"},
    "no boot": {"boot_id": ""},
}


@pytest.mark.parametrize("recorded", ANOTHERS.values(), ids=ANOTHERS.keys())
def test_a_process_that_has_the_number_but_is_not_the_same_is_not_touched(
    grow: Grow, monkeypatch: pytest.MonkeyPatch, recorded: dict[str, str]
) -> None:
    tree = grow(*FORKS)
    before, signalled = tree.members, signals(monkeypatch)
    another = tree.identity.model_copy(update=recorded)

    assert survivors(another) == []
    assert end_group(another, GRACE) is ProcessFate.GONE
    assert end_group(another, 0.0) is ProcessFate.GONE
    assert (signalled, tree.members) == ([], before)


def test_a_process_whose_pid_counts_elsewhere_is_not_proven_and_not_touched(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow(*FORKS)
    before, signalled = tree.members, signals(monkeypatch)
    elsewhere = tree.identity.model_copy(update={"namespace": "pid:[1]"})

    assert survivors(elsewhere) is None
    assert end_group(elsewhere, 0.0) is ProcessFate.UNPROVEN
    assert (signalled, tree.members) == ([], before)


def test_a_machine_that_was_renamed_is_the_same(grow: Grow) -> None:
    tree = grow(*FORKS)
    assert end_group(tree.identity.model_copy(update={"host": "renamed"}), GRACE) is ProcessFate.ENDED
    assert tree.members == set()


def test_a_number_that_a_process_in_another_group_has_by_now_is_not_touched(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow(*FORKS)
    innocent, signalled = int(tree.said[0]), signals(monkeypatch)
    recorded = tree.identity.model_copy(update={"pid": innocent, "group": innocent, "started": "1"})

    assert survivors(recorded) == []
    assert end_group(recorded, GRACE) is ProcessFate.GONE
    assert (signalled, lives(innocent)) == ([], True)


@pytest.mark.parametrize("which", ["0", "1", "-1", "our group", "our session"])
def test_a_record_that_names_us_or_everybody_ends_nothing(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    signalled = signals(monkeypatch)
    number = {
        "0": 0,
        "1": 1,
        "-1": -1,
        "our group": os.getpgrp(),
        "our session": os.getsid(0),
    }[which]
    recorded = identify(os.getpid(), "mine").model_copy(update={"pid": number, "group": number})

    # whether the leader of our own group still lives depends on who runs this
    assert end_group(recorded, 0.0) is not ProcessFate.ENDED
    assert signalled == []


def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note every signal instead of sending it."""
    noted: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, what: noted.append((pid, what)))
    monkeypatch.setattr(os, "killpg", lambda group, what: noted.append((group, what)))
    return noted


# --- how it ends ----------------------------------------------------------------------------------------------------


def timed(end: Callable[[], ProcessFate]) -> tuple[ProcessFate, float]:
    begun = time.monotonic()
    return end(), time.monotonic() - begun


def test_who_obeys_sigterm_is_not_killed_and_nobody_waits_for_the_grace(grow: Grow) -> None:
    tree = grow(*FORKS)

    fate, seconds = timed(lambda: end_group(tree.identity, LONG))

    assert (fate, tree.members, tree.popen.wait()) == (ProcessFate.ENDED, set(), -signal.SIGTERM)
    assert seconds < LONG / 2


def test_who_ignores_sigterm_is_killed_after_the_grace_and_not_before(grow: Grow) -> None:
    tree = grow(*STUBBORN)

    fate, seconds = timed(lambda: end_group(tree.identity, GRACE))

    assert (fate, tree.members, tree.popen.wait()) == (ProcessFate.ENDED, set(), -signal.SIGKILL)
    assert seconds >= GRACE


def test_who_cleans_up_in_the_grace_has_the_time_for_it(grow: Grow) -> None:
    tree = grow(*sh("trap 'sleep 0.1; echo tidy; exit 5' TERM; echo ready; while :; do sleep 0.01; done"))

    assert end_group(tree.identity, LONG) is ProcessFate.ENDED
    assert (tree.line(), tree.popen.wait()) == ("tidy", 5)


def test_without_a_grace_it_is_killed_at_once(grow: Grow) -> None:
    tree = grow(*TELLS)

    assert end_group(tree.identity, 0.0) is ProcessFate.ENDED
    assert (tree.popen.wait(), tree.output.read()) == (-signal.SIGKILL, b"")


def test_who_is_told_to_hurry_from_the_beginning_sends_no_sigterm(grow: Grow) -> None:
    tree = grow(*TELLS)
    hurry = threading.Event()
    hurry.set()

    assert end_group(tree.identity, LONG, hurry) is ProcessFate.ENDED
    assert (tree.popen.wait(), tree.output.read()) == (-signal.SIGKILL, b"")


def test_who_is_told_to_hurry_meanwhile_waits_no_longer(grow: Grow) -> None:
    tree = grow(*TELLS)
    hurry, fates = threading.Event(), []
    ending = threading.Thread(target=lambda: fates.append(end_group(tree.identity, LONG, hurry)))
    begun = time.monotonic()
    ending.start()
    told = tree.line()
    hurry.set()
    ending.join()

    assert (told, fates, tree.popen.wait()) == ("term", [ProcessFate.ENDED], -signal.SIGKILL)
    assert time.monotonic() - begun < LONG / 2


def test_a_whole_tree_that_ignores_sigterm_ends(grow: Grow) -> None:
    tree = grow(*sh("trap '' TERM; (sleep 100 & sleep 100 & (sleep 100 & wait) & wait) & sleep 100 & echo ready; wait"))
    until(lambda: len(tree.members) >= 6)

    assert end_group(tree.identity, GRACE) is ProcessFate.ENDED
    assert tree.members == set()


def test_a_member_that_init_has_adopted_and_that_ignores_sigterm_ends(grow: Grow) -> None:
    tree = grow(*sh("(trap '' TERM; sleep 100 & echo $!); echo done; exec sleep 100"), ready=2)

    assert end_group(tree.identity, GRACE) is ProcessFate.ENDED
    assert (lives(int(tree.said[0])), tree.members) == (False, set())


def test_a_leader_that_ends_at_once_is_not_the_end_of_its_group(grow: Grow) -> None:
    tree = grow(*sh("(trap '' TERM; sleep 100 & echo $!)"))
    until(lambda: not lives(tree.popen.pid))

    fate, seconds = timed(lambda: end_group(tree.identity, GRACE))

    assert (fate, lives(int(tree.said[0]))) == (ProcessFate.ENDED, False)
    assert seconds >= GRACE


@pytest.mark.parametrize(("does", "grace"), [("obeys", LONG), ("ignores", GRACE)])
def test_who_left_the_group_but_not_the_session_ends_too(grow: Grow, does: str, grace: float) -> None:
    tree = grow(*LEAVES_GROUP, does)

    assert end_group(tree.identity, grace) is ProcessFate.ENDED
    assert (lives(int(tree.said[0])), tree.members) == (False, set())


def test_who_left_the_group_ends_after_the_leader_was_reaped(grow: Grow) -> None:
    tree = grow(*LEAVES_GROUP, "ignores")
    tree.kill_leader(reaped=True)

    assert end_group(tree.identity, GRACE) is ProcessFate.ENDED
    assert tree.members == set()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_the_jobs_of_a_shell_with_job_control_end_with_it(grow: Grow) -> None:
    tree = grow("bash", "-c", "set -m; trap '' TERM; sleep 100 & sleep 100 & echo $!; wait")
    job = int(tree.said[0])
    assert os.getpgid(job) == job != tree.popen.pid

    assert end_group(tree.identity, GRACE) is ProcessFate.ENDED
    assert tree.members == set()


@pytest.mark.parametrize("signals_first", [True, False], ids=["in the grace", "without one"])
def test_a_process_that_was_stopped_ends(grow: Grow, signals_first: bool) -> None:
    tree = grow(*FORKS)
    os.killpg(tree.popen.pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{tree.popen.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T")

    fate, seconds = timed(lambda: end_group(tree.identity, LONG if signals_first else 0.0))

    assert (fate, tree.members) == (ProcessFate.ENDED, set())
    assert tree.popen.wait() == (-signal.SIGTERM if signals_first else -signal.SIGKILL)
    assert seconds < LONG / 2


def test_what_is_started_in_the_grace_ends_too(grow: Grow) -> None:
    tree = grow(
        *sh("trap 'trap \"\" TERM; sleep 100 & sleep 100 & exit 0' TERM; echo ready; while :; do sleep 0.01; done")
    )

    assert end_group(tree.identity, GRACE) is ProcessFate.ENDED
    assert tree.members == set()


def test_who_is_started_while_one_looks_is_not_overlooked(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow(*PYTHON, """
import os, signal
def fork_and_end(*_):
    if os.fork():
        os._exit(0)
    os.write(1, b"%d\\n" % os.getpid())
    signal.pause()
signal.signal(signal.SIGUSR1, fork_and_end)
os.write(1, b"ready\\n")
while True:
    signal.pause()
""")  # fmt: skip
    look, children = os.listdir, []

    def look_and_wait(path: Any) -> list[str]:
        names = look(path)
        if not children:
            os.kill(tree.popen.pid, signal.SIGUSR1)
            children.append(int(tree.line()))
            until(lambda: not lives(tree.popen.pid))
        return names

    monkeypatch.setattr(os, "listdir", look_and_wait)

    assert survivors(tree.identity) == children
    assert len(children) == 1


def test_other_processes_live_on(grow: Grow) -> None:
    other, tree = grow(*FORKS), grow(*STUBBORN)
    before = other.members

    end_group(tree.identity, 0.0)

    assert (len(before), other.members) == (3, before)


def test_a_process_ends_whose_first_thread_has_ended_before(grow: Grow) -> None:
    tree = grow(sys.executable, "-I", "-c", """
import ctypes, os, signal, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=lambda: threading.Event().wait(100)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60}.get(os.uname().machine, 93), 0)
""")  # fmt: skip
    until(lambda: Path(f"/proc/{tree.popen.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z")
    assert tree.popen.poll() is None

    try:
        fate = end_group(tree.identity, 0.0)
        ended = select.select([tree.output], [], [], 0.5)[0]
        assert (fate, bool(ended)) == (ProcessFate.ENDED, True)
    finally:
        tree.popen.kill()


def test_a_group_whose_leader_is_reaped_meanwhile_is_ended_to_the_last(grow: Grow) -> None:
    tree = grow(*sh("trap 'exit 0' TERM; env -i sh -c 'trap \"\" TERM; echo $$; exec sleep 100' & wait"))
    left = int(tree.said[0])
    until(lambda: b"sleep" in Path(f"/proc/{left}/cmdline").read_bytes())
    # who adopts a dead owner's processes waits for them at once
    waiting = threading.Thread(target=tree.popen.wait)
    waiting.start()

    fate = end_group(tree.identity, 0.5)
    waiting.join()

    assert (fate, lives(left)) == (ProcessFate.ENDED, False)


def test_a_group_that_goes_by_itself_before_it_is_killed_has_ended(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow(*STUBBORN)
    kill = os.killpg

    def kill_too_late(group: int, what: int) -> None:
        tree.kill_leader(reaped=True)
        kill(group, what)

    monkeypatch.setattr(os, "killpg", kill_too_late)

    assert end_group(tree.identity, 0.0) is ProcessFate.ENDED


# --- where one cannot look ------------------------------------------------------------------------------------------


class NoDescriptor:
    """Has the system refuse what is read of ``/proc``, as it does when this process has no descriptor left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int = errno.EMFILE) -> None:
        self._monkeypatch = monkeypatch
        self._number = number

    def boot_id(self) -> None:
        processes.boot_id.cache_clear()
        self._refuse(Path, "read_text", "/proc/sys/kernel/random/boot_id")

    def stat(self, which: str = "/proc/*/stat") -> None:
        self._refuse(os, "open", which)

    def environment(self) -> None:
        self._refuse(Path, "read_bytes", "/proc/*/environ")

    def _refuse(self, owner: Any, name: str, which: str) -> None:
        real = getattr(owner, name)

        def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | Path) and Path(path).match(which):
                raise OSError(self._number, os.strerror(self._number), str(path))
            return real(path, *arguments, **options)

        self._monkeypatch.setattr(owner, name, refuse)


@pytest.mark.parametrize("what", ["boot_id", "stat", "environment"])
def test_what_cannot_be_looked_at_for_want_of_a_descriptor_is_not_taken_for_gone(grow: Grow, what: str) -> None:
    tree = grow(*FORKS)
    left = tree.members - {tree.popen.pid}
    tree.kill_leader(reaped=True)

    with pytest.MonkeyPatch.context() as monkeypatch:
        getattr(NoDescriptor(monkeypatch), what)()
        with pytest.raises(OSError, match="Too many open files"):
            survivors(tree.identity)
        with pytest.raises(OSError, match="Too many open files"):
            end_group(tree.identity, 0.0)

    assert (tree.members, set(survivors(tree.identity) or ())) == (left, left)


@pytest.mark.parametrize("what", ["boot_id", "stat"])
def test_who_cannot_be_looked_at_is_not_named(grow: Grow, what: str) -> None:
    tree = grow(*OBEDIENT)

    with pytest.MonkeyPatch.context() as monkeypatch:
        getattr(NoDescriptor(monkeypatch), what)()
        with pytest.raises(OSError, match="Too many open files"):
            identify(tree.popen.pid, "mine")

    assert identify(tree.popen.pid, "mine") == tree.identity


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_processes_of_others_that_the_system_hides_are_passed_over(
    grow: Grow, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tree = grow(*FORKS)
    NoDescriptor(monkeypatch, number).stat("/proc/1/stat")

    assert set(survivors(tree.identity) or ()) == tree.members
    assert end_group(tree.identity, LONG) is ProcessFate.ENDED
    assert tree.members == set()


def test_a_number_that_a_process_the_system_hides_has_by_now_proves_nothing(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow(*OBEDIENT)
    before, signalled = tree.members, signals(monkeypatch)
    NoDescriptor(monkeypatch, errno.EPERM).stat(f"/proc/{tree.popen.pid}/stat")

    assert survivors(tree.identity) is None
    assert end_group(tree.identity, 0.0) is ProcessFate.UNPROVEN
    assert (signalled, tree.members) == ([], before)


# --- how a program is started ---------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """What came of a program that ran to its end."""

    exit: Exit
    output: bytes
    errors: bytes


class Starter:
    """Starts programs, and leaves nothing of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Launched] = []

    def program(self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Program:
        found = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"} if env is None else env
        return resolve(command, str(cwd or self.folder), found)

    def launch(self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Launched:
        launched = launch(self.program(*command, env=env, cwd=cwd), "mine")
        self.started.append(launched)
        return launched

    def run(self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Ran:
        launched = self.launch(*command, env=env, cwd=cwd)
        launched.open_gate()
        ran = Ran(until_exit(launched), read_all(launched.output), read_all(launched.errors))
        self.clear(launched)
        return ran

    def clear(self, launched: Launched) -> None:
        launched.close()
        end_group(launched.identity, 0.0)
        reap(launched.pid)


def until_exit(launched: Launched) -> Exit:
    descriptor = os.pidfd_open(launched.pid)
    try:
        assert select.select([descriptor], [], [], 10.0)[0], "it does not end"
    finally:
        os.close(descriptor)
    ended = launched.exit()
    assert ended is not None
    return ended


def read_all(descriptor: int) -> bytes:
    os.set_blocking(descriptor, True)
    found = b""
    while chunk := os.read(descriptor, 65536):
        found += chunk
    return found


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    made = Starter(tmp_path)
    yield made
    for launched in made.started:
        made.clear(launched)


def is_reaped(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# the gate


def test_a_program_does_not_run_before_its_gate_is_opened(starter: Starter) -> None:
    launched = starter.launch(*sh("echo ran; echo ran >ran"))

    assert (launched.exit(), os.getsid(launched.pid), os.getpgid(launched.pid)) == (None, launched.pid, launched.pid)
    with pytest.raises(BlockingIOError):
        os.read(launched.output, 1)
    assert not (starter.folder / "ran").exists()


@pytest.mark.parametrize("how", ["shut", "closed"])
def test_a_program_whose_gate_is_never_opened_goes_away_without_having_run(starter: Starter, how: str) -> None:
    launched = starter.launch(*sh("echo ran; echo ran >ran"))

    launched.shut_gate() if how == "shut" else launched.close()

    assert until_exit(launched) == 0
    assert not (starter.folder / "ran").exists()
    if how == "shut":
        assert (read_all(launched.output), read_all(launched.errors)) == (b"", b"")


def test_a_program_that_was_told_half_of_what_it_shall_be_goes_away(
    starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(launched: Launched, data: bytes, *arguments: object) -> None:
        os.write(launched._gate, data[: len(data) // 2])

    monkeypatch.setattr(Launched, "_write", write_half)
    launched = starter.launch(*sh("echo ran >ran"))
    launched.open_gate()

    assert (until_exit(launched), read_all(launched.errors)) == (0, b"")
    assert not (starter.folder / "ran").exists()


def test_a_gate_may_be_shut_and_everything_closed_again(starter: Starter) -> None:
    launched = starter.launch("true")
    launched.open_gate()
    until_exit(launched)

    launched.shut_gate()
    launched.close()
    launched.close()


def test_a_process_is_the_same_before_and_behind_its_gate(starter: Starter) -> None:
    launched = starter.launch("sleep", "100")
    waiting = identify(launched.pid, "mine")
    launched.open_gate()

    assert launched.identity == waiting == identify(launched.pid, "mine")
    assert survivors(launched.identity) == [launched.pid]


def test_a_process_that_died_at_its_gate_tells_so_by_its_exit(starter: Starter) -> None:
    launched = starter.launch(*sh("echo ran >ran"))
    os.kill(launched.pid, signal.SIGKILL)
    until_exit(launched)

    launched.open_gate()

    assert launched.exit() == -signal.SIGKILL
    assert not (starter.folder / "ran").exists()


def test_nothing_that_waits_at_a_gate_outlives_its_owner(tmp_path: Path, spawn: Spawn) -> None:
    owner = spawn(
        """
        import sys, time
        from lash_store.launching import launch
        from lash_store.programs import resolve
        program = resolve(("/bin/sh", "-c", "echo ran >ran"), sys.argv[1], {})
        print(*(launch(program, "mine").pid for _ in range(3)), flush=True)
        time.sleep(100)
        """,
        tmp_path,
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert [lives(pid) for pid in pids] == [True] * 3

    owner.kill()

    until(lambda: not any(lives(pid) for pid in pids))
    assert not (tmp_path / "ran").exists()


def test_a_fork_of_its_owner_in_the_midst_of_a_launch_keeps_no_gate_open(tmp_path: Path, spawn: Spawn) -> None:
    owner = spawn(
        """
        import os, sys, threading, time, warnings
        warnings.simplefilter("ignore")
        from lash_store import launching
        from lash_store.programs import resolve
        name, began = launching.identify, threading.Event()

        def fork():
            began.set()
            if os.fork() == 0:
                # until the test is over
                os.read(0, 1)
                os._exit(0)

        def name_and_fork(pid, token):
            forking.start()
            began.wait()
            # who may fork does it at once
            forking.join(0.5)
            return name(pid, token)

        launching.identify, forking = name_and_fork, threading.Thread(target=fork)
        program = resolve(("/bin/sh", "-c", "echo ran >ran"), sys.argv[1], {})
        launched = launching.launch(program, "mine")
        forking.join()
        print(launched.pid, flush=True)
        time.sleep(100)
        """,
        tmp_path,
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert lives(pid)

    owner.kill()

    until(lambda: not lives(pid))
    assert not (tmp_path / "ran").exists()


def test_a_program_runs_also_if_its_owner_has_no_standard_descriptors(tmp_path: Path, spawn: Spawn) -> None:
    owner = spawn(
        """
        import os, sys
        from lash_store.launching import launch, reap
        from lash_store.programs import resolve
        program = resolve(("/bin/sh", "-c", "echo out; echo err >&2; exit 7"), sys.argv[1], {})
        found = []
        for closed in ([0], [1], [2], [0, 1, 2]):
            kept = [(one, os.dup(one)) for one in closed]
            for one in closed:
                os.close(one)
            launched = launch(program, "mine")
            launched.open_gate()
            os.waitid(os.P_PID, launched.pid, os.WEXITED | os.WNOWAIT)
            found.append((int(launched.exit()), os.read(launched.output, 9), os.read(launched.errors, 9)))
            launched.close()
            reap(launched.pid)
            for one, copy in kept:
                os.dup2(copy, one)
                os.close(copy)
        print(found, flush=True)
        """,
        tmp_path,
    )
    out, err = owner.communicate(timeout=20)

    assert (out.strip(), err) == (str([(7, b"out\n", b"err\n")] * 4), "")


# what it is given

SHOWS = (*PYTHON, """
import sys
for name in ("cmdline", "environ"):
    with open(f"/proc/self/{name}", "rb") as told:
        sys.stdout.buffer.write(told.read() + b"\\0;")
""")  # fmt: skip


def shown(ran: Ran) -> tuple[list[str], dict[str, str]]:
    arguments, environment = (
        part.decode("utf-8", "surrogateescape").rstrip("\0").split("\0") if part.strip(b"\0") else []
        for part in ran.output.split(b"\0;")[:2]
    )
    return arguments, dict(one.split("=", 1) for one in environment)


def test_a_program_is_given_its_arguments_as_they_are(starter: Starter) -> None:
    odd = ["", "a b", "two\nlines", "été 日本 \U0001f600", "$HOME 'quoted' \"twice\" \\", "--", "-c", "*", "end"]

    ran = starter.run(*SHOWS, *odd)

    assert (ran.exit, ran.errors) == (0, b"")
    assert shown(ran)[0] == [*SHOWS, *odd]


def test_a_program_is_given_its_environment_and_the_token_and_nothing_else(
    starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of the owner")
    monkeypatch.setenv("PYTHONSTARTUP", "of the owner")
    odd = {
        "EMPTY": "",
        "LINES": "two\nlines\n",
        "ä": "日本 \U0001f600",
        "WITH": "a=b=c",
        "a b": " ",
        "PATH": "/nowhere",
    }

    ran = starter.run(*SHOWS, env=odd)

    assert (ran.exit, ran.errors) == (0, b"")
    assert shown(ran)[1] == {**odd, TOKEN: "mine"}


def test_an_environment_may_be_empty_but_for_the_token(starter: Starter) -> None:
    assert shown(starter.run(*SHOWS, env={}))[1] == {TOKEN: "mine"}


def test_the_token_is_ours_whatever_the_environment_says(starter: Starter) -> None:
    assert shown(starter.run(*SHOWS, env={TOKEN: "another"}))[1] == {TOKEN: "mine"}


def test_a_program_has_the_name_it_was_called_by(starter: Starter) -> None:
    assert starter.run("sh", "-c", "echo $0; tr '\\0' ' ' </proc/$$/cmdline").output.startswith(b"sh\nsh -c")


def test_a_program_runs_in_its_folder_in_a_session_and_a_group_of_its_own(starter: Starter, tmp_path: Path) -> None:
    folder = tmp_path / "été \n1"
    folder.mkdir()

    ran = starter.run(*PYTHON, "import os; print(os.getsid(0) == os.getpgrp() == os.getpid(), os.getcwd())", cwd=folder)

    assert ran.output.decode() == f"True {folder}\n"


def test_a_program_has_an_empty_standard_input(starter: Starter) -> None:
    assert starter.run("cat") == Ran(Exit(0), b"", b"")


def test_what_a_program_writes_is_told_apart(starter: Starter) -> None:
    assert starter.run(*sh("echo out; echo err >&2; exit 3")) == Ran(Exit(3), b"out\n", b"err\n")


def test_a_program_has_three_descriptors_that_block_and_no_other(starter: Starter) -> None:
    ours = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(ours, True)
    others = starter.launch("true")
    try:
        ran = starter.run(*PYTHON, """
import os
def is_open(one):
    try:
        return bool(os.fstat(one))
    except OSError:
        return False
print([(one, os.get_blocking(one)) for one in map(int, os.listdir("/proc/self/fd")) if is_open(one)])
""")  # fmt: skip
    finally:
        os.close(ours)

    assert ran.output.decode() == "[(0, True), (1, True), (2, True)]\n"
    assert others.exit() is None


@pytest.mark.parametrize("name", ["SIGPIPE", "SIGXFSZ"])
def test_a_signal_that_python_ignores_is_at_its_default_in_a_program(starter: Starter, name: str) -> None:
    number = signal.Signals[name]

    ran = starter.run(*sh(f"cat /proc/self/status; kill -{number.value} $$; echo lives"))

    status = dict(line.split(":\t", 1) for line in ran.output.decode().splitlines() if ":\t" in line)
    assert not int(status["SigIgn"], 16) & 1 << (number - 1)
    assert (ran.exit, b"lives" in ran.output) == (-number, False)


def test_a_writer_whose_reader_has_gone_ends_by_the_broken_pipe(starter: Starter) -> None:
    launched = starter.launch("yes")
    launched.open_gate()
    launched.close()

    assert until_exit(launched) == -signal.SIGPIPE


def test_a_program_may_be_given_a_megabyte_of_arguments_and_a_large_environment(starter: Starter) -> None:
    arguments = ["x" * 100_000] * 10
    env = {"PATH": os.environ["PATH"], "LARGE": "y" * 100_000}

    script = "import os, sys; print(sum(map(len, sys.argv[1:])), len(os.environ['LARGE']))"
    ran = starter.run(*PYTHON, script, *arguments, env=env)

    assert (ran.exit, ran.output, ran.errors) == (0, b"1000000 100000\n", b"")


# what cannot be started


def executable(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o755)
    return path


BROKEN: dict[str, tuple[bytes, int]] = {
    "an interpreter that is not there": (b"#!/no/such/interpreter\necho ran\n", errno.ENOENT),
    "an interpreter that is a folder": (b"#!/tmp\n", errno.EACCES),
    "garbage": (b"\x00\x01\x02garbage", errno.ENOEXEC),
    "a text that names no interpreter": (b"echo ran >ran\n", errno.ENOEXEC),
    "nothing": (b"", errno.ENOEXEC),
}


@pytest.mark.parametrize(("content", "number"), BROKEN.values(), ids=BROKEN.keys())
def test_a_program_that_cannot_be_executed_is_told_by_why(starter: Starter, content: bytes, number: int) -> None:
    broken = executable(starter.folder / "broken", content)
    launched = starter.launch(str(broken))

    with pytest.raises(OSError) as caught:
        launched.open_gate()

    assert caught.value.errno == number
    assert caught.value.filename == str(broken)
    assert os.strerror(caught.value.errno) in str(caught.value)
    assert (until_exit(launched), read_all(launched.errors)) == (127, b"")
    assert not (starter.folder / "ran").exists()


def test_a_program_that_has_gone_since_it_was_found_is_told(starter: Starter) -> None:
    program = executable(starter.folder / "program", b"#!/bin/sh\n")
    launched = starter.launch(str(program))
    program.unlink()

    with pytest.raises(FileNotFoundError):
        launched.open_gate()


@pytest.mark.parametrize("arguments", [["x" * 200_000], ["x" * 100_000] * 80], ids=["one too long", "too many"])
def test_arguments_that_are_too_long_for_the_system_are_told(starter: Starter, arguments: list[str]) -> None:
    launched = starter.launch("true", *arguments)

    with pytest.raises(OSError) as caught:
        launched.open_gate()

    assert caught.value.errno == errno.E2BIG


def test_a_folder_that_has_gone_since_it_was_found_is_told(starter: Starter) -> None:
    folder = starter.folder / "gone"
    folder.mkdir()
    program = starter.program("true", cwd=folder)
    folder.rmdir()
    before = descriptors()

    with pytest.raises(FileNotFoundError):
        launch(program, "mine")

    assert descriptors() == before


@pytest.mark.parametrize("name", ["", None])
def test_where_no_interpreter_is_named_nothing_is_started(
    starter: Starter, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    program = starter.program("true")
    monkeypatch.setattr(sys, "executable", name)
    before = descriptors()

    with pytest.raises(StoreError, match=r"sys\.executable"):
        launch(program, "mine")

    assert descriptors() == before


# how it ended


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("exit 0", 0, "exit status 0"),
        ("exit 3", 3, "exit status 3"),
        ("exit 255", 255, "exit status 255"),
        ("kill -KILL $$", -9, "killed by signal 9 (SIGKILL)"),
        ("kill -TERM $$", -15, "killed by signal 15 (SIGTERM)"),
        ("ulimit -c 0; kill -SEGV $$", -11, "killed by signal 11 (SIGSEGV)"),
        ("kill -40 $$", -40, "killed by signal 40"),
    ],
)
def test_how_a_program_ended_is_told_by_its_status_or_its_signal(
    starter: Starter, script: str, status: int, said: str
) -> None:
    ended = starter.run(*sh(script)).exit

    assert (ended, str(ended)) == (status, said)


def test_how_a_program_ended_may_be_asked_again_until_it_is_reaped(starter: Starter) -> None:
    launched = starter.launch(*sh("exit 3"))
    launched.open_gate()
    asked = [until_exit(launched), launched.exit(), launched.exit()]
    was_there = not is_reaped(launched.pid)
    reap(launched.pid)

    assert (asked, was_there, is_reaped(launched.pid)) == ([3, 3, 3], True, True)
    with pytest.raises(ChildProcessError):
        launched.exit()


def test_a_program_that_runs_is_not_reaped(starter: Starter) -> None:
    launched = starter.launch("sleep", "100")
    launched.open_gate()

    reap(launched.pid)

    assert (launched.exit(), lives(launched.pid)) == (None, True)
    end_group(launched.identity, 0.0)
    reap(launched.pid)
    assert is_reaped(launched.pid)


def test_a_program_that_is_stopped_has_not_ended(starter: Starter) -> None:
    launched = starter.launch("sleep", "100")
    launched.open_gate()
    os.kill(launched.pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{launched.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T")

    assert launched.exit() is None


def test_a_child_of_somebody_else_is_not_reaped(grow: Grow) -> None:
    tree = grow(*OBEDIENT)
    tree.kill_leader(reaped=False)

    reap(tree.popen.pid)
    reap(2**22 + 1)

    assert tree.popen.wait() == -signal.SIGKILL


def descriptors() -> set[str]:
    return {one.name for one in Path("/proc/self/fd").iterdir()}


@pytest.mark.long
def test_a_hundred_launches_leave_no_descriptor_no_process_and_no_zombie(starter: Starter) -> None:
    runs = starter.program("true")
    breaks = starter.program(str(executable(starter.folder / "broken", b"#!/no/such\n")))
    before, pids = len(descriptors()), []

    for number in range(100):
        launched = launch(breaks if number % 4 == 1 else runs, "mine")
        pids.append(launched.pid)
        if number % 4 == 1:
            with pytest.raises(FileNotFoundError):
                launched.open_gate()
        elif number % 4 != 2:
            launched.open_gate()
        launched.close()
        if number % 4 == 3:
            end_group(launched.identity, 0.0)
        until_exit(launched)
        reap(launched.pid)

    assert len(descriptors()) == before
    assert all(is_reaped(pid) for pid in pids)


# --- which program is meant -----------------------------------------------------------------------------------------


def test_a_process_inherits_what_is_named_and_what_the_spec_says_stands_before_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in programs.INHERITED:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PATH": "/bin", "HOME": "/home", "TZ": "", "API_KEY": "k", "SECRET": "s"}.items():
        monkeypatch.setenv(name, value)

    assert programs.environment({}) == {"PATH": "/bin", "HOME": "/home", "TZ": ""}
    assert programs.environment({"PATH": "/mine", "A": ""}, ("API_KEY", "NOT_SET")) == {
        "PATH": "/mine",
        "HOME": "/home",
        "TZ": "",
        "API_KEY": "k",
        "A": "",
    }


def test_no_key_or_token_is_inherited_by_itself() -> None:
    assert not [name for name in programs.INHERITED if any(word in name for word in ("KEY", "TOKEN", "SECRET", "AUTH"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with programs, and with what is none."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        executable(tmp_path / name / "tool", f"#!/bin/sh\necho {name}\n".encode())
    executable(tmp_path / "here", b"#!/bin/sh\necho here\n")
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "first" / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "first" / "folder").mkdir()
    (tmp_path / "link").symlink_to("here")
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "path", "found"),
    [
        ("tool", "{0}/first:{0}/second", "first/tool"),
        ("tool", "{0}/second:{0}/first", "second/tool"),
        ("tool", "/no/such:{0}/first", "first/tool"),
        ("tool", "first", "first/tool"),
        ("plain", "{0}/first:{0}/second:{0}/third", None),
        ("folder", "{0}/first", None),
        ("tool", "{0}", None),
        ("./here", "", "here"),
        ("./link", "", "link"),
        ("first/tool", "", "first/tool"),
        ("first/../second/tool", "", "first/../second/tool"),
        ("{0}/second/tool", "/no/such", "second/tool"),
        ("./dangling", "", None),
        ("./plain", "", None),
        ("./first", "", None),
        ("./nothing", "", None),
        ("/", "", None),
        ("./", "", None),
        ("plain/tool", "", None),
        (" ", "{0}/first", None),
        ("tool ", "{0}/first", None),
        ("~", "{0}/first", None),
        (".", "{0}/first", None),
        ("..", "{0}/first", None),
    ],
)
def test_a_program_is_found_by_the_path_of_its_own_environment_or_from_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, path: str, found: str | None
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command, env = (name.format(folder), "-l"), {"PATH": path.format(folder)}

    if found is None:
        with pytest.raises(InvalidArguments, match="program"):
            resolve(command, str(folder), env)
    else:
        program = resolve(command, str(folder), env)
        assert Path(program.path) == folder / found
        assert (program.arguments, program.cwd, program.environment) == (command, str(folder), env)


def test_the_path_of_the_owner_finds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder / "first"))

    with pytest.raises(InvalidArguments, match=r"'tool'.*PATH"):
        resolve(("tool",), str(folder), {})


def test_without_a_path_the_systems_own_is_searched(folder: Path) -> None:
    assert Path(resolve(("sh",), str(folder), {}).path).name == "sh"


def test_a_program_that_was_found_beside_its_folder_is_the_one_that_runs(folder: Path) -> None:
    starter = Starter(folder)

    assert starter.run("./here", env={}).output == b"here\n"
    assert starter.run("tool", env={"PATH": "second"}).output == b"second\n"


@pytest.mark.parametrize("cwd", ["/no/such/folder", "{0}/here", "{0}/here/below", "{0}/dangling"])
def test_a_folder_that_is_none_is_refused_by_its_name(folder: Path, cwd: str) -> None:
    with pytest.raises(InvalidArguments, match=r"folder .*(does not exist|is not a folder): give cwd="):
        resolve(("sh",), cwd.format(folder), {})


def test_a_program_that_may_not_be_executed_is_told_from_one_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InvalidArguments, match="may not be executed"):
        resolve(("./plain",), str(folder), {})
    with pytest.raises(InvalidArguments, match="does not exist"):
        resolve(("./nothing",), str(folder), {})


@pytest.mark.parametrize(
    ("name", "cwd"),
    [
        ("x" * 5000, "/"),
        ("./" + "x" * 5000, "/"),
        ("sh", "/" + "x" * 5000),
    ],
    ids=["a name", "a path", "a folder"],
)
def test_a_name_that_is_too_long_for_the_system_is_no_program_and_no_folder(name: str, cwd: str) -> None:
    with pytest.raises(InvalidArguments):
        resolve((name,), cwd, {})
