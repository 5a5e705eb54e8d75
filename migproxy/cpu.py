"""How busy the relay is: the CPU time of its threads, and of its workers'."""

from __future__ import annotations

import os
from contextlib import suppress


class BusiestThread:
    """Follows the thread of a process, or of its children, that runs or waits for a CPU the most.

    Attributes:
        seconds: What the busiest thread used in each time between two looks, added up.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._used: dict[str, float] = {}

    def look(self, pid: int | None) -> None:
        """Looks at all threads now.

        Args:
            pid: The process; None while there is none.
        """
        used = dict(_used(pid)) if pid else {}
        if self._used:
            self.seconds += max(
                (seconds - self._used.get(thread, seconds) for thread, seconds in used.items()), default=0
            )
        self._used = used


def _used(pid: int) -> list[tuple[str, float]]:
    """Seconds that each thread has run, or has waited for a CPU (Documentation/scheduler/sched-stats.rst)."""
    found = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError, ValueError):
                running, waiting, _ = _read(f"/proc/{pid}/task/{thread}/schedstat").split()
                found.append((thread, (int(running) + int(waiting)) / 1e9))
        for child in _read(f"/proc/{pid}/task/{pid}/children").split():  # the main thread starts the workers
            found += _used(int(child))
    return found


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)
