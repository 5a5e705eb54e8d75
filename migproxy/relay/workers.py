"""The relay's TLS workers: connections are given to the one that has fewest, and one that dies is replaced."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from migproxy.fds import close_all, duplicate, post
from migproxy.relay.protocol import MOST_BYTES, Drop, Ended, FromDaemon, Move, ProtocolError, Sync, encode, for_daemon

_START_SECONDS = 60.0  # until its first answer: a process is made, and libraries are read
_HANG_SECONDS = 10.0  # without an answer; on a machine whose CPUs are all busy, its turn comes far sooner


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker.

    Attributes:
        names: What it moves.
        asked: Since when it owes an answer, None where it owes none.
        has_begun: It has given one.
        is_late: It owed one for too long at the last look.
        unsent: Messages that it has not taken yet, with descriptors of ours.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    names: set[str] = field(default_factory=set)
    asked: float | None = None
    has_begun: bool = False
    is_late: bool = False
    unsent: deque[tuple[bytes, tuple[int, ...]]] = field(default_factory=deque)

    def say(self, message: FromDaemon, fds: Sequence[int] = ()) -> None:
        """Sends a message, as soon as it is taken.

        Raises:
            OSError: The worker is dead, or no descriptors are left.
        """
        if not self.unsent:
            with suppress(BlockingIOError):
                post(self.control, encode(message), fds)
                return
        self.unsent.append((encode(message), duplicate(fds)))  # the owner may close its own before they are sent

    def flush(self) -> None:
        """Sends what it takes now; raises OSError where it is dead."""
        with suppress(BlockingIOError):
            while self.unsent:
                packet, fds = self.unsent[0]
                post(self.control, packet, fds)
                self.unsent.popleft()
                close_all(fds)


class Workers:
    """Owns the workers, of which there are none until one is needed.

    Args:
        selector: Tells when one says something; see `hear`.
        on_end: Is called with each connection's end.
        on_death: Is called with each worker's, in words.
    """

    def __init__(
        self, selector: selectors.BaseSelector, on_end: Callable[[Ended], None], on_death: Callable[[str], None]
    ) -> None:
        self._selector, self._on_end, self._on_death = selector, on_end, on_death
        self._workers: list[_Worker] = []

    def move(self, move: Move, fds: Sequence[int]) -> None:
        """Has a connection moved; the descriptors stay the caller's.

        Raises:
            OSError: It cannot be.
        """
        worker = self._idlest()
        try:
            worker.say(move, fds)
        except (BrokenPipeError, ConnectionResetError):  # it has died, and nobody has heard of it yet
            self._bury(worker, "died")
            worker = self._idlest()
            worker.say(move, fds)
        worker.names.add(move.name)

    def _idlest(self) -> _Worker:
        worker = min(self._workers, key=lambda one: len(one.names), default=None)
        most = max(1, len(os.sched_getaffinity(0)) // 2)  # the other half is QEMU's
        if worker is None or (worker.names and len(self._workers) < most):
            return self._start()
        return worker

    def drop(self, name: str) -> None:
        """Has a connection broken off; its end is told."""
        for worker in self._workers:
            if name in worker.names:
                self._try(worker, worker.say, Drop((name,)))
                return

    def look(self) -> None:
        """Ends those that hang, and asks the others for a sign of life."""
        now = time.monotonic()
        for worker in [*self._workers]:
            if worker.asked is None:
                worker.asked = now
                self._try(worker, worker.say, Sync(0))
            elif now - worker.asked >= (_HANG_SECONDS if worker.has_begun else _START_SECONDS):
                if worker.is_late:  # not the first time: this process may have been stopped, too
                    self._bury(worker, "hung")
                worker.is_late = True

    @property
    def is_behind(self) -> bool:
        """Whether something waits for a worker to take it: see `flush`."""
        return any(worker.unsent for worker in self._workers)

    def flush(self) -> None:
        """Sends what workers take now."""
        for worker in [*self._workers]:
            self._try(worker, worker.flush)

    def _try(self, worker: _Worker, call: Callable[..., None], *arguments: FromDaemon) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self._bury(worker, f"died ({error.strerror})")

    def hear(self, fileobj: object) -> bool:
        """Hears what a worker says, if that is one's; returns whether it is."""
        for worker in self._workers:
            if worker.control is fileobj:
                while worker in self._workers and self._hear(worker):
                    pass
                return True
        return False

    def _hear(self, worker: _Worker) -> bool:
        """Takes a message, if there is one; returns whether there may be another."""
        try:
            packet = worker.control.recv(MOST_BYTES, socket.MSG_DONTWAIT)
            message = for_daemon(packet, 0) if packet else None
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # which is told before the last words of who died with something unread
        except ProtocolError as error:
            self._bury(worker, f"said what is not understood: {error}")
            return False
        if message is None:
            self._bury(worker, "died")
        elif isinstance(message, Ended):
            if message.name in worker.names:
                self._note_end(worker, message)
        else:
            worker.asked, worker.has_begun, worker.is_late = None, True, False
        return True

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "migproxy.relay.worker", str(theirs.fileno())]
            # Until it ignores them by itself, it is not to be ended by what systemd tells the whole unit.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
            try:
                process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)  # noqa: S603
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        worker = _Worker(process, ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ)
        return worker

    def _note_end(self, worker: _Worker, ended: Ended) -> None:
        worker.names.discard(ended.name)
        self._on_end(ended)

    def _bury(self, worker: _Worker, how: str) -> None:
        """Ends it, if it has not by itself, and its connections with it: it had the keys."""
        pid = worker.process.pid
        self._on_death(f"TLS worker {pid}, which moved {len(worker.names)} connections, {how}")
        self._end(worker)
        for name in [*worker.names]:
            self._note_end(worker, Ended(name, errno.EOWNERDEAD, f"process {pid}, which had its keys, has died"))

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.control)
        worker.control.close()
        worker.process.kill()
        worker.process.wait()
        for _, fds in worker.unsent:
            close_all(fds)

    def close(self) -> None:
        """Ends them all."""
        for worker in [*self._workers]:
            self._end(worker)
