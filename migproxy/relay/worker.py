"""A process that moves connections in user-space TLS: one thread, one loop, and buffers that stay in its core's cache.

`python -m migproxy.relay.worker DESCRIPTOR`: the relay hands it connections there, as a daemon hands them to the relay,
and hears how they ended. Two threads for each connection would take Python's lock from each other: with 32 connections
that halves the rate.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress

from migproxy import output
from migproxy.fds import close_all
from migproxy.relay.protocol import (
    MOST_BYTES,
    MOST_FDS,
    Drop,
    Ended,
    Move,
    ProtocolError,
    Sync,
    Synced,
    encode,
    for_relay,
)
from migproxy.relay.records import MOST_KEYS, unpack, wipe
from migproxy.relay.tunnel import Buffers, Tunnel
from migproxy.tally import Tallies
from migproxy.tlserrors import TLSError

_LOOK_SECONDS = 0.01  # between two looks whether TCP has delivered what was sent before a connection broke
_MOST_EVENTS = 64  # at once


class Worker:
    """Owns its connections.

    Args:
        control: To the relay.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._buffers = Buffers()
        self._epoll = select.epoll()
        self._epoll.register(control, select.EPOLLIN)
        self._tunnels: dict[str, Tunnel] = {}
        self._sides: dict[int, tuple[str, Tunnel, bool]] = {}
        self._watched: dict[str, tuple[int, int]] = {}
        self._breaking: set[str] = set()

    def serve(self) -> None:
        """Serves until the relay is gone: without it, nobody could be told of an end."""
        self._say(Synced(0))  # it has begun
        while self._serve_once(_LOOK_SECONDS if self._breaking else None):
            pass

    def _serve_once(self, timeout: float | None) -> bool:
        for fd, events in self._epoll.poll(timeout, _MOST_EVENTS):
            if fd == self._control.fileno():
                if not self._hear():
                    return False
            elif fd in self._sides:  # else it has ended in this round
                name, tunnel, is_tcp = self._sides[fd]
                try:
                    (tunnel.on_tcp if is_tcp else tunnel.on_unix)(events)
                except Exception as error:  # noqa: BLE001 - a fault of ours: the other connections go on
                    traceback.print_exc()
                    tunnel.fail(OSError(errno.EIO, f"{type(error).__name__} in the worker: see its log"))
                self._look(name, tunnel)
        for name in [*self._breaking] if self._breaking else ():
            if self._tunnels[name].is_delivered:
                self._finish(name)
        return True

    def _hear(self) -> bool:
        packet, fds, _, _ = socket.recv_fds(self._control, MOST_BYTES + 1, MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return False
        message = for_relay(packet, len(fds))
        if isinstance(message, Move):
            try:
                self._begin(message, fds)
            except (OSError, ValueError) as error:
                close_all(fds)
                self._say(Ended(message.name, errno.EIO, f"it cannot be moved: {error}"))
        elif isinstance(message, Drop):
            for name in message.names:
                if name in self._tunnels:
                    self._finish(name)
        elif isinstance(message, Sync):
            self._say(Synced(message.number))
        return True

    def _begin(self, move: Move, fds: list[int]) -> None:
        keys = bytearray(MOST_KEYS)
        try:
            os.set_blocking(fds[3], False)  # an empty one is to hold nobody up
            count = os.readv(fds[3], [keys])
            with memoryview(keys) as whole, whole[:count] as packed:  # let go of, or the keys cannot be wiped
                sealer, opener, preface = unpack(packed)
        finally:
            wipe(keys)
        tallies = Tallies(fds[2])
        os.close(fds.pop())
        unix, tcp = (socket.socket(fileno=fd) for fd in fds[:2])
        fds.clear()  # they have owners now
        tunnel = self._tunnels[move.name] = Tunnel(unix, tcp, sealer, opener, tallies, self._buffers, preface)
        for sock, is_tcp in ((unix, False), (tcp, True)):
            self._sides[sock.fileno()] = move.name, tunnel, is_tcp
        self._watched[move.name] = 0, 0
        self._look(move.name, tunnel)

    def _look(self, name: str, tunnel: Tunnel) -> None:
        if tunnel.is_over and not tunnel.error:
            self._finish(name)
            return
        if tunnel.is_over:
            self._breaking.add(name)
        had, wanted = self._watched[name], tunnel.waits
        if wanted == had:
            return
        self._watched[name] = wanted
        for sock, before, events in zip((tunnel.unix, tunnel.tcp), had, wanted, strict=True):
            # A hang-up is told even to who waits for nothing: such a socket is not watched at all.
            if before and events:
                self._epoll.modify(sock, events)
            elif before:
                self._epoll.unregister(sock)
            elif events:
                self._epoll.register(sock, events)

    def _finish(self, name: str) -> None:
        tunnel = self._tunnels.pop(name)
        self._breaking.discard(name)
        for sock, events in zip((tunnel.unix, tunnel.tcp), self._watched.pop(name), strict=True):
            del self._sides[sock.fileno()]
            if events:
                self._epoll.unregister(sock)
        tunnel.close()
        error = tunnel.error
        if error is None:
            self._say(Ended(name))
        else:
            reason = str(error.reason) if isinstance(error, TLSError) else ""
            self._say(Ended(name, error.errno or errno.EIO, error.strerror or str(error), reason))

    def _say(self, message: Ended | Synced) -> None:
        with suppress(OSError):  # the relay is gone, which is heard next
            self._control.send(encode(message))


def main() -> int:
    """Runs a worker until its relay is gone, whoever else is told to end with it."""
    output.begin()
    output.lines.describe_loss = output.describe_loss_as_json
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # blocked until here: see Workers
    try:
        with suppress(ConnectionError):
            Worker(socket.socket(fileno=int(sys.argv[1]))).serve()
    except ProtocolError:
        traceback.print_exc()
    output.lines.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
