"""The wheel: everything a store needs is in it, and nothing of the repository is needed beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_the_wheel_has_the_migrations_and_the_marker_of_its_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {
        "lash_store/__init__.py",
        "lash_store/py.typed",
        "lash_store/migrations/env.py",
        "lash_store/migrations/versions/0001_core.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "migrations/", "benchmarks", "docs"))]


def test_a_store_is_made_from_the_wheel_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(target), str(wheel)],
        check=True,
        timeout=60,
        capture_output=True,
    )

    done = subprocess.run(
        [sys.executable, "-c", _USE, str(target), str(tmp_path / "agent.db")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "done\n", done.stderr
