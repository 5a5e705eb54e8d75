"""Runs a daemon or a relay that kills itself at a chosen step of a connection's life.

`python -m tests.net.dying STEPS AT COMMAND...`: from the moment in which the file STEPS exists, each call into the
kernel that is made for the next connection is a step, and is counted there; right before step AT, the process dies. The
main thread's calls count, and those that look into a launcher's folders. Where a call is made by Python itself, or a
library in C, it counts with the step after it.
"""

import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from migproxy.relay import protocol

CALLS = {"posix", "_socket", "_ssl", "fcntl", "mmap"}
"""The modules whose functions call the kernel."""


class Steps:
    """Counts the steps.

    Args:
        path: Where; they are counted once it exists.
        at: The step before which the process dies.
    """

    def __init__(self, path: Path, at: int) -> None:
        self._path, self._at = path, at
        self._taken = 0
        self._mine = os.getpid()

    def begin(self) -> None:
        """A connection is there: from now on, steps are counted."""
        if not self._taken and self._path.exists():
            self._take("begin")
            sys.setprofile(self._profile)

    def aside(self, call: Callable[[], object]) -> object:
        """Carries out a call in another thread, which counts too."""
        if self._taken:
            sys.setprofile(self._profile)
        try:
            return call()
        finally:
            sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and (
            isinstance(called.__self__, socket.SocketType) or getattr(called, "__module__", None) in CALLS
        ):
            self._take(called.__name__)

    def _take(self, name: str) -> None:
        sys.setprofile(None)
        self._taken += 1
        with self._path.open("a") as file:
            print(self._taken, name, file=file)
        if self._taken == self._at:
            os.kill(self._mine, signal.SIGKILL)
        if self._taken > 1:
            sys.setprofile(self._profile)


def main() -> None:
    """See the module."""
    steps = Steps(Path(sys.argv[1]), int(sys.argv[2]))
    _, _, module, *arguments = sys.argv[3:]
    sys.argv[1:] = arguments
    with (relay_begins if module == "migproxy.relay" else daemon_begins)(steps):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def daemon_begins(steps: Steps) -> Iterator[None]:
    """Within it, a daemon that has accepted a connection says so, and its looks into launchers' folders count."""
    from migproxy import launcherthread, proxy, sockets

    def accept_and_begin(listener: socket.socket) -> int:
        fd = sockets.accept(listener)
        steps.begin()
        return fd

    call = launcherthread._Job.__call__
    with (
        patch.object(proxy, "accept", accept_and_begin),
        patch.object(launcherthread._Job, "__call__", lambda job: steps.aside(lambda: call(job))),
    ):
        yield


def relay_begins(steps: Steps) -> AbstractContextManager[object]:
    """Within it, a relay that has got a connection says so."""
    from migproxy.relay import process

    def read_and_begin(packet: bytes, fds: int) -> protocol.FromDaemon:
        message = protocol.for_relay(packet, fds)
        if isinstance(message, protocol.Keep) and ".connection." in message.name:
            steps.begin()
        return message

    return patch.object(process, "for_relay", read_and_begin)


if __name__ == "__main__":
    main()
