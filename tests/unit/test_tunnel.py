"""A connection in user-space TLS, driven by hand: what is left of one direction when the other one breaks."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from migproxy.relay.records import RECORD, SLOT, Cipher, Keys, Opener, Sealer
from migproxy.relay.tunnel import Buffers, Tunnel
from migproxy.tally import CLEAN, Tallies
from migproxy.tlserrors import Alert, Reason, TLSError, Truncated

pytestmark = pytest.mark.tier("gate")

IN, OUT, HUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP
RESET = b"\1\0\0\0\0\0\0\0"


class Driven:
    """A tunnel with both peers' ends, and the peer's side of TLS.

    Attributes:
        launcher, far: The peers' ends, not blocking.
        wire: What the peer has been sent so far.
        tunnel: Under test.
        seals: Makes the peer's records.
    """

    def __init__(self, preface: bytes = b"") -> None:
        self.wire = b""
        self.launcher, unix = socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.far = socket.create_connection(listener.getsockname())
            tcp, _ = listener.accept()
        for end in (self.launcher, self.far):
            end.setblocking(False)
        there, back = os.urandom(32), os.urandom(32)

        def keys(secret: bytes) -> Keys:
            return Keys.of_secret(Cipher.AES_128_GCM, secret)

        self.seals, self.opens = Sealer(keys(there)), Opener(keys(back), is_client=True)
        self.tallies = Tallies()
        self.tunnel = Tunnel(
            unix, tcp, Sealer(keys(back)), Opener(keys(there), is_client=False), self.tallies, Buffers(), preface
        )

    def data(self, data: bytes) -> bytes:
        """Records of the peer's."""
        desk, wire = bytearray(len(data) + SLOT), memoryview(bytearray(2 * len(data) + SLOT))
        made = b""
        for start in range(0, len(data), RECORD):
            part = data[start : start + RECORD]
            desk[: len(part)] = part
            made += wire[: self.seals.seal(memoryview(desk), len(part), wire)]
        return made

    def say(self, wire: bytes) -> None:
        """Sends what the peer says, and waits until all of it has arrived."""
        self.far.setblocking(True)
        self.far.sendall(wire)
        self.far.setblocking(False)

    def step(self) -> None:
        """Gives both sides a turn, as far as they wait for something that is there."""
        for sock, turn, wanted in zip(
            (self.tunnel.unix, self.tunnel.tcp),
            (self.tunnel.on_unix, self.tunnel.on_tcp),
            self.tunnel.waits,
            strict=True,
        ):
            if wanted:
                poll = select.poll()
                poll.register(sock, wanted)
                for _, events in poll.poll(100):
                    turn(events)

    def run(self) -> bytes:
        """Lets it go on to its end, while both peers read; returns what the launcher has got."""
        got = b""
        for _ in range(200):
            self.wire += drained(self.far)
            if self.tunnel.is_over:
                break
            self.step()
            got += drained(self.launcher)
        assert self.tunnel.is_over
        return got + drained(self.launcher)

    def fill(self) -> int:
        """Stalls what goes to the launcher; returns how much of it that takes."""
        self.say(self.data(bytes(2_000_000)))
        while self.tunnel.waits[0] & OUT == 0:
            self.step()
        return self.tallies.to_launcher.moved

    def plain(self) -> tuple[bytes, bool]:
        """What the peer has been sent, and whether it was told of the end."""
        self.wire += drained(self.far)
        room = memoryview(bytearray(8_000_000))
        _, filled = self.opens.open(memoryview(self.wire), room)
        return bytes(room[:filled]), self.opens.ended

    def close(self) -> None:
        self.tunnel.close()
        self.launcher.close()
        self.far.close()


def drained(sock: socket.socket) -> bytes:
    """All that can be read."""
    data = b""
    with suppress(OSError):
        while part := sock.recv(1 << 20):
            data += part
    return data


@pytest.fixture
def driven() -> Iterator[Driven]:
    made = Driven()
    yield made
    made.close()


def settle(sock: socket.socket) -> None:
    """Waits until what was sent has been seen by the other end's kernel."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLHUP)
    poll.poll(5000)


def test_what_is_sent_after_an_error_is_no_end_of_stream(driven: Driven) -> None:
    """The launcher dies, and in the same round the network takes what it had left."""
    driven.fill()
    while not driven.tunnel.waits[1] & OUT:  # the peer takes nothing
        with suppress(BlockingIOError):
            driven.launcher.send(bytes(100_000))
        driven.step()
    driven.launcher.close()
    driven.tunnel.on_unix(OUT | HUP)
    assert isinstance(driven.tunnel.error, BrokenPipeError)
    driven.run()
    assert driven.tallies.to_network.end > CLEAN
    data, is_told_of_the_end = driven.plain()
    assert len(data) == driven.tallies.to_network.moved
    assert not is_told_of_the_end
    with pytest.raises(BlockingIOError):  # no end of stream: a reset comes when it is closed
        driven.far.recv(1)


def close_abruptly(sock: socket.socket) -> None:
    """By a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


