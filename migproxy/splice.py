"""Bytes through the kernel: one direction of a connection, moved by splice(2) and never copied to user space.

A socket cannot be spliced to a socket, only to a pipe and from a pipe (splice(2)). The pipe between the two
sockets of a direction is where bytes in flight are held; its capacity is what one call can move.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from abc import ABC, abstractmethod
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


class Pump(ABC):
    """Moves the bytes of one direction until its end, and passes the end on.

    `run` blocks in the kernel and is meant for a thread of its own. An end of stream is passed on as what it is, a
    half-close: the other direction runs to its own end. An error shuts the receiving socket down in both
    directions, so that the pump of the other direction, which reads from it, delivers what had arrived before
    and then ends too.

    Attributes:
        mode: How the bytes move, for metrics: "spliced", "ktls" (spliced, and encrypted by the kernel), "user-space".
        spliced: Whether the bytes stay in the kernel.
        moved: Bytes delivered to `target` so far; written by the pump's thread alone, read by anyone.
        error: What ended the stream before its end; None while it runs and after a clean end.
    """

    __slots__ = ("error", "moved", "source", "target")
    mode = "user-space"
    spliced = False

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.moved = 0
        self.error: OSError | None = None

    def run(self) -> None:
        """Pumps until the end of the stream or an error, which is left in `error`."""
        try:
            self._move()
        except OSError as error:
            self.error = error
            shutdown(self.target, socket.SHUT_RDWR)
            shutdown(self.source, socket.SHUT_RD)
        else:
            self._finish()

    @abstractmethod
    def _move(self) -> None:
        """Moves everything up to the end of the stream; raises OSError for any other end."""

    def _finish(self) -> None:
        """Tells the target of the end; does not raise."""
        shutdown(self.target, socket.SHUT_WR)

    def close(self) -> None:  # noqa: B027 - a pump may have nothing to free
        """Frees what is the pump's own; the sockets belong to whoever made them."""


class Splice(Pump):
    """The pump whose bytes stay in the kernel.

    Attributes:
        pipe: Holds the bytes in flight.
    """

    __slots__ = ("pipe",)
    mode = "spliced"
    spliced = True

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        super().__init__(source, target)
        self.pipe = Pipe()

    def _move(self) -> None:
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
            if ended_by_reset(self.source):
                return 0
            raise

    def close(self) -> None:
        self.pipe.close()


class Transport:
    """A connection between the two nodes, and how its bytes are moved: this one as they are.

    Attributes:
        tcp: The connected socket; whoever has the transport owns it.
        label: What protects the connection, for people.
    """

    label = "plaintext"

    def __init__(self, tcp: socket.socket) -> None:
        self.tcp = tcp

    def sending(self, unix: socket.socket) -> Pump:
        """Makes the pump of what the launcher sends; to be closed by the caller.

        Raises:
            OSError: No descriptors are left.
        """
        return Splice(unix, self.tcp)

    def receiving(self, unix: socket.socket) -> Pump:
        """Makes the pump of what the launcher receives; see `sending`."""
        return Splice(self.tcp, unix)


def ended_by_reset(source: socket.socket) -> bool:
    """Whether a reset is the end of what that socket has to give.

    A unix peer that closes with unread data of ours resets us, after all it wrote has been read (unix(7)): for
    this direction that is its end. A TCP peer's reset is a truncation.
    """
    return source.family == socket.AF_UNIX


def shutdown(sock: socket.socket, how: int) -> None:
    """Shuts a socket down, one way or both, unless its peer was faster."""
    try:
        # Not sock.shutdown: an SSLSocket's own would take the session away from under the other direction.
        socket.socket.shutdown(sock, how)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the peer has ended the connection already
            raise
