"""Owns what is to be run: the program a command names, its folder, and its environment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidArguments

__all__ = ["INHERITED", "Program", "environment", "resolve"]

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LC_MESSAGES",
    "TZ",
    "TMPDIR",
    "TERM",
)
"""What a monitor's process has of its owner's environment, beside what its spec says; keys and tokens are not among it."""


@dataclass(frozen=True, slots=True)
class Program:
    """What is to be run: the executable's path, its arguments (the first is its name), its folder and whole environment."""

    path: str
    arguments: tuple[str, ...]
    cwd: str
    environment: Mapping[str, str]


def environment(env: Mapping[str, str], also: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what a process is given: what is `INHERITED`, the variables *also* named, and those of *env*."""
    inherited = {name: os.environ[name] for name in (*INHERITED, *also) if name in os.environ}
    return {**inherited, **env}


def resolve(command: tuple[str, ...], cwd: str, env: Mapping[str, str]) -> Program:
    """
    Find the program a command names, by the PATH of its own environment, and its folder.

    Raises:
        InvalidArguments: there is no such program, or no such folder, or it may not be used.
    """
    try:
        return _resolve(command, cwd, env)
    except OSError as error:
        raise InvalidArguments(
            f"{command[0]!r} in {cwd!r} cannot be run: {error.strerror}: give other paths"
        ) from error


def _resolve(command: tuple[str, ...], cwd: str, env: Mapping[str, str]) -> Program:
    if not Path(cwd).is_dir():
        what = "is not a folder" if Path(cwd).exists() else "does not exist"
        raise InvalidArguments(f"the folder {cwd!r} {what}: give cwd= another")
    if not os.access(cwd, os.X_OK):
        raise InvalidArguments(f"the folder {cwd!r} may not be entered: give cwd= one that may")
    name = command[0]
    if os.sep in name:
        found = str(Path(cwd) / name)
        if not Path(found).is_file():
            what = "is not a file" if Path(found).exists() else f"does not exist in {cwd!r}"
            raise InvalidArguments(f"the program {name!r} {what}: give its path")
        if not os.access(found, os.X_OK):
            raise InvalidArguments(
                f"the program {name!r} may not be executed: make it executable, or name its interpreter"
            )
    else:
        where = env.get("PATH", os.defpath)
        paths = os.pathsep.join(str(Path(cwd) / one) for one in where.split(os.pathsep))
        on_path = shutil.which(name, path=paths)
        if on_path is None:
            raise InvalidArguments(f"there is no program {name!r} in the PATH {where!r}: install it, or give its path")
        found = on_path
    return Program(found, command, cwd, env)
