"""The standard descriptors of every process of ours: none is missing, and nobody waits to write a line of the log.

Standard error may be closed, full, gone, or read by nobody: a full disk, a log driver that hangs, a stopped terminal.
A write(2) there fails or never returns, and cannot be made not to wait without changing the descriptor for every
process that shares it. So a thread writes, and whoever has a line goes on at once.
"""

from __future__ import annotations

import atexit
import errno
import io
import json
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

STDOUT, STDERR = 1, 2
_MOST_BYTES = 1 << 21  # that wait to be written, some ten thousand lines; what comes then is lost
_AT_ONCE = 4096  # bytes: what several processes write to one pipe is not mixed up to here (pipe(7), PIPE_BUF)
_LAST_SECONDS = 0.5  # that the last lines of a process have

Write = Callable[[Sequence[bytes]], None]
"""Writes lines, and may take as long as it likes; raises OSError where it cannot, or not all of them."""


class OutputError(Exception):
    """What a command has to say cannot be written to standard output; says why."""


class Lines:
    """Writes lines in a thread of its own; those that cannot be written are lost, and counted.

    Attributes:
        write: How, unless `put` is told another way; whoever sets another one sets it for the lines from then on.
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

    def put(self, line: bytes, write: Write | None = None) -> None:
        """Takes a line to write, and does not wait; from any thread.

        Args:
            line: With its end.
            write: How; None for `write`.
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
            self._waiting.append((write or self.write, line))
            self._size += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all lines are written, or lost; half a second at most."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing), _LAST_SECONDS)

    def _lose(self, why: str, lines: int = 1) -> None:
        self.lost += lines
        self._untold += lines
        self.problem = why

    def _take(self) -> tuple[Write, list[bytes]]:
        """The next lines: as many as are written at once, since each write may wait for its turn."""
        write, line = self._waiting.popleft()
        several, size = [line], len(line)
        while self._waiting and self._waiting[0][0] == write:
            size += len(self._waiting[0][1])
            if size > _AT_ONCE:
                break
            several.append(self._waiting.popleft()[1])
        self._size -= sum(map(len, several))
        return write, several

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                write, several = self._take()
                self._is_writing = True
            problem = _attempt(write, several)
            with self._changed:
                self.problem = None
                if problem:
                    self._lose(problem, len(several))
                untold = 0 if problem or self._waiting else self._untold
            is_told = untold > 0 and _attempt(self.write, [self.describe_loss(untold)]) is None
            with self._changed:
                if is_told:
                    self._untold -= untold
                self._is_writing = False
                self._changed.notify_all()


def _attempt(write: Write, several: Sequence[bytes]) -> str | None:
    try:
        write(several)
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

    def __call__(self, several: Sequence[bytes]) -> None:
        """Writes lines; see `Write`."""
        whole = memoryview(b"\n" * self._is_cut + b"".join(several))
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
            _wait_for_room(self._fd)
            return 0


def _wait_for_room(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def to_stderr() -> Write:
    """What writes to standard error; where that was closed at the start, what refuses each line (EBADF)."""
    return Descriptor(STDERR) if _has_stderr else _refuse


def _refuse(_: Sequence[bytes]) -> None:
    raise OSError(errno.EBADF, "it is closed")


def _describe_loss(lost: int) -> bytes:
    return f"migproxy: {lost} lines were lost\n".encode()


def as_json(level: str, event: str, **fields: object) -> bytes:
    """A line as the daemon's log has them, for a relay and its workers, which have no structlog.

    Args:
        level: How severe it is.
        event: What happened, always in the same words.
        fields: What there is to say besides.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {**fields, "event": event, "level": level, "process": "relay", "timestamp": now}
    return f"{json.dumps(line)}\n".encode()


def describe_loss_as_json(lost: int) -> bytes:
    """See `Lines.describe_loss`."""
    return as_json("warning", "log lines were lost", lines=lost)


_has_stderr = sys.stderr is not None
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
    sys.stderr = vars(sys)["__stderr__"] = _Printed()  # which Python itself uses at its end
    atexit.register(lines.flush)


class _Printed(io.TextIOBase):
    """Stands for sys.stderr."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""
        self._write = to_stderr()  # the log's lines may go elsewhere, in a form of their own

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            lines.put(f"{line}\n".encode(errors="backslashreplace"), self._write)
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
            while (count := super().write(data)) is None:  # somebody who shares it does not want to wait
                _wait_for_room(STDOUT)
            return count
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
