"""What the connections of a migration have carried, and how they ended."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from migproxy import tcpinfo
from migproxy.bottleneck import Limits
from migproxy.connection import Connection
from migproxy.portmap import Channel
from migproxy.relay.protocol import Way
from migproxy.state import ChannelState


@dataclass
class Traffic:
    """What one channel of one migration has carried; read at any time, at no cost to whoever moves it.

    Attributes:
        connections: Connections relayed so far.
        failures: Connections that ended with an error, dialling included, by reason (`measure.FAILURES`).
        open: Those that are open now.
    """

    connections: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    open: set[Connection] = field(default_factory=set)
    _sent: int = 0
    _received: int = 0
    _spliced: tuple[int, int] = (0, 0)
    _modes: Counter[str] = field(default_factory=Counter)
    _retransmits: int = 0
    _segments: int = 0

    @property
    def failed(self) -> int:
        """Connections that ended with an error."""
        return self.failures.total()

    @property
    def sent(self) -> int:
        """Bytes from the launcher to the network, all connections."""
        return self._sent + sum(connection.sent for connection in self.open)

    @property
    def received(self) -> int:
        """Bytes from the network to the launcher, all connections."""
        return self._received + sum(connection.received for connection in self.open)

    @property
    def spliced(self) -> tuple[int, int]:
        """Of the bytes sent and received, those that never left the kernel."""
        each = [self._spliced, *(connection.spliced for connection in self.open)]
        return sum(sent for sent, _ in each), sum(received for _, received in each)

    @property
    def modes(self) -> Counter[str]:
        """Bytes both ways, by how they moved, all connections."""
        return sum((connection.modes for connection in self.open), self._modes)

    @property
    def retransmits(self) -> int:
        """Segments that TCP sent again, all connections."""
        return self._retransmits + sum(info.retransmits for info in self.tcp_infos)

    @property
    def segments(self) -> int:
        """Segments with data that TCP sent, all connections, those that were sent again among them."""
        return self._segments + sum(info.segments for info in self.tcp_infos)

    @property
    def tcp_infos(self) -> list[tcpinfo.TCPInfo]:
        """TCP's view of each open connection."""
        return [info for connection in self.open if (info := connection.tcp_info)]

    @classmethod
    def restore(cls, state: ChannelState) -> Traffic:
        """Makes the counters that an earlier daemon left."""
        return cls(
            connections=state.connections,
            failures=Counter(state.failures),
            _sent=state.sent,
            _received=state.received,
            _spliced=state.spliced,
            _modes=Counter(state.modes),
            _retransmits=state.retransmits,
            _segments=state.segments,
        )

    def state(self) -> ChannelState:
        """What is to be restored: all but what is open, which has its own tallies."""
        return ChannelState(
            connections=self.connections - len(self.open),
            failures=dict(self.failures),
            sent=self._sent,
            received=self._received,
            spliced=self._spliced,
            modes=dict(self._modes),
            retransmits=self._retransmits,
            segments=self._segments,
        )

    def begin(self, connection: Connection) -> None:
        """Counts a connection as open."""
        self.connections += 1
        self.open.add(connection)

    def end(self, connection: Connection) -> None:
        """Counts a connection as over, and keeps what it moved."""
        self.open.discard(connection)
        self._sent += connection.sent
        self._received += connection.received
        before, more = self._spliced, connection.spliced
        self._spliced = before[0] + more[0], before[1] + more[1]
        self._modes.update(connection.modes)
        if info := connection.tcp_info:
            self._retransmits += info.retransmits
            self._segments += info.segments


@dataclass
class Progress:
    """What one side of a migration has done so far, whichever proxy did it.

    Attributes:
        began: When it was first served (`time.time`).
        opened, closed: When its first connection was relayed, and when one ended last (`time.time`); None before that.
        reported: Bytes that were moved when it was last summed up.
        traffic: What each channel has carried.
        last_error: The latest connection's failure, for people.
        limited: Seconds in which it had connections, by what limited them.
        paths: Beside virt-handler, the connections that went by migproxy, and by virt-handler: by path and reason.
    """

    began: float = field(default_factory=time.time)
    opened: float | None = None
    closed: float | None = None
    reported: int = 0
    traffic: dict[Channel, Traffic] = field(default_factory=dict)
    last_error: str | None = None
    limited: Limits = field(default_factory=dict)
    paths: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def moved(self) -> int:
        """Bytes of all channels, both ways."""
        return sum(one.sent + one.received for one in self.traffic.values())

    @property
    def loss(self) -> float:
        """Share of the segments that were sent again."""
        segments = sum(one.segments for one in self.traffic.values())
        again = sum(one.retransmits for one in self.traffic.values())
        return again / segments if again < segments else 0.0  # what an older version has left knows no segments

    @property
    def encrypts(self) -> bool:
        """Whether bytes were encrypted in user space."""
        return any(one.modes[Way.TLS] for one in self.traffic.values())
