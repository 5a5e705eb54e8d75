"""How the pumps of kernel TLS tell an end from an error; plain TCP stands in for a kernel that decrypts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from migproxy.ktls import KernelReceive, KernelSend
from migproxy.splice import Pipe
from migproxy.tally import Tally
from migproxy.tlserrors import Truncated

pytestmark = pytest.mark.tier("gate")


@dataclass
class Legs:
    """Both pumps of a connection, and the peers' ends."""

    launcher: socket.socket
    far: socket.socket
    send: KernelSend
    receive: KernelReceive


@pytest.fixture
def legs() -> Iterator[Legs]:
    with ExitStack() as stack:
        launcher, unix = socket.socketpair()
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        far = socket.create_connection(listener.getsockname())
        tcp, _ = listener.accept()
        for sock in (launcher, unix, far, tcp):
            stack.enter_context(sock)
        send, receive = KernelSend(unix, tcp, Tally(), Pipe()), KernelReceive(tcp, unix, Tally(), Pipe())
        stack.callback(send.close)
        stack.callback(receive.close)
        yield Legs(launcher, far, send, receive)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


ENDS = pytest.mark.parametrize(
    ("end", "error"), [(socket.socket.close, Truncated), (reset, ConnectionResetError)], ids=["end", "reset"]
)


@ENDS
def test_a_peer_that_just_goes_after_the_launcher_has_ended_cleanly(
    legs: Legs, end: Callable[[socket.socket], None], error: type[OSError]
) -> None:
    """KubeVirt's source does, whenever its garbage is collected."""
    legs.launcher.sendall(b"last words")
    legs.launcher.close()
    legs.send.run()
    assert legs.far.recv(100, socket.MSG_WAITALL).startswith(b"last words")
    end(legs.far)
    legs.receive.run()
    assert (legs.send.error, legs.receive.error) == (None, None)


@ENDS
def test_a_peer_that_just_goes_while_the_launcher_still_reads_is_an_error(
    legs: Legs, end: Callable[[socket.socket], None], error: type[OSError]
) -> None:
    legs.launcher.shutdown(socket.SHUT_WR)
    legs.send.run()
    assert legs.far.recv(100, socket.MSG_WAITALL)
    end(legs.far)
    legs.receive.run()
    assert isinstance(legs.receive.error, error)


def test_data_for_a_launcher_that_has_closed_are_an_error(legs: Legs) -> None:
    legs.far.sendall(b"lost")
    legs.launcher.close()
    legs.receive.run()
    assert isinstance(legs.receive.error, BrokenPipeError)
