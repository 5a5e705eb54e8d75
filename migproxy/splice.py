"""Bytes through the kernel: one direction of a connection, moved by splice(2) and never copied to user space.

A socket cannot be spliced to a socket, only to a pipe and from a pipe (splice(2)). The pipe between the two
sockets of a direction is where bytes in flight are held; its capacity is what one call can move.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import termios
from abc import ABC, abstractmethod
from contextlib import suppress

from migproxy import tcpinfo
from migproxy.tally import BROKEN, CLEAN, FILLED, MOVED, Tally
from migproxy.tlserrors import Truncated

PIPE_SIZES = (1 << 20, 1 << 19, 1 << 18)
"""Capacities asked for, in bytes, best first: the kernel's default of 64 KiB costs a third of the throughput.

More than /proc/sys/fs/pipe-max-size, or than /proc/sys/fs/pipe-user-pages-soft allows for all pipes of an
unprivileged user, is refused with EPERM (pipe(7)); then the next smaller one is asked for.
"""


class Pipe:
    """A pipe as large as the kernel allows; owns its two descriptors.

    While a pump runs, ask for nothing but the ends: splice(2) keeps the pipe locked for as long as it waits for a
    socket, and fcntl(2) and ioctl(2) wait for that lock.

    Attributes:
        reader: The descriptor to splice from.
        writer: The descriptor to splice to.

    Args:
        ends: Reader and writer of one that exists; None to make one.

    Raises:
        OSError: No descriptors are left.
    """

    __slots__ = ("reader", "writer")

    def __init__(self, ends: tuple[int, int] | None = None) -> None:
        self.reader, self.writer = ends or os.pipe2(os.O_CLOEXEC)
        for size in () if ends else PIPE_SIZES:
            with suppress(PermissionError):
                fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, size)
                break

    @property
    def capacity(self) -> int:
        """Bytes that it can hold."""
        return fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ)

    @property
    def ends(self) -> tuple[int, int]:
        """Reader and writer."""
        return self.reader, self.writer

    @property
    def held(self) -> int:
        """Bytes that it holds."""
        return int.from_bytes(fcntl.ioctl(self.reader, termios.FIONREAD, bytes(4)), "little")

    def close(self) -> None:
        """Closes both ends; bytes still in the pipe are gone."""
        os.close(self.reader)
        os.close(self.writer)


class Pump(ABC):
    """Moves the bytes of one direction until its end, and passes the end on.

    `run` blocks in the kernel and is meant for a thread of its own. An end of stream is passed on as what it is, a
    half-close: the other direction runs to its own end. An error shuts the receiving socket down, so that the pump of
    the other direction, which reads from it, delivers what had arrived before and then ends too.

    Attributes:
        error: What ended the stream before its end; None while it runs and after a clean end.

    Args:
        tally: Where it counts; written by the pump's thread alone, read by anyone.
    """

    __slots__ = ("error", "source", "tally", "target")

    def __init__(self, source: socket.socket, target: socket.socket, tally: Tally) -> None:
        self.source = source
        self.target = target
        self.tally = tally
        self.error: OSError | None = None

    def run(self) -> None:
        """Pumps until the end of the stream or an error, which is left in `error`."""
        try:
            if self.tally.end >= BROKEN:  # an earlier pump found it, and was killed before it could tell
                number = self.tally.end - BROKEN or errno.EIO
                raise OSError(number, os.strerror(number))
            self._move()
            self._finish()
            self.tally.end = CLEAN
        except Exception as error:  # noqa: BLE001 - a defect of ours must not leave a connection that nobody moves
            self.error = error if isinstance(error, OSError) else OSError(errno.EIO, f"defect: {error!r}")
            self.tally.end = BROKEN + (self.error.errno or 0)
            # Nothing is sent to the network: an end of stream would pass for a complete one.
            with suppress(OSError):
                shutdown(self.target, socket.SHUT_RDWR if self.target.family == socket.AF_UNIX else socket.SHUT_RD)
            with suppress(OSError):
                shutdown(self.source, socket.SHUT_RD)

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

    It goes on where another one was killed, to the byte: see `Tally.recover`.

    Attributes:
        pipe: Holds the bytes in flight; the pump owns it.
    """

    __slots__ = ("pipe",)

    def __init__(self, source: socket.socket, target: socket.socket, tally: Tally, pipe: Pipe) -> None:
        super().__init__(source, target, tally)
        self.pipe = pipe
        tally.recover(pipe.held)

    def _move(self) -> None:
        source, target, tally = self.source.fileno(), self.target.fileno(), self.tally.words
        reader, writer, capacity = self.pipe.reader, self.pipe.writer, self.pipe.capacity
        moved = tally[MOVED]
        held = tally[FILLED] - moved
        while held or (held := self._fill(source, writer, capacity)):
            tally[FILLED] = moved + held
            while held:
                # No SPLICE_F_MORE: on the last bytes of a message it makes TCP wait up to 200 ms for more.
                sent = os.splice(reader, target, held)
                held -= sent
                moved += sent
                tally[MOVED] = moved

    def _fill(self, source: int, writer: int, capacity: int) -> int:
        try:
            return os.splice(source, writer, capacity)
        except ConnectionResetError:
            if ended_by_reset(self.source):
                return 0
            raise

    def close(self) -> None:
        self.pipe.close()


def ended_by_reset(source: socket.socket) -> bool:
    """Whether a reset is the end of what that socket has to give.

    A unix peer that closes with unread data of ours resets us, after all it wrote has been read (unix(7)): for
    this direction that is its end. A TCP peer's reset is a truncation.
    """
    return source.family == socket.AF_UNIX


def has_hung_up(unix: socket.socket) -> bool:
    """Whether the peer has closed its end of a unix socket, of which we have shut nothing down."""
    events = select.poll()
    events.register(unix, 0)  # a hang-up is told in any case
    return bool(events.poll(0))


def is_unmissed(error: OSError, unix: socket.socket, tcp: socket.socket) -> bool:
    """Whether a TLS stream that ended without the peer's word has ended cleanly: nobody is left to miss anything.

    KubeVirt's source ends so after the target's launcher has closed: its garbage collector closes the connection, in a
    second or in minutes. That is an end of stream, or a reset where something was left unread, as our close_notify. A
    reset while something of the launcher's is still to be sent is a loss.
    """
    is_end = isinstance(error, Truncated) or (isinstance(error, ConnectionResetError) and not tcpinfo.never_sent(tcp))
    return is_end and has_hung_up(unix)


def shutdown(sock: socket.socket, how: int) -> None:
    """Shuts a socket down, one way or both, unless its peer was faster."""
    try:
        sock.shutdown(how)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the peer has ended the connection already
            raise
