import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lash_store.collector import Pause


@pytest.fixture(autouse=True)
def _on_again() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_the_collector_is_off_from_the_beginning_of_the_first_pause_to_the_end_of_the_last() -> None:
    with Pause() as one:
        assert gc.isenabled()
        one.begin()
        assert not gc.isenabled()
        with Pause() as other:
            other.begin()
            other.begin()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_is_on_again_after_an_error() -> None:
    def fail() -> None:
        with Pause() as pause:
            pause.begin()
            raise ValueError

    with pytest.raises(ValueError):
        fail()

    assert gc.isenabled()


def test_a_program_that_has_it_off_keeps_it_off() -> None:
    gc.disable()

    with Pause() as pause:
        pause.begin()

    assert not gc.isenabled()


def test_who_comes_to_begin_after_the_block_pauses_nothing() -> None:
    with Pause() as pause:
        pass
    pause.begin()

    assert gc.isenabled()


def test_a_child_that_is_forked_meanwhile_has_it_on() -> None:
    program = (
        "import gc, os\n"
        "from lash_store.collector import Pause\n"
        "with Pause() as pause:\n"
        "    pause.begin()\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os._exit(0 if gc.isenabled() else 3)\n"
        "    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "    print(status, gc.isenabled())\n"
        "print(gc.isenabled())\n"
    )

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)

    assert said.stdout.split() == ["0", "False", "True"]
