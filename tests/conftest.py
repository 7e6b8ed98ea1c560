"""
Whole folders run on every processor, if pytest-xdist is there; a single file runs in this process.

Where the system has a file system in memory, the files of the tests are there, unless ``--basetemp`` or
``PYTEST_DEBUG_TEMPROOT`` says otherwise: what is killed here are processes, which such a file survives like any other, and a
third of the time would go into waiting for a disk. What must reach the disk has tests of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


def _has_room(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) and shutil.disk_usage(folder).free > 2**30


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose how many processes run the tests, unless the command line says so."""
    if hasattr(config, "workerinput"):
        # one of them
        return
    # a few hundred processes import the same modules: to compile them once is most of what they would do
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    option = config.option
    if option.basetemp is None and "PYTEST_DEBUG_TEMPROOT" not in os.environ and _has_room(MEMORY):
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)
    if not config.pluginmanager.hasplugin("xdist") or option.numprocesses is not None or option.usepdb:
        return
    if all((config.rootpath / argument).is_dir() for argument in map(Path, config.args)):
        # many tests wait for processes of their own
        option.numprocesses = min(4, (os.cpu_count() or 1) + 2)
        # the longest files come first, and no file is made ready twice
        option.dist, option.loadscopereorder = "loadfile", False
