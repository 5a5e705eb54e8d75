"""TCP's account of a connection, of which no two figures can be had at once."""

import socket
import threading
from contextlib import suppress

import pytest

from migproxy import tcpinfo

pytestmark = pytest.mark.tier("gate")

MIB = 1 << 20


def test_what_was_given_is_exact_at_every_moment_while_the_peer_takes_it() -> None:
    """Between two calls to the kernel the peer acknowledges some: neither that nor anything else is counted twice."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        near.setblocking(False)
        for _ in range(40):
            given = tcpinfo.carried(near, dialled=True)[0] + fill(near)
            reader = threading.Thread(target=take, args=(far, 2 * MIB))
            reader.start()
            seen = set()
            while reader.is_alive():
                seen.add(tcpinfo.carried(near, dialled=True)[0])
            reader.join()
            assert seen <= {given}


def fill(sock: socket.socket) -> int:
    """Sends until no more is taken; returns how much was."""
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(MIB))
    return sent


def take(sock: socket.socket, count: int) -> None:
    buffer = bytearray(4096)
    while count > 0:
        count -= sock.recv_into(buffer)


def test_a_socket_that_never_rests_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(1, 10_000))

    def moving(_: socket.socket) -> tcpinfo.TCPInfo:
        return tcpinfo.TCPInfo(0.0, 0, 0, 0, tcpinfo.ESTABLISHED, acked=next(readings), received=1)

    monkeypatch.setattr(tcpinfo, "read", moving)
    with socket.socket() as sock:
        assert tcpinfo.carried(sock, dialled=False)[0] == tcpinfo._READINGS + 1
