"""What processes use, read from /proc and from their CPU clocks while they run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What processes, their threads and their children have used.

    Attributes:
        cpu: Seconds of CPU time, user and kernel, of ended threads and children too.
        switches: Context switches of the threads that exist now.
        rss: Bytes resident now.
        threads, files: Threads, and open descriptors.
    """

    cpu: float = 0.0
    switches: int = 0
    rss: int = 0
    threads: int = 0
    files: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu + other.cpu,
            self.switches + other.switches,
            self.rss + other.rss,
            self.threads + other.threads,
            self.files + other.files,
        )


def usage(pids: Iterable[int]) -> Usage:
    """Adds up what processes and their children use."""
    return sum((_usage(pid) for top in pids for pid in _family(top)), Usage())


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _usage(pid: int) -> Usage:
    folder = _PROC / str(pid)
    with suppress(OSError):  # it has ended meanwhile: what it used is its parent's, who waits for it
        # A process's CPU clock has nanoseconds, its stat file hundredths of a second (clock_getcpuclockid(3)).
        cpu = time.clock_gettime(~pid << 3 | 2)
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[13]) + int(fields[14])) / _TICKS  # of children that were waited for (proc(5))
        rss = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        switches = threads = 0
        for task in (folder / "task").iterdir():
            with suppress(OSError):
                switches += sum(
                    int(line.split()[1])
                    for line in (task / "status").read_text().splitlines()
                    if "ctxt_switches" in line
                )
                threads += 1
        return Usage(cpu, switches, rss, threads, len(os.listdir(folder / "fd")))
    return Usage()