@pytest.mark.parametrize("end", [socket.socket.close, close_abruptly])
@pytest.mark.parametrize("is_read", [True, False])
def test_a_kubevirt_source_that_just_goes_after_the_launcher_has_ended_cleanly(
    driven: Driven, end: Callable[[socket.socket], None], is_read: bool
) -> None:
    """Its garbage collector closes the connection: with something unread, a close is a reset."""
    driven.launcher.send(b"last words")
    driven.launcher.close()
    while driven.tallies.to_network.end != CLEAN:
        driven.step()
    settle(driven.far)
    if is_read:
        assert driven.plain() == (b"last words", True)
    end(driven.far)
    driven.run()
    assert driven.tunnel.error is None
    assert driven.tallies.to_launcher.end == CLEAN


def test_a_reset_is_an_error_although_the_launcher_sends_no_more(driven: Driven) -> None:
    driven.launcher.shutdown(socket.SHUT_WR)
    while driven.tallies.to_network.end != CLEAN:
        driven.step()
    close_abruptly(driven.far)
    driven.run()
    assert isinstance(driven.tunnel.error, ConnectionResetError)
    assert driven.tallies.to_launcher.end > CLEAN


def test_a_reset_that_loses_what_the_launcher_wrote_is_an_error_although_it_has_closed(driven: Driven) -> None:
    driven.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    driven.tunnel.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    driven.launcher.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    driven.launcher.send(bytes(200_000))
    driven.launcher.close()
    while driven.tallies.to_network.end != CLEAN:
        driven.step()
    close_abruptly(driven.far)
    driven.run()
    assert isinstance(driven.tunnel.error, ConnectionResetError)


def test_the_answer_to_new_keys_that_cannot_be_sent_loses_nothing(driven: Driven) -> None:
    first, second = os.urandom(150_000), os.urandom(150_000)
    driven.launcher.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    driven.tunnel.unix.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    driven.say(driven.data(first) + driven.seals.update(asks=True) + driven.data(second))
    close_abruptly(driven.far)
    settle(driven.tunnel.tcp)
    got = driven.run()
    assert (first + second).startswith(got)
    assert driven.tunnel.error


@pytest.mark.parametrize("has_closed", [False, True])
def test_a_bad_record_behind_good_ones_is_told_at_once(driven: Driven, has_closed: bool) -> None:
    """Also where nothing follows, and where the launcher would miss nothing of a stream that is cut."""
    good, bad = driven.data(b"good"), bytearray(driven.data(b"bad"))
    bad[-1] ^= 1
    driven.say(good + bytes(bad))
    if has_closed:
        driven.far.shutdown(socket.SHUT_WR)
        driven.launcher.shutdown(socket.SHUT_WR)
        settle(driven.tunnel.tcp)
    driven.tunnel.on_tcp(IN)
    assert driven.launcher.recv(100) == b"good"
    assert isinstance(driven.tunnel.error, TLSError)
    assert driven.tunnel.error.reason is Reason.BAD_RECORD
    driven.run()
    with pytest.raises(TLSError, match=rf"alert {Alert.BAD_RECORD_MAC:d} "):
        driven.plain()
    assert driven.tallies.to_launcher.end > CLEAN


def test_an_alert_behind_data_is_told_and_not_the_cut_that_follows(driven: Driven) -> None:
    driven.say(driven.data(b"last data") + driven.seals.alert(Alert.INTERNAL_ERROR))
    driven.far.shutdown(socket.SHUT_WR)
    settle(driven.tunnel.tcp)
    assert driven.run() == b"last data"
    assert isinstance(driven.tunnel.error, TLSError)
    assert not isinstance(driven.tunnel.error, Truncated)
    assert driven.tunnel.error.reason is Reason.REFUSED_BY_PEER


def test_a_launcher_that_leaves_something_unread_is_heard_to_its_last_word(driven: Driven) -> None:
    driven.fill()
    driven.launcher.send(b"last words")
    driven.launcher.close()
    driven.tunnel.on_unix(IN | OUT | HUP)
    driven.run()
    assert isinstance(driven.tunnel.error, BrokenPipeError)
    assert driven.plain() == (b"last words", False)
    assert driven.tallies.to_network.moved == len(b"last words")


def test_what_had_arrived_reaches_a_slow_launcher_although_nothing_can_be_sent(driven: Driven) -> None:
    data = os.urandom(600_000)
    driven.tunnel.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    driven.launcher.send(b"never read")
    driven.tunnel.on_unix(IN)
    driven.far.setblocking(True)
    driven.far.sendall(driven.data(data) + driven.seals.alert(Alert.CLOSE_NOTIFY))
    driven.tunnel.on_tcp(IN)
    assert driven.tunnel.waits[0] & OUT, "the launcher does not keep up"
    driven.far.close()  # with something unread: a reset
    settle(driven.tunnel.tcp)
    driven.launcher.send(b"more")
    driven.tunnel.on_unix(IN)
    assert driven.run() == data
    assert driven.tallies.to_launcher.end == CLEAN
    assert driven.tunnel.error


def test_a_preface_is_sent_before_anything_and_not_counted() -> None:
    driven = Driven(b"before")
    try:
        assert driven.tunnel.waits[1] & OUT
        driven.launcher.sendall(b"data")
        driven.launcher.shutdown(socket.SHUT_WR)
        driven.say(driven.seals.alert(Alert.CLOSE_NOTIFY))
        driven.run()
        assert driven.plain() == (b"beforedata", True)
        assert driven.tallies.to_network.carried == len(b"data")
    finally:
        driven.close()
