"""TCP's own view of a connection: struct tcp_info of linux/tcp.h, as getsockopt(TCP_INFO) fills it."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from dataclasses import dataclass

_LAYOUT = struct.Struct("=BxBB4x24I4Q6I4Q2I2Q4I")  # up to tcpi_snd_wnd, which Linux 5.4 added
_STATE, _RETRANSMITS, _PROBES, _SND_MSS, _LAST_DATA_RECV, _LAST_ACK_RECV, _RTT, _SND_CWND = 0, 1, 2, 5, 14, 15, 18, 21
_TOTAL_RETRANS, _ACKED, _RECEIVED, _UNSENT, _SEGMENTS, _DELIVERY_RATE = 26, 29, 30, 33, 36, 37
_BUSY, _WINDOW_LIMITED, _BUFFER_LIMITED, _WINDOW = 38, 39, 40, 48

_SIOCOUTQNSD = 0x894B  # linux/sockios.h
_ASKED = 3  # times in vain: one answer, or question, may be lost

# net/tcp_states.h
ESTABLISHED, SYN_SENT = 1, 2
_FIN_WAIT1, _FIN_WAIT2, _TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 4, 5, 6, 7, 8, 9, 11
_FIN_SENT = {_FIN_WAIT1, _FIN_WAIT2, _CLOSING, _LAST_ACK, _TIME_WAIT, _CLOSE}
_FIN_RECEIVED = {_CLOSE_WAIT, _CLOSING, _LAST_ACK, _TIME_WAIT, _CLOSE}


@dataclass(frozen=True, slots=True)
class TCPInfo:
    """What the kernel knows of one connection.

    Attributes:
        rtt: Smoothed round-trip time, seconds.
        retransmits: Segments sent again, since the connection began.
        delivery_rate: Bytes per second that the peer has acknowledged of late.
        congestion_window: Bytes that may be in flight.
        state: As net/tcp_states.h numbers them.
        acked: Bytes that the peer has acknowledged, a SYN and a FIN of ours among them (RFC 4898).
        received: Bytes that have arrived in order, a FIN among them.
        segments: Segments with data that were sent, those that were sent again among them.
        peer_window: Bytes that the peer has room for; None before Linux 5.4.
        unsent: Bytes that are queued, and not sent.
        busy, window_limited, buffer_limited: Seconds so far in which there was something to send or to be acknowledged;
            of these, in which the peer's window was full, and in which the send buffer was too small.
        silence: Seconds since the peer last sent data or an acknowledgement.
        unanswered: How often it was asked since: data sent again, or probes of a shut window or an idle connection.
    """

    rtt: float
    retransmits: int
    delivery_rate: int
    congestion_window: int
    state: int
    acked: int
    received: int
    segments: int
    peer_window: int | None
    unsent: int
    busy: float
    window_limited: float
    buffer_limited: float
    silence: float
    unanswered: int

    def is_gone(self, patience: float) -> bool:
        """Whether the peer is gone: it has been silent for so long, although it was asked.

        A peer whose launcher does not read answers each probe of its shut window. Silence alone does not tell: by and
        by, the kernel sends them 120 s apart (tcp_send_probe0, TCP_RTO_MAX).

        Args:
            patience: Seconds.
        """
        return self.state != _CLOSE and self.silence >= patience and self.unanswered >= _ASKED


def read(sock: socket.socket) -> TCPInfo | None:
    """Asks the kernel; None for a socket that is closed, or not TCP's. What an older kernel does not tell is 0."""
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAYOUT.size)
    except OSError:
        return None
    fields = _LAYOUT.unpack(raw.ljust(_LAYOUT.size, b"\0"))
    return TCPInfo(
        rtt=fields[_RTT] / 1e6,
        retransmits=fields[_TOTAL_RETRANS],
        delivery_rate=fields[_DELIVERY_RATE],
        congestion_window=fields[_SND_CWND] * fields[_SND_MSS],
        state=fields[_STATE],
        acked=fields[_ACKED],
        received=fields[_RECEIVED],
        segments=fields[_SEGMENTS],
        peer_window=fields[_WINDOW] if len(raw) == _LAYOUT.size else None,
        unsent=fields[_UNSENT],
        busy=fields[_BUSY] / 1e6,
        window_limited=fields[_WINDOW_LIMITED] / 1e6,
        buffer_limited=fields[_BUFFER_LIMITED] / 1e6,
        silence=min(fields[_LAST_DATA_RECV], fields[_LAST_ACK_RECV]) / 1e3,
        unanswered=max(fields[_RETRANSMITS], fields[_PROBES]),
    )


def is_over(sock: socket.socket) -> bool:
    """Whether nothing more can be sent or received: after a reset, or both ends of stream."""
    info = read(sock)
    return info is None or info.state == _CLOSE


def unsent(sock: socket.socket) -> int:
    """Bytes in the send queue that the peer has not acknowledged (tcp(7), SIOCOUTQ)."""
    return _queued(sock, termios.TIOCOUTQ)


def unread(sock: socket.socket) -> int:
    """Bytes that have arrived at a socket and nobody has read (tcp(7), unix(7): SIOCINQ)."""
    return _queued(sock, termios.FIONREAD)


def never_sent(sock: socket.socket) -> int:
    """Bytes in the send queue that the peer cannot have got, as it had no room; known after a reset, too."""
    return _queued(sock, _SIOCOUTQNSD)


def _queued(sock: socket.socket, request: int) -> int:
    try:
        return int.from_bytes(fcntl.ioctl(sock, request, bytes(4)), "little")
    except OSError:
        return 0
