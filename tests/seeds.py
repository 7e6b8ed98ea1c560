"""Where the quick cuts draw their chances from: the same seed for everybody, so that what passed passes again."""

from __future__ import annotations

import os

__all__ = ["seed_of"]


def seed_of(variable: str) -> int:
    """The seed that an environment variable names, else always the same; the campaigns are what draws new ones."""
    return int(os.environ.get(variable) or 8)
