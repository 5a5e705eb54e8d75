"""TCP's account of a connection: what has not arrived yet, and whether it is over."""

import socket
from contextlib import suppress
from dataclasses import replace

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


@pytest.mark.parametrize(
    ("silence", "unanswered", "is_gone"),
    [
        (0.0, 0, False),
        (179.9, 9, False),  # asked often, and the time is not up
        (180.0, 3, True),
        (900.0, 9, True),
        (900.0, 0, False),  # nothing was asked
        (240.0, 1, False),  # a window that has been shut for minutes: the kernel probes each 120 s
        (240.0, 2, False),  # an answer was lost
    ],
)
def test_a_peer_is_gone_when_it_was_asked_and_has_been_silent_for_long(
    silence: float, unanswered: int, is_gone: bool
) -> None:
    running = tcpinfo.TCPInfo(
        rtt=0.001,
        retransmits=0,
        delivery_rate=0,
        congestion_window=0,
        state=tcpinfo.ESTABLISHED,
        acked=0,
        received=0,
        segments=0,
        peer_window=0,
        unsent=0,
        busy=0,
        window_limited=0,
        buffer_limited=0,
        silence=silence,
        unanswered=unanswered,
    )
    assert running.is_gone(180) is is_gone
    over = 7  # TCP_CLOSE: nothing is expected of it, though its launcher may not have read it all yet
    assert not replace(running, state=over).is_gone(180)


def test_a_unix_socket_has_no_account() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert tcpinfo.read(sock) is None
