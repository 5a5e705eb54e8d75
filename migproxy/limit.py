"""Lines of the log that others can provoke, as fast as they like."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

_LIMIT_SECONDS = 10.0
K = TypeVar("K")


class Limit(Generic[K]):
    """Keeps a kind of line that others can provoke from flooding the log: the first few are written, the rest counted.

    Args:
        summarize: Writes how many of a kind were left out, at the end of each ten seconds in which any were.
        first: How many of a kind are written in ten seconds.
    """

    def __init__(self, summarize: Callable[[K, int], None], first: int = 5) -> None:
        self._summarize = summarize
        self._first = first
        self._counts: dict[K, int] = {}

    def admits(self, kind: K) -> bool:
        """Counts one more of a kind; returns whether it is to be written. To be called where an event loop runs."""
        if kind not in self._counts:
            self._counts[kind] = 0
            asyncio.get_running_loop().call_later(_LIMIT_SECONDS, self._end, kind)
        self._counts[kind] += 1
        return self._counts[kind] <= self._first

    def close(self) -> None:
        """Writes now what is still to be told."""
        for kind in list(self._counts):
            self._end(kind)

    def _end(self, kind: K) -> None:
        surplus = self._counts.pop(kind, 0) - self._first
        if surplus > 0:
            self._summarize(kind, surplus)
