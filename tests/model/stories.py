"""Tells a portion of stories in one process, and what came of them."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from tests.model.watched import MACHINES, SEEN
from tests.runtime.test_model import COMMON, STEPS

__all__ = ["Told", "tell"]

_STORIES, _LENGTH = 40, 50
"""Stories in a portion, and steps in a story."""


@dataclass
class Told:
    """What came of a portion."""

    steps: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    stories: int = 0
    failure: str | None = None


def tell(seed: int, portion: int, processes: int) -> Told:
    """Tell the stories of one portion, in this process."""
    logging.disable(logging.CRITICAL)
    memory = Path("/dev/shm")
    tempfile.tempdir = str(memory) if memory.is_dir() else None
    STEPS.clear()
    SEEN.clear()
    told = Told()
    machine = hypothesis.seed(seed * 1_000_000 + portion)(MACHINES[processes])
    how = hypothesis.settings(max_examples=_STORIES, stateful_step_count=_LENGTH, database=None, **COMMON)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            run_state_machine_as_test(machine, settings=how)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        told.failure = f"seed {seed}, portion {portion}:\n{printed.getvalue()}\n{traceback.format_exc()}"
    told.stories = SEEN.pop("stories", 0)
    told.steps, told.seen = Counter(STEPS), Counter(SEEN)
    return told
