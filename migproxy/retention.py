"""Ended migrations: kept for a while, so that people and Prometheus still see how they ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from migproxy.relay import Progress

MOST = 200
"""Ended migrations kept at most, so that what is exported is bounded whatever the number of migrations."""

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Ended:
    """What is left of a proxy that has ended.

    Attributes:
        report: What it last said of itself.
        progress: What it had done, in case its migration is served again.
        at: When it ended (`time.monotonic`).
    """

    report: dict[str, Any]
    progress: Progress
    at: float = field(default_factory=time.monotonic)


class Retention(Generic[K]):
    """Owns what ended migrations leave behind; the oldest go first.

    Attributes:
        seconds: How long each is kept.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._kept: dict[K, Ended] = {}

    def add(self, key: K, ended: Ended) -> None:
        """Keeps what a proxy left."""
        self._kept.pop(key, None)
        self._kept[key] = ended
        self._expire()

    def take(self, key: K) -> Ended | None:
        """Lets go of what a proxy left, because another one goes on in its place."""
        return self._kept.pop(key, None)

    def items(self) -> Iterator[tuple[K, Ended]]:
        """Everything that is kept, the oldest first."""
        self._expire()
        yield from list(self._kept.items())

    def _expire(self) -> None:
        horizon = time.monotonic() - self.seconds
        for key in [key for key, ended in self._kept.items() if ended.at < horizon]:
            del self._kept[key]
        while len(self._kept) > MOST:
            del self._kept[next(iter(self._kept))]
