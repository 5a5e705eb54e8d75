"""TCP's account of a connection: what has not arrived yet, and whether it is over."""

import socket
from contextlib import suppress

import pytest

from migproxy import tcpinfo
from tests.relays import DEADLINE, read, until

pytestmark = pytest.mark.tier("gate")

MIB = 1 << 20


def test_what_the_peer_has_not_acknowledged_is_unsent_until_it_takes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        far.settimeout(DEADLINE)
        assert tcpinfo.unsent(near) == 0
        near.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += near.send(bytes(MIB))
        assert 0 < tcpinfo.unsent(near) <= sent
        read(far, sent)
        until(lambda: tcpinfo.unsent(near) == 0, "the acknowledgement")
        assert not tcpinfo.is_over(near)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        until(lambda: tcpinfo.is_over(near), "the reset")
    assert tcpinfo.read(near) is None
    assert tcpinfo.is_over(near)


def test_a_unix_socket_has_no_account() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert tcpinfo.read(sock) is None
