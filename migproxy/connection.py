"""Connections that the relay moves, as the daemon sees them."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from migproxy import tcpinfo
from migproxy.bottleneck import Limits, Receiving, Sending, receiving, sending
from migproxy.fds import break_off, close_all
from migproxy.relay.client import Lease, Left
from migproxy.relay.protocol import Ended, Way
from migproxy.relay.records import wipe
from migproxy.sockets import probe_when_idle, remote_address
from migproxy.splice import Pipe
from migproxy.tally import PREFACE, Tallies, Tally
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import Transport

_PIPES = {Way.SPLICED: 2, Way.KTLS: 2, Way.TLS: 0}
_REMEMBERED = 10.0  # seconds that it is known that the peer has shut its window
_CLOSED = 1 << 14  # bytes: a window that is smaller than any connection's first
_SOONEST, _LATEST = 1.0, 10.0  # seconds between two looks at the other node
_STOP_SECONDS = 1.0  # that the relay may take to count the last bytes of a connection that is broken off


class Connection(ABC):
    """A connection between a launcher's unix socket and the other node; owns both, and closes both.

    Attributes:
        opened: When it was made (`time.monotonic`).
    """

    def __init__(self, tcp: socket.socket | None, tallies: tuple[Tally, Tally]) -> None:
        self.opened = time.monotonic()
        self._to_network, self._to_launcher = tallies
        self._observed = tcp
        self._last_tcp_info: tcpinfo.TCPInfo | None = None

    @property
    def sent(self) -> int:
        """Bytes taken from the launcher and handed to TCP."""
        return self._to_network.carried

    @property
    def received(self) -> int:
        """Bytes taken from TCP and handed to the launcher."""
        return self._to_launcher.carried

    @property
    @abstractmethod
    def ways(self) -> tuple[str, str]:
        """How the bytes sent and received are moved: "spliced", "ktls" or "user-space"."""

    @property
    def modes(self) -> Counter[str]:
        """Bytes both ways, by how they moved."""
        modes: Counter[str] = Counter()
        for way, moved in zip(self.ways, (self.sent, self.received), strict=True):
            modes[way] += moved
        return modes

    @property
    def spliced(self) -> tuple[int, int]:
        """Of the bytes sent and received, those that never left the kernel."""
        sending, receiving = (way != Way.TLS for way in self.ways)
        return self.sent * sending, self.received * receiving

    @property
    def tcp_info(self) -> tcpinfo.TCPInfo | None:
        """TCP's own view of the connection; of a closed one, the last there was."""
        return tcpinfo.read(self._observed) if self._observed else self._last_tcp_info

    def _forget_tcp(self) -> None:
        """Keeps TCP's last view of the connection, which is about to be closed."""
        self._last_tcp_info, self._observed = self.tcp_info, None

    def glance(self) -> None:  # noqa: B027 - what has ended has nothing to see
        """Looks whether the peer has shut its window, as it does for moments; to be called some times a second."""

    def limited(self, *, sends: bool, cpu: float) -> Limits | None:
        """What limited the connection since this was asked last; None the first time, and where there is no telling.

        Args:
            sends: Whether its bytes go to the network for the most part, as a source's do.
            cpu: See `bottleneck.Sending`.
        """
        return None

    @abstractmethod
    async def run(self, patience: Callable[[], float]) -> None:
        """Returns when both directions have ended, and both sockets are closed.

        Args:
            patience: Seconds without an answer after which the other node counts as gone, at each look.

        Raises:
            OSError: What broke the connection first; its TCP peer has been told by a reset, never by an end of
                stream that would pass for a complete one.
        """


