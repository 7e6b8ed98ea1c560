"""The wheel: everything a store needs is in it, and nothing of the repository is needed beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lash_store.identity import HEAD

ROOT = Path(__file__).parents[2]

_USE = """
import asyncio, sys
import lash_store
from lash_store import TaskStore
import lash_store.migrations

assert lash_store.__file__.startswith(sys.argv[1]), lash_store.__file__
assert lash_store.migrations.__file__.startswith(sys.argv[1]), lash_store.migrations.__file__

async def main():
    async with TaskStore(sys.argv[2], runtime="desktop") as store:
        session = await store.session("s1")
        print(await (await session.spawn(asyncio.sleep(0, "done"))))

asyncio.run(main())
"""


_REVISE = """
import sys
import lash_store
from lash_store.cli import main

assert lash_store.__file__.startswith(sys.argv[1]), lash_store.__file__
db = ["--db", sys.argv[2]]
for command in (
    ["current"], ["upgrade"], ["doctor"], ["list", "--all"], ["show", "#1"], ["stats"], ["query", "slow-kinds"], ["schema"],
    ["backup", sys.argv[3]], ["downgrade", "0001", "--yes"], ["current"], ["upgrade"], ["history"],
):
    # whoever had it was killed, and the doctor says so
    assert main([*command, *db]) == (command == ["doctor"]), command
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("lash_store", "migrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode and "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("the build backend cannot be fetched here")
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    return built


@pytest.mark.long
def test_the_wheel_has_the_migrations_and_the_marker_of_its_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {
        "lash_store/__init__.py",
        "lash_store/py.typed",
        "lash_store/migrations/env.py",
        "lash_store/migrations/versions/0001_core.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "migrations/", "benchmarks", "docs"))]


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed from the wheel, in a folder of its own."""
    target = tmp_path_factory.mktemp("installed") / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(target), str(wheel)],
        check=True,
        timeout=60,
        capture_output=True,
    )
    return target


def away(site: Path, folder: Path, program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with what is installed, away from the repository."""
    return subprocess.run(
        [sys.executable, "-c", program, str(site), *map(str, arguments)],
        cwd=folder,
        env={"PYTHONPATH": str(site), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.long
def test_a_store_is_made_from_the_wheel_away_from_the_repository(site: Path, tmp_path: Path) -> None:
    done = away(site, tmp_path, _USE, tmp_path / "agent.db")

    assert done.stdout == "done\n", done.stderr


@pytest.mark.long
def test_the_oldest_file_is_upgraded_taken_down_and_looked_into_with_the_wheel_alone(
    site: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copy(ROOT / "tests/data/0001.db", tmp_path / "agent.db"))

    done = away(site, tmp_path, _REVISE, old, tmp_path / "copy.db")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0001 (head is ")
    assert f"{old}: revision 0001 to " in done.stdout
    assert "CREATE TABLE tombstones" in done.stdout
    assert sorted(file.name for file in tmp_path.glob("*.backup*")) == [
        "agent.db-0001.backup",
        "agent.db-0001.backup-2",
        f"agent.db-{HEAD}.backup",
    ]
