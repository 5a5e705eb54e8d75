"""Relays under test, who speaks with them, and connections that they are to move."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from migproxy.fds import close_all
from migproxy.relay.process import Relay
from migproxy.relay.protocol import (
    MOST_BYTES,
    MOST_FDS,
    VERSION,
    FromDaemon,
    FromRelay,
    Hello,
    Move,
    Sync,
    Synced,
    Way,
    encode,
    for_daemon,
)
from migproxy.splice import Pipe
from migproxy.tally import Tallies

DEADLINE = 30.0
Heard = tuple[FromRelay, list[int]]


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for what gives no event."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE:g} s in vain for {what}"
        time.sleep(0.002)


class Wire:
    """A connection to be moved, with both peers' ends of it; like a daemon, this has a copy of what it hands over.

    Attributes:
        launcher, far: The peers' ends.
        unix, tcp: The relay's.
        fds: What comes with Move.
    """

    def __init__(self) -> None:
        self.launcher, self.unix = socket.socketpair(socket.AF_UNIX)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.far = socket.create_connection(listener.getsockname())
            self.tcp, _ = listener.accept()
        for sock in (self.launcher, self.far):
            sock.settimeout(DEADLINE)
        self.pipes = Pipe(), Pipe()
        self.tallies = Tallies()
        self._is_ours = True

    @property
    def fds(self) -> tuple[int, ...]:
        to_network, to_launcher = self.pipes
        return (self.unix.fileno(), self.tcp.fileno(), *to_network.ends, *to_launcher.ends, self.tallies.fd)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes to the network and to the launcher."""
        return self.tallies.to_network.moved, self.tallies.to_launcher.moved

    def check(self, size: int = 100_000) -> None:
        """Sends bytes both ways."""
        for sender, receiver in ((self.launcher, self.far), (self.far, self.launcher)):
            data = os.urandom(size)
            thread = threading.Thread(target=sender.sendall, args=(data,))
            thread.start()
            assert read(receiver, size) == data
            thread.join()

    def let_go(self) -> None:
        """Closes this process' copies of what was handed over."""
        if self._is_ours:
            self._is_ours = False
            for closing in (self.unix, self.tcp, *self.pipes, self.tallies):
                closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()
        for sock in (self.launcher, self.far):
            sock.close()


def read(sock: socket.socket, count: int | None = None) -> bytes:
    """Reads `count` bytes, or until the end of the stream."""
    data = bytearray()
    while count is None or len(data) < count:
        chunk = sock.recv(1 << 20)
        if not chunk:
            break
        data += chunk
    return bytes(data)


class Speaker:
    """Says to a relay what it is told to."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)  # blocking: with a time-out, a full queue is refused instead of waited for
        self.socket.settimeout(DEADLINE)
        self._number = 0

    def say(self, message: FromDaemon, *fds: int) -> None:
        self.say_raw(encode(message), *fds)

    def say_raw(self, packet: bytes, *fds: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.socket.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)

    def move(self, name: str, wire: Wire) -> None:
        self.say(Move(name, Way.SPLICED), *wire.fds)

    def hear(self) -> Heard:
        """The next message, and what came with it.

        Raises:
            EOFError: The relay has hung up.
        """
        packet, fds, _, _ = socket.recv_fds(self.socket, MOST_BYTES + 1, MOST_FDS)
        if not packet:
            raise EOFError
        return for_daemon(packet, len(fds)), fds

    def greet(self) -> list[Heard]:
        """Says Hello; returns what the relay has, without the last Synced."""
        self.say(Hello(VERSION, "test"))
        return self._until(0)

    def sync(self) -> list[FromRelay]:
        """Waits until everything that was said is done; returns what was heard meanwhile."""
        self._number += 1
        self.say(Sync(self._number))
        return [message for message, _ in self._until(self._number)]

    def _until(self, number: int) -> list[Heard]:
        heard: list[Heard] = []
        while (one := self.hear())[0] != Synced(number):
            heard.append(one)
        return heard

    def rest(self) -> list[FromRelay]:
        """All that is said until the relay hangs up."""
        heard = []
        with suppress(EOFError, ConnectionResetError):
            while True:
                message, fds = self.hear()
                close_all(fds)
                heard.append(message)
        return heard

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def relay_thread(path: str) -> Iterator[Relay]:
    """A relay in a thread of this process; it has to have nothing to move at the end."""
    relay = Relay(path)
    thread = threading.Thread(target=relay.serve)
    thread.start()
    try:
        yield relay
    finally:
        relay.end()
        thread.join(DEADLINE)
        assert not thread.is_alive(), "the relay moves something, or has a daemon"


class RelayProcess:
    """A relay as it runs.

    Attributes:
        path: Its socket.
        log: What it writes.
        process: It.
    """

    def __init__(self, path: str, *options: str, files: int | None = None) -> None:
        self.path = path
        self.log = Path(f"{path}.log")
        command = [sys.executable, "-m", "migproxy.relay", path, *options]
        if files:
            command = ["prlimit", f"--nofile={files}:{files}", *command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def wait_until_it_answers(self) -> Self:
        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(self.path)
                return True
            return False

        until(answers, "the relay")
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident(self) -> int:
        """Its memory, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise AssertionError("it is gone")

    def tell_to_end(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Waits for its end."""
        return self.process.wait(DEADLINE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)


@contextmanager
def relay_process(path: str, *options: str, files: int | None = None) -> Iterator[RelayProcess]:
    """A relay process that answers; killed at the end."""
    made = RelayProcess(path, *options, files=files)
    try:
        yield made.wait_until_it_answers()
    finally:
        made.kill()
