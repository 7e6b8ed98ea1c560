"""Every planted fault still fits the package: its text stands where it is said to, once, and what comes of it is Python."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.planted.faults import FAULTS, Fault

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fits_the_package(fault: Fault) -> None:
    texts: dict[str, str] = {}
    for path, old, new in fault.edits:
        text = texts.get(path) or (ROOT / path).read_text()
        assert text.count(old) == 1
        texts[path] = text.replace(old, new)
    for text in texts.values():
        ast.parse(text)


def test_there_are_faults_enough() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 10