class RelayedConnection(Connection):
    """A connection whose bytes the relay moves.

    This process keeps its copies of all descriptors, so that it can hand them to another relay where one dies.

    Args:
        lease: Its name at the relay.
        unix: The launcher's socket; owned from now on.
        transport: The other node's; likewise.
        rest: The ends of its pipes and the memory of its tallies, as the relay has them; None to make them.

    Raises:
        OSError: No descriptors are left; the sockets stay the caller's.
    """

    def __init__(
        self, lease: Lease, unix: socket.socket, transport: Transport, rest: Sequence[int] | None = None
    ) -> None:
        made: list[Pipe] = []
        if rest is None:
            try:
                made.extend(Pipe() for _ in range(_PIPES[transport.way]))
                tallies = Tallies()
                if made and transport.preface:  # the relay empties the pipes first
                    tallies.to_network.words[PREFACE] = os.write(made[0].writer, transport.preface)
            except OSError:
                for pipe in made:
                    pipe.close()
                raise
        else:
            *ends, memory = rest
            made.extend(Pipe(both) for both in zip(ends[::2], ends[1::2], strict=True))
            tallies = Tallies(memory)
        super().__init__(transport.tcp, (tallies.to_network, tallies.to_launcher))
        self.lease = lease
        self._unix = unix
        self._tcp = transport.tcp
        self._way = transport.way
        lease.keys = transport.keys
        self._pipes = made
        self._tallies = tallies
        self._seen: Sending | Receiving | None = None
        self._widest = 0
        self._shut_until = -math.inf

    @classmethod
    def adopt(cls, lease: Lease, left: Left) -> RelayedConnection:
        """Makes it of what the relay moves already."""
        assert left.way
        unix, tcp, *rest = left.fds
        return cls(lease, socket.socket(fileno=unix), Transport(socket.socket(fileno=tcp), way=left.way), rest)

    @property
    def ways(self) -> tuple[str, str]:
        """See Connection."""
        return self._way, self._way

    def limited(self, *, sends: bool, cpu: float) -> Limits | None:
        """See Connection."""
        info = self.tcp_info if self._observed else None
        if info is None:
            return None
        last, now = self._seen, self._send_sample(info, cpu) if sends else self._receive_sample()
        self._seen = now
        if isinstance(last, Sending) and isinstance(now, Sending):
            return sending(last, now)
        if isinstance(last, Receiving) and isinstance(now, Receiving):
            return receiving(last, now)
        return None

    def _send_sample(self, info: tcpinfo.TCPInfo, cpu: float) -> Sending:
        self._look_at_window(info)
        now = time.monotonic()
        return Sending(
            at=now,
            backlog=tcpinfo.unread(self._unix),
            busy=info.busy,
            window_limited=info.window_limited,
            buffer_limited=info.buffer_limited,
            unsent=info.unsent,
            is_shut=now < self._shut_until,
            cpu=cpu,
        )

    def glance(self) -> None:
        """See Connection."""
        if self._observed and (info := self.tcp_info):
            self._look_at_window(info)

    def _look_at_window(self, info: tcpinfo.TCPInfo) -> None:
        if (window := info.peer_window) is not None:
            self._widest = max(self._widest, window)
            if window < max(_CLOSED, self._widest / 2):
                self._shut_until = time.monotonic() + _REMEMBERED

    def _receive_sample(self) -> Receiving:
        return Receiving(time.monotonic(), tcpinfo.unread(self._tcp), tcpinfo.unsent(self._unix))

    async def run(self, patience: Callable[[], float]) -> None:
        """See Connection; a cancellation breaks it off."""
        ends = [end for pipe in self._pipes for end in pipe.ends]
        fds = (self._unix.fileno(), self._tcp.fileno(), *ends, self._tallies.fd)
        ended = self.lease.ended or self.lease.move(self._way, *fds)
        try:
            end = await self._end(ended, patience)
            if end.number:  # also where the relay has not taken it
                self._break_off()
        except (asyncio.CancelledError, TimeoutError):
            self._break_off()
            await self._last_words(ended)
            raise
        finally:
            self._close()
        if end.number:
            raise _error(end)

    async def _end(self, ended: asyncio.Future[Ended], patience: Callable[[], float]) -> Ended:
        """Waits for the end; raises TimeoutError where the other node is gone."""
        probed, pause = 0.0, _LATEST
        while not ended.done():
            seconds = patience()
            if info := self.tcp_info:
                if probed != seconds:
                    probe_when_idle(self._tcp, seconds)
                    probed = seconds
                if info.is_gone(seconds):
                    raise _gone(self._tcp, info.silence)
                pause = min(max(_SOONEST, seconds - info.silence), _LATEST)
            await asyncio.wait([ended], timeout=pause)
        return ended.result()

    def _break_off(self) -> None:
        self._forget_tcp()  # a reset clears it
        break_off(self._tcp, self._unix)

    @staticmethod
    async def _last_words(ended: asyncio.Future[Ended]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.shield(ended)

    def _close(self) -> None:
        self._forget_tcp()
        wipe(self.lease.keys)
        for sock in (self._tcp, self._unix):
            sock.close()
        for pipe in self._pipes:
            pipe.close()
        self._tallies.close()


class EndedConnection(Connection):
    """A connection that the relay moved to its end while no daemon was there to hear of it.

    Args:
        left: As the relay has it; its descriptors are closed.
    """

    def __init__(self, left: Left) -> None:
        assert left.way
        assert left.end
        *others, memory = left.fds
        close_all(others)
        tallies = Tallies(memory)
        tallies.close()
        super().__init__(None, (tallies.to_network, tallies.to_launcher))
        self._way = left.way
        self._end = left.end

    @property
    def ways(self) -> tuple[str, str]:
        """See Connection."""
        return self._way, self._way

    async def run(self, patience: Callable[[], float]) -> None:
        """See Connection."""
        if self._end.number:
            raise _error(self._end)


def _gone(tcp: socket.socket, silence: float) -> TimeoutError:
    why = f"{remote_address(tcp)} has answered nothing for {silence:.0f} s (--peer-timeout)"
    return TimeoutError(errno.ETIMEDOUT, f"{why}: is that node up, and does the migration network reach it?")


def _error(end: Ended) -> OSError:
    if end.reason:
        return TLSError(Reason(end.reason), end.error)
    return OSError(end.number, end.error or os.strerror(end.number))
