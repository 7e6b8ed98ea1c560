import gc
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
