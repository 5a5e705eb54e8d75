"""The relay's TLS workers: connections are given to the one that has fewest, and one that dies is replaced."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from migproxy.relay.protocol import MOST_BYTES, Drop, Ended, FromDaemon, Move, Sync, encode, for_daemon

_HANG_SECONDS = 10.0  # without an answer; on a machine whose CPUs are all busy, its turn comes far sooner


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker.

    Attributes:
        names: What it moves.
        asked: Since when it owes an answer, None where it owes none.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    names: set[str] = field(default_factory=set)
    asked: float | None = None

    def say(self, message: FromDaemon, fds: Sequence[int] = ()) -> None:
        """Sends a message; raises OSError where it takes none."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.control.sendmsg([encode(message)], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


class Workers:
    """Owns the workers, of which there are none until one is needed.

    Args:
        selector: Tells when one says something; see `hear`.
        on_end: Is called with each end.
    """

    def __init__(self, selector: selectors.BaseSelector, on_end: Callable[[Ended], None]) -> None:
        self._selector, self._on_end = selector, on_end
        self._workers: list[_Worker] = []

    def move(self, move: Move, fds: Sequence[int]) -> None:
        """Has a connection moved; the descriptors stay the caller's.

        Raises:
            OSError: It cannot be.
        """
        worker = min(self._workers, key=lambda one: len(one.names), default=None)
        most = max(1, len(os.sched_getaffinity(0)) // 2)  # the other half is QEMU's
        if worker is None or (worker.names and len(self._workers) < most):
            worker = self._start()
        worker.say(move, fds)
        worker.names.add(move.name)

    def drop(self, name: str) -> None:
        """Has a connection broken off; its end is told."""
        for worker in self._workers:
            if name in worker.names:
                self._say(worker, Drop((name,)))
                return

    def look(self) -> list[str]:
        """Ends those that hang, and asks the others for a sign of life; returns why, for the log."""
        now = time.monotonic()
        ended = []
        for worker in [*self._workers]:
            if worker.asked is None:
                worker.asked = now
                self._say(worker, Sync(0))
            elif now - worker.asked >= _HANG_SECONDS:
                ended.append(f"process {worker.process.pid}, which moved {len(worker.names)} connections, hangs")
                self._bury(worker)
        return ended

    def _say(self, worker: _Worker, message: FromDaemon) -> None:
        try:
            worker.say(message)
        except OSError:
            self._bury(worker)

    def hear(self, fileobj: object) -> bool:
        """Hears what a worker says, if that is one's; returns whether it is."""
        for worker in self._workers:
            if worker.control is fileobj:
                try:
                    packet = worker.control.recv(MOST_BYTES)
                except OSError:
                    packet = b""
                message = for_daemon(packet, 0) if packet else None
                if isinstance(message, Ended):
                    self._note_end(worker, message)
                elif message:
                    worker.asked = None
                else:
                    self._bury(worker)
                return True
        return False

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "migproxy.relay.worker", str(theirs.fileno())]
            try:
                process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)  # noqa: S603
            except OSError:
                ours.close()
                raise
        worker = _Worker(process, ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ)
        return worker

    def _note_end(self, worker: _Worker, ended: Ended) -> None:
        worker.names.discard(ended.name)
        self._on_end(ended)

    def _bury(self, worker: _Worker) -> None:
        """Its connections end with it: it had the keys."""
        self._workers.remove(worker)
        self._selector.unregister(worker.control)
        worker.control.close()
        worker.process.kill()
        worker.process.wait()
        for name in [*worker.names]:
            self._note_end(worker, Ended(name, errno.EOWNERDEAD, "the process that had its keys has died"))

    def close(self) -> None:
        """Ends them all."""
        for worker in [*self._workers]:
            worker.names.clear()
            self._bury(worker)
