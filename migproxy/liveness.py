"""Whether this process gets on: what a pump or a disk that hangs looks like, so that a watchdog may be told.

The event loop shows itself that it lives: whoever asks here runs in it.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from migproxy.splice import Pump, Splice

PUMP_SECONDS = 10.0
"""A pump that could move bytes all this time and moved none is wedged; on a machine whose CPUs are all busy, its turn
comes within a fraction of a second."""

DISK_SECONDS = 20.0
"""A disk that has not taken a few KiB by then hangs."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A running pump at one moment.

    Attributes:
        moved: Bytes that it has delivered so far.
        can_move: Whether its source, or its pipe, has data (or an end) for it, and its target takes data.
    """

    moved: int
    can_move: bool


def read(pump: Pump) -> Reading:
    """Looks at a running pump; does not wait.

    `moved` is read first: bytes that arrive and are delivered in between then only make it look busy for once.
    """
    moved = pump.tally.moved
    sources = [pump.source.fileno(), *([pump.pipe.reader] if isinstance(pump, Splice) else [])]
    poll = select.poll()
    for descriptor in sources:
        poll.register(descriptor, select.POLLIN)
    poll.register(pump.target.fileno(), select.POLLOUT)
    ready = dict(poll.poll(0))
    can_read = any(ready.get(descriptor, 0) & (select.POLLIN | select.POLLHUP) for descriptor in sources)
    return Reading(moved, can_read and bool(ready.get(pump.target.fileno(), 0) & select.POLLOUT))


class Stalls:
    """Remembers since when each pump has had something to do and done nothing; decides on plain values."""

    def __init__(self) -> None:
        self._since: dict[object, tuple[int, float]] = {}

    def note(self, readings: Mapping[object, Reading], now: float) -> set[object]:
        """Notes what all running pumps look like; to be called every few seconds.

        Args:
            readings: By pump; one that is missing has ended.
            now: Seconds, of a clock that only goes forward.

        Returns:
            The pumps that are wedged.
        """
        since = {}
        for pump, reading in readings.items():
            if reading.can_move:
                moved, first = self._since.get(pump, (reading.moved, now))
                since[pump] = (reading.moved, first if moved == reading.moved else now)
        self._since = since
        return {pump for pump, (_, first) in since.items() if now - first >= PUMP_SECONDS}


class Liveness:
    """What of this process hangs.

    Attributes:
        problems: What hangs now, for people; empty while all is well.

    Args:
        clock: Seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.problems: list[str] = []
        self._writes: dict[object, tuple[str, float]] = {}

    @contextmanager
    def writing(self, path: str) -> Iterator[None]:
        """Within it a thread writes to that file; on a disk that hangs it does not return."""
        token = object()
        self._writes[token] = (path, self._clock())
        try:
            yield
        finally:
            del self._writes[token]

    def check(self) -> list[str]:
        """Looks at everything, and returns the problems; to be called every few seconds, by the event loop."""
        now = self._clock()
        self.problems = [
            f"the disk hangs: {path} is not written after {DISK_SECONDS:.0f} s"
            for path, begun in list(self._writes.values())
            if now - begun >= DISK_SECONDS
        ]
        return self.problems
