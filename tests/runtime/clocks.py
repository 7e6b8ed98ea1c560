"""A wall clock for the package that a test can set: `time.time` as its modules see it, hours ahead or behind."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Wall"]


class Wall:
    """The wall clock of every module of the package, from `hang` to `take_down`; the monotonic clock goes on as it is."""

    def __init__(self) -> None:
        self.hours = 0.0
        self._modules: list[Any] = []

    def time(self) -> float:
        """Return the seconds since the epoch."""
        return time.time() + self.hours * 3600

    def time_ns(self) -> int:
        """Return the nanoseconds since the epoch."""
        return time.time_ns() + int(self.hours * 3600) * 10**9

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def hang(self) -> None:
        """Put this clock where the package looks."""
        found = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "lash_store"]
        self._modules = [module for module in found if vars(module).get("time") is time]
        for module in self._modules:
            module.time = self

    def take_down(self) -> None:
        """Give the package its own clock back."""
        for module in self._modules:
            module.time = time
        self._modules = []
