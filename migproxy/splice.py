"""Bytes through the kernel: one direction of a connection, moved by splice(2) and never copied to user space.

A socket cannot be spliced to a socket, only to a pipe and from a pipe (splice(2)). The pipe between the two
sockets of a direction is where bytes in flight are held; its capacity is what one call can move.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress

PIPE_SIZES = (1 << 20, 1 << 19, 1 << 18)
"""Capacities asked for, in bytes, best first: the kernel's default of 64 KiB costs a third of the throughput.

More than /proc/sys/fs/pipe-max-size, or than /proc/sys/fs/pipe-user-pages-soft allows for all pipes of an
unprivileged user, is refused with EPERM (pipe(7)); then the next smaller one is asked for.
"""


class Pipe:
    """A pipe as large as the kernel allows; owns its two descriptors.

    Attributes:
        reader: The descriptor to splice from.
        writer: The descriptor to splice to.
        capacity: Bytes that it can hold.
    """

    __slots__ = ("capacity", "reader", "writer")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        for size in PIPE_SIZES:
            with suppress(PermissionError):
                fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, size)
                break
        self.capacity: int = fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        """Closes both ends; bytes still in the pipe are gone."""
        os.close(self.reader)
        os.close(self.writer)


class Pump:
    """Moves the bytes of one direction until its end, and passes the end on.

    `run` blocks in the kernel and is meant for a thread of its own. An end of stream is passed on as what it is, a
    half-close: the other direction runs to its own end. An error shuts the receiving socket down in both
    directions, so that the pump of the other direction, which reads from it, delivers what had arrived before
    and then ends too.

    Attributes:
        mode: How the bytes move, for metrics.
        moved: Bytes delivered to `target` so far; written by the pump's thread alone, read by anyone.
        error: What ended the stream before its end; None while it runs and after a clean end.
    """

    __slots__ = ("error", "moved", "pipe", "source", "target")
    mode = "spliced"

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.pipe = Pipe()
        self.moved = 0
        self.error: OSError | None = None

    def run(self) -> None:
        """Pumps until the end of the stream or an error, which is left in `error`."""
        try:
            self._splice()
        except OSError as error:
            self.error = error
            _shutdown(self.target, socket.SHUT_RDWR)
            _shutdown(self.source, socket.SHUT_RD)
        else:
            _shutdown(self.target, socket.SHUT_WR)

    def _splice(self) -> None:
        source, target = self.source.fileno(), self.target.fileno()
        reader, writer, capacity = self.pipe.reader, self.pipe.writer, self.pipe.capacity
        # No SPLICE_F_MORE: on the last bytes of a message it makes TCP wait up to 200 ms for more.
        while held := self._fill(source, writer, capacity):
            while held:
                sent = os.splice(reader, target, held)
                held -= sent
                self.moved += sent

    def _fill(self, source: int, writer: int, capacity: int) -> int:
        try:
            return os.splice(source, writer, capacity)
        except ConnectionResetError:
            # A unix peer that closes with unread data of ours resets us, after all it wrote has been read
            # (unix(7)): for this direction that is its end. A TCP peer's reset is a truncation.
            if self.source.family == socket.AF_UNIX:
                return 0
            raise

    def close(self) -> None:
        """Closes the pipe; the sockets belong to whoever made them."""
        self.pipe.close()


def _shutdown(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the peer has ended the connection already
            raise
