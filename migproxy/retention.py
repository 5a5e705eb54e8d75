"""Ended migrations: kept for a while, so that people and Prometheus still see how they ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from migproxy.traffic import Progress

MOST = 200
"""Ended migrations kept at most, so that what is exported is bounded whatever the number of migrations."""
MOST_OF_ONE = 10
"""Those of one VMI: whoever may edit it can end as many as they like."""

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Ended:
    """What is left of a proxy that has ended.

    Attributes:
        report: What it last said of itself.
        progress: What it had done, in case its migration is served again.
    """

    report: dict[str, Any]
    progress: Progress


class Retention(Generic[K]):
    """Owns what ended migrations leave behind; the oldest go first.

    Attributes:
        seconds: How long each is kept.
        dropped: How many went before their time, because there were too many.

    Args:
        seconds: See above.
        owner: Of a key, whose number is bounded too: the VMI.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, seconds: float, owner: Callable[[K], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self.dropped = 0
        self._owner = owner
        self._clock = clock
        self._kept: dict[K, tuple[float, Ended]] = {}

    def add(self, key: K, ended: Ended) -> None:
        """Keeps what a proxy left."""
        self._kept.pop(key, None)
        self._kept[key] = self._clock(), ended
        self._expire()
        mine = [other for other in self._kept if self._owner(other) == self._owner(key)]
        surplus = mine[:-MOST_OF_ONE] or list(self._kept)[:-MOST]
        for other in surplus:
            del self._kept[other]
        self.dropped += len(surplus)

    def take(self, key: K) -> Ended | None:
        """Lets go of what a proxy left, because another one goes on in its place."""
        _, ended = self._kept.pop(key, (0.0, None))
        return ended

    def items(self) -> Iterator[tuple[K, Ended]]:
        """Everything that is kept, the oldest first."""
        self._expire()
        yield from [(key, ended) for key, (_, ended) in self._kept.items()]

    def _expire(self) -> None:
        horizon = self._clock() - self.seconds
        for key in [key for key, (at, _) in self._kept.items() if at < horizon]:
            del self._kept[key]
