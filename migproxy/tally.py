"""What the pumps of a connection count, in memory that more than one process has mapped.

The thread of a pump alone writes what belongs to its direction, a word at a time; anybody reads it at no cost. The
memory outlives whoever writes it, so that the next pump goes on counting, to the byte.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from typing import Final

MOVED: Final = 0
FILLED: Final = 1
END: Final = 2
PREFACE: Final = 3
_WORDS: Final = 4
_BYTES: Final = 2 * _WORDS * 8
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

RUNNING: Final = 0
CLEAN: Final = 1
BROKEN: Final = 2


class Tally:
    """What one direction of a connection has carried.

    Args:
        words: Where it is kept; without, in memory of this process alone.
    """

    __slots__ = ("words",)

    def __init__(self, words: memoryview | None = None) -> None:
        self.words = memoryview(bytearray(_WORDS * 8)).cast("Q") if words is None else words

    @property
    def moved(self) -> int:
        """Bytes that were delivered."""
        return int(self.words[MOVED])

    @moved.setter
    def moved(self, value: int) -> None:
        self.words[MOVED] = value

    @property
    def carried(self) -> int:
        """Bytes that were delivered, without the preface: what the peer was told before the first of them."""
        return max(0, int(self.words[MOVED]) - int(self.words[PREFACE]))

    @property
    def end(self) -> int:
        """RUNNING, CLEAN, or BROKEN and the error's number added to it."""
        return int(self.words[END])

    @end.setter
    def end(self, value: int) -> None:
        self.words[END] = value

    def recover(self, held: int) -> None:
        """Corrects what a pump counted that was killed: at most its last step is missing.

        A pump fills its pipe only when that is empty, and counts each step right after it. If it had counted more as
        filled than as moved, it was emptying the pipe; else it may have filled it.

        Args:
            held: Bytes that are in its pipe now.

        Raises:
            ValueError: No pump has counted that.
        """
        if self.words[FILLED] > self.words[MOVED]:
            self.words[MOVED] = self.words[FILLED] - held
        else:
            self.words[FILLED] = self.words[MOVED] + held


class Tallies:
    """Both directions of a connection, in a memfd; owns its descriptor.

    Attributes:
        fd: The descriptor, for another process.
        to_network, to_launcher: What each direction has carried.

    Args:
        fd: One that another process made; None to make one.

    Raises:
        OSError: No descriptors are left.
        ValueError: `fd` is not what this class makes: it could end this process (SIGBUS, mmap(2)).
    """

    __slots__ = ("_memory", "fd", "to_launcher", "to_network")

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            self.fd = os.memfd_create("migproxy-tallies", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, _BYTES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        else:
            _check(fd)
            self.fd = fd
        self._memory = mmap.mmap(self.fd, _BYTES)
        with memoryview(self._memory) as octets, octets.cast("Q") as words:
            self.to_network, self.to_launcher = Tally(words[:_WORDS]), Tally(words[_WORDS:])

    def close(self) -> None:
        """Lets go of the memory, which has a descriptor of its own (mmap(3)); what was counted can still be read here.

        No pump counts in it any more.
        """
        for tally in (self.to_network, self.to_launcher):
            shared, tally.words = tally.words, memoryview(bytearray(tally.words)).cast("Q")
            shared.release()
        self._memory.close()
        os.close(self.fd)


def _check(fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != _BYTES:
        raise ValueError("no memory for tallies: not a file of the right size")
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed:
        raise ValueError("no memory for tallies: its size can change")
