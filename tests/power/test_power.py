"""The quick cut of ``python -m tests.power``: two thousand states of a short record, and the controls."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.power import vfs
from tests.power.disk import BLOCK, Disk, Record, left_of, name_of
from tests.power.running import Job, Run, control_is_red
from tests.power.states import Report, judge, scratch

SEED = 12

pytestmark = pytest.mark.skipif(vfs.available() is not None, reason=f"no layer under SQLite: {vfs.available()}")

JOBS = [
    Job("full", SEED, 2_200),
    Job("early", SEED, 200),
    Job("normal", SEED, 200),
    Job("off", SEED, 30),
    Job("upgrade", SEED, 200),
    Job("restore emptied", SEED, 100),
    Job("restore again", SEED, 100),
]

NEEDED = (
    "birth",
    "unnamed",
    "born",
    "second life",
    "commit pending",
    "commit there",
    "commit gone",
    "inside checkpoint",
    "wal anew",
    "torn",
    "shuffled",
    "garbage",
    "reopened",
)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Record and judge all kinds once; the record of the first is kept as long as the tests run."""
    with scratch() as folder:
        run = Run(JOBS, SEED, folder, operations=8, every=400, needed=NEEDED, spared={"full": None})
        run.run()
        yield run


def test_a_power_cut_loses_nothing_that_was_acknowledged(run: Run) -> None:
    full = run.reports["full"]
    assert (full.wrong, full.failures) == (0, [])
    assert full.states >= 2_000
    assert full.distinct > full.states // 3
    assert full.commits > 15
    assert full.reopened >= 5
    assert run.missed == []


@pytest.mark.parametrize("kind", ["upgrade", "restore emptied", "restore again"])
def test_a_power_cut_leaves_the_old_file_or_the_new_one_and_what_is_kept_of_the_old(run: Run, kind: str) -> None:
    report = run.reports[kind]
    assert (report.wrong, report.failures) == (0, [])
    assert report.states > 100


@pytest.mark.parametrize("kind", ["normal", "early", "off"])
def test_the_harness_sees_a_store_that_loses(run: Run, kind: str) -> None:
    assert control_is_red(kind, run.reports[kind]) is None


def test_normal_durability_loses_the_newest_alone_and_breaks_nothing(run: Run) -> None:
    normal = run.reports["normal"]
    assert normal.lost > 0
    assert normal.most > 1
    assert (normal.corrupt, normal.mixed, normal.broken) == (0, 0, 0)


def test_a_control_that_stays_green_fails_the_run(run: Run) -> None:
    blind = Run(JOBS, SEED, run.folder, reports={**run.reports, "early": run.reports["full"]}, needed=NEEDED)
    assert blind.wrong == ["control 'early' is green: nothing was lost: the harness is blind"]


def test_a_run_that_did_not_meet_what_it_is_for_is_void(run: Run) -> None:
    full = run.reports["full"]
    unmet = Report(states=full.states, sometimes={**full.sometimes, "torn": 0})
    void = Run(JOBS, SEED, run.folder, reports={**run.reports, "full": unmet}, needed=NEEDED)
    assert void.wrong == ["void: the run never met torn"]


# --- the model of a disk --------------------------------------------------------------------------------------------


def _disk(tmp_path: Path, entries: list[list[object]], blob: bytes = b"") -> Disk:
    """Make a disk that has gone through a record made by hand, of the files /d/a and /d/b."""
    (tmp_path / "record.bin").write_bytes(blob)
    about = {"kind": "full", "seed": 0, "path": "/d/a", "folder": "/d", "entries": entries}
    (tmp_path / "record.json").write_text(json.dumps(about))
    disk = Disk(Record(tmp_path), ["/d/a", "/d/b"])
    for index in range(len(entries)):
        disk.step(index)
    return disk


def _left(disk: Disk, how: str, seed: int = 0) -> dict[str, bytes]:
    state = disk.left(how, random.Random(seed))
    for content in state.files.values():
        blocks = [bytes(content.data[at : at + BLOCK]) for at in range(0, len(content.data), BLOCK)]
        assert content.blocks == [name_of(block) for block in blocks]
    return {name: bytes(content.data) for name, content in state.files.items()}


def test_a_file_keeps_what_was_written_before_its_sync_began(tmp_path: Path) -> None:
    entries = [["open", 1, "/d/a"], ["folder", "/d", 1], ["write", 1, 0, 0, 4], ["write", 1, 4, 4, 4], ["sync", 1, 3]]
    disk = _disk(tmp_path, entries, b"oneonetwo!")
    assert _left(disk, "nothing") == {"/d/a": b"oneo"}
    assert _left(disk, "all") == {"/d/a": b"oneonetw"}


def test_a_name_is_durable_once_its_folder_was_synced(tmp_path: Path) -> None:
    entries: list[list[object]] = [["open", 1, "/d/a"], ["write", 1, 0, 0, 4], ["sync", 1, 2]]
    assert _left(_disk(tmp_path, entries, b"data"), "nothing") == {}
    entries.append(["folder", "/d", 3])
    assert _left(_disk(tmp_path, entries, b"data"), "nothing") == {"/d/a": b"data"}
    entries.append(["rename", "/d/a", "/d/b"])
    disk = _disk(tmp_path, entries, b"data")
    assert {tuple(_left(disk, "subset", seed)) for seed in range(20)} == {("/d/a",), ("/d/b",)}


def test_a_torn_write_leaves_whole_sectors_of_the_old_and_the_new(tmp_path: Path) -> None:
    entries = [["open", 1, "/d/a"], ["folder", "/d", 1], ["write", 1, 0, 0, 4096], ["sync", 1, 3]]
    disk = _disk(tmp_path, [*entries, ["write", 1, 0, 4096, 4096]], b"o" * 4096 + b"n" * 4096)
    node = disk.names["/d/a"]
    found = {bytes(left_of(node, "torn", random.Random(seed)).data) for seed in range(40)}
    assert len(found) > 10
    sectors = {content[at : at + 512] for content in found for at in range(0, 4096, 512)}
    assert sectors == {b"o" * 512, b"n" * 512}


def test_what_a_file_grew_by_may_be_anything_and_what_it_had_stays(tmp_path: Path) -> None:
    entries = [["open", 1, "/d/a"], ["folder", "/d", 1], ["write", 1, 0, 0, 512], ["sync", 1, 3]]
    more = [["write", 1, 512 * number, 512, 512] for number in range(1, 9)]
    disk = _disk(tmp_path, [*entries, *more], b"o" * 512 + b"n" * 512)
    left = [left_of(disk.names["/d/a"], "garbage", random.Random(seed)).data for seed in range(20)]
    assert all(content[:512] == b"o" * 512 for content in left)
    assert any(set(content[512:]) - set(b"on\0") for content in left)


def test_names_that_are_never_synced_are_lost(run: Run) -> None:
    saved = run.spared["full"]
    assert saved is not None
    about = json.loads((saved / "record.json").read_text())
    # a recorder that does not see the sync of a folder would find this loss, and it would be false
    about["entries"] = [["mark", "unseen"] if entry[0] == "folder" else entry for entry in about["entries"]]
    (saved / "record.json").write_text(json.dumps(about))
    report = judge(saved, 200, SEED)
    assert report.lost > 0
