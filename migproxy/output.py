"""The standard descriptors of every process of ours: none is missing, and nobody waits to write a line of the log.

Standard error may be closed, full, gone, or read by nobody: a full disk, a log driver that hangs, a stopped terminal.
A write(2) there fails or never returns, and cannot be made not to wait without changing the descriptor for every
process that shares it. So a thread writes, and whoever has a line goes on at once.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

STDOUT, STDERR = 1, 2
_MOST_BYTES = 1 << 18  # that wait to be written; what comes then is lost
_LAST_SECONDS = 0.5  # that the last lines of a process have

Write = Callable[[bytes], None]
"""Writes a line, and may take as long as it likes; raises OSError where it cannot."""


class OutputError(Exception):
    """What a command has to say cannot be written to standard output; says why."""


class Lines:
    """Writes lines in a thread of its own; those that cannot be written are lost, and counted.

    Attributes:
        write: How; whoever sets another one sets it for the lines from then on.
        describe_loss: Makes the line that tells how many were lost, once lines can be written again.
        lost: How many were, since the process began.
        problem: Why the last one was; None once one has been written again.
    """

    def __init__(self, write: Write, describe_loss: Callable[[int], bytes]) -> None:
        self.write, self.describe_loss = write, describe_loss
        self.lost = 0
        self.problem: str | None = None
        self._waiting: deque[tuple[Write, bytes]] = deque()
        self._size = self._untold = 0
        self._has_thread = self._is_writing = False
        self._changed = threading.Condition()

    def put(self, line: bytes) -> None:
        """Takes a line to write, and does not wait; from any thread.

        Args:
            line: With its end.
        """
        with self._changed:
            if self._waiting and self._size + len(line) > _MOST_BYTES:
                self._lose("it is not read")
                return
            if not self._has_thread:
                try:
                    threading.Thread(target=self._run, name="log", daemon=True).start()
                except RuntimeError as error:  # there are no more threads
                    self._lose(str(error))
                    return
                self._has_thread = True
            self._waiting.append((self.write, line))
            self._size += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all lines are written, or lost; half a second at most."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing), _LAST_SECONDS)

    def _lose(self, why: str) -> None:
        self.lost += 1
        self._untold += 1
        self.problem = why

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                (write, line), self._is_writing = self._waiting.popleft(), True
                self._size -= len(line)
            problem = _attempt(write, line)
            with self._changed:
                self.problem = None
                if problem:
                    self._lose(problem)
                untold = 0 if problem or self._waiting else self._untold
            is_told = untold > 0 and _attempt(self.write, self.describe_loss(untold)) is None
            with self._changed:
                if is_told:
                    self._untold -= untold
                self._is_writing = False
                self._changed.notify_all()


def _attempt(write: Write, line: bytes) -> str | None:
    try:
        write(line)
    except OSError as error:
        return error.strerror or str(error)
    return None


class Descriptor:
    """Writes whole lines to a descriptor; one that was cut off gets its end, once there is room again.

    Args:
        fd: Stays open.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_cut = False

    def __call__(self, line: bytes) -> None:
        """Writes a line; see `Write`."""
        whole = memoryview(b"\n" + line if self._is_cut else line)
        rest = whole
        try:
            while rest:
                # At once, so that a SIGKILL leaves no line without its end: the next daemon's would follow on it.
                rest = rest[self._write(rest) :]
        finally:
            self._is_cut = len(rest) > 0 and (self._is_cut or len(rest) < len(whole))

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:  # somebody who shares the descriptor does not want to wait
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            poll.poll()
            return 0


def to_stderr() -> Write:
    """What writes to standard error; where that was closed at the start, what refuses each line (EBADF)."""
    return Descriptor(STDERR) if sys.__stderr__ else _refuse


def _refuse(_: bytes) -> None:
    raise OSError(errno.EBADF, "it is closed")


def _describe_loss(lines: int) -> bytes:
    return f"migproxy: {lines} lines were lost\n".encode()


lines = Lines(to_stderr(), _describe_loss)
"""Those of this process."""


def begin() -> None:
    """Makes sure of the standard descriptors; for the first moment of a process.

    One that is closed becomes /dev/null: the next file or socket would have its number otherwise, and get what is
    printed. Whatever is printed to sys.stderr, tracebacks and warnings too, goes by way of `lines`.
    """
    for fd in (0, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stderr = _Printed()
    atexit.register(lines.flush)


class _Printed(io.TextIOBase):
    """Stands for sys.stderr."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            lines.put(f"{line}\n".encode(errors="backslashreplace"))
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(STDERR)

    def fileno(self) -> int:
        return STDERR


class _Stdout(io.FileIO):
    """Standard output, whose error is no other error: it is raised once, and what comes then is lost."""

    def __init__(self) -> None:
        super().__init__(STDOUT, "w", closefd=False)
        self._has_failed = False

    def write(self, data: Any) -> int:
        if self._has_failed:
            return len(data)
        try:
            if sys.__stdout__ is None:
                raise OSError(errno.EBADF, "it is closed")
            return super().write(data) or 0
        except OSError as error:
            self._has_failed = True
            raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def open_stdout() -> io.TextIOWrapper:
    """Standard output for a command.

    Raises:
        OutputError: By its writes, and its flush: it is full, closed, or gone.
    """
    usual = sys.__stdout__
    return io.TextIOWrapper(
        io.BufferedWriter(_Stdout()),
        encoding=usual.encoding if usual else "utf-8",
        errors=usual.errors if usual else None,
        line_buffering=os.isatty(STDOUT),
    )
