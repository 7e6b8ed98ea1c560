"""Whole folders run on every processor, if pytest-xdist is there; a single file runs in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose how many processes run the tests, unless the command line says so."""
    if hasattr(config, "workerinput"):
        # one of them
        return
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or option.numprocesses is not None or option.usepdb:
        return
    if all((config.rootpath / argument).is_dir() for argument in map(Path, config.args)):
        # many tests wait for processes of their own
        option.numprocesses = min(4, (os.cpu_count() or 1) + 1)
        option.dist = "worksteal"
