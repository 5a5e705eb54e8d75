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

    def __init__(self, ends: tuple[int, int] | None = None) -> None:
        self.reader, self.writer = ends or os.pipe2(os.O_CLOEXEC)
        for size in () if ends else PIPE_SIZES:
            with suppress(PermissionError):
                fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, size)
                break
        self.capacity: int = fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ)

    @classmethod
    def reopen(cls, end: int) -> Pipe:
        """Makes a pipe of one end of it, which it owns then; the other end is opened anew (proc(5), /proc/pid/fd).

        Raises:
            OSError: /proc is not mounted, or no descriptors are left; `end` stays open.
        """
        if is_writer(end):
            return cls((os.open(f"/proc/self/fd/{end}", os.O_RDONLY | os.O_CLOEXEC), end))
        return cls((end, os.open(f"/proc/self/fd/{end}", os.O_WRONLY | os.O_CLOEXEC)))

    @property
    def held(self) -> int:
        """Bytes that it holds."""
        return int.from_bytes(fcntl.ioctl(self.reader, termios.FIONREAD, bytes(4)), "little")

    def close(self) -> None:
        """Closes both ends; bytes still in the pipe are gone."""
        os.close(self.reader)
        os.close(self.writer)


def is_writer(end: int) -> bool:
    """Whether a pipe's end is the one to write to."""
    return fcntl.fcntl(end, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY


class Pump(ABC):
    """Moves the bytes of one direction until its end, and passes the end on.

    `run` blocks in the kernel and is meant for a thread of its own. An end of stream is passed on as what it is, a
    half-close: the other direction runs to its own end. An error shuts the receiving socket down, so that the pump of
    the other direction, which reads from it, delivers what had arrived before and then ends too.

    Attributes:
        mode: How the bytes move, for metrics: "spliced", "ktls" (spliced, and encrypted by the kernel), "user-space".
        spliced: Whether the bytes stay in the kernel.
        moved: Bytes delivered to `target` so far; written by the pump's thread alone, read by anyone.
        error: What ended the stream before its end; None while it runs and after a clean end.
        unmissed: Errors that are a clean end where the launcher has closed its end: nobody misses what may be missing.
    """

    __slots__ = ("error", "moved", "source", "target")
    mode = "user-space"
    spliced = False
    unmissed: tuple[type[OSError], ...] = ()

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.moved = 0
        self.error: OSError | None = None

    def run(self) -> None:
        """Pumps until the end of the stream or an error, which is left in `error`."""
        try:
            try:
                self._move()
            except self.unmissed:
                if not has_hung_up(self.target):
                    raise
            self._finish()
        except Exception as error:  # noqa: BLE001 - a defect of ours must not leave a connection that nobody moves
            self.error = error if isinstance(error, OSError) else OSError(errno.EIO, f"defect: {error!r}")
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

    def count_from(self, moved: int) -> None:
        """Sets what had been delivered before, by a pump that was killed."""
        self.moved = moved

    @property
    def pending(self) -> int:
        """Bytes that it has taken from `source` and not delivered yet."""
        return 0

    def close(self) -> None:  # noqa: B027 - a pump may have nothing to free
        """Frees what is the pump's own; the sockets belong to whoever made them."""


class Splice(Pump):
    """The pump whose bytes stay in the kernel.

    Attributes:
        pipe: Holds the bytes in flight. While the pump runs, nobody asks the kernel for their number: splice(2) keeps
            the pipe locked for as long as it waits for a socket.
    """

    __slots__ = ("_filled", "pipe")
    mode = "spliced"
    spliced = True

    def __init__(self, source: socket.socket, target: socket.socket, pipe: Pipe | None = None) -> None:
        super().__init__(source, target)
        self.pipe = pipe or Pipe()
        self._filled = self.pipe.held

    def count_from(self, moved: int) -> None:
        self._filled += moved - self.moved
        self.moved = moved

    @property
    def pending(self) -> int:
        return self._filled - self.moved

    def _move(self) -> None:
        source, target = self.source.fileno(), self.target.fileno()
        reader, writer, capacity = self.pipe.reader, self.pipe.writer, self.pipe.capacity
        held = self.pending
        while held or (held := self._fill(source, writer, capacity)):
            self._filled = self.moved + held
            while held:
                # No SPLICE_F_MORE: on the last bytes of a message it makes TCP wait up to 200 ms for more.
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
        resumable: Whether all that it is stands in the kernel: another process can go on with its descriptors.
    """

    label = "plaintext"
    resumable = True

    def __init__(self, tcp: socket.socket) -> None:
        self.tcp = tcp

    def sending(self, unix: socket.socket, pipe: Pipe | None = None) -> Pump:
        """Makes the pump of what the launcher sends; to be closed by the caller.

        Args:
            pipe: With what it held when its pump was killed; the pump owns it. Only where `resumable`.

        Raises:
            OSError: No descriptors are left.
        """
        return Splice(unix, self.tcp, pipe)

    def receiving(self, unix: socket.socket, pipe: Pipe | None = None) -> Pump:
        """Makes the pump of what the launcher receives; see `sending`."""
        return Splice(self.tcp, unix, pipe)


def ended_by_reset(source: socket.socket) -> bool:
    """Whether a reset is the end of what that socket has to give.

    A unix peer that closes with unread data of ours resets us, after all it wrote has been read (unix(7)): for
    this direction that is its end. A TCP peer's reset is a truncation.
    """
    return source.family == socket.AF_UNIX


def has_hung_up(launcher: socket.socket) -> bool:
    """Whether a launcher has closed its end of a unix socket, of which we have shut nothing down."""
    events = select.poll()
    events.register(launcher, 0)  # a hang-up is told in any case
    return bool(events.poll(0))


def shutdown(sock: socket.socket, how: int) -> None:
    """Shuts a socket down, one way or both, unless its peer was faster."""
    try:
        # Not sock.shutdown: an SSLSocket's own would take the session away from under the other direction.
        socket.socket.shutdown(sock, how)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the peer has ended the connection already
            raise
