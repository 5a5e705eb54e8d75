"""TCP's own view of a connection: struct tcp_info of linux/tcp.h, as getsockopt(TCP_INFO) fills it."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_LAYOUT = struct.Struct("=8x24I4Q6IQ")  # up to tcpi_delivery_rate, which Linux 4.9 added
_SND_MSS, _RTT, _SND_CWND, _TOTAL_RETRANS, _DELIVERY_RATE = 2, 15, 18, 23, 34


@dataclass(frozen=True, slots=True)
class TCPInfo:
    """What the kernel knows of one connection.

    Attributes:
        rtt: Smoothed round-trip time, seconds.
        retransmits: Segments sent again, since the connection began.
        delivery_rate: Bytes per second that the peer has acknowledged of late.
        congestion_window: Bytes that may be in flight.
    """

    rtt: float
    retransmits: int
    delivery_rate: int
    congestion_window: int


def read(sock: socket.socket) -> TCPInfo | None:
    """Asks the kernel; None for a socket that is closed, or that is not TCP."""
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAYOUT.size)
    except OSError:
        return None
    if len(raw) < _LAYOUT.size:
        return None
    fields = _LAYOUT.unpack(raw)
    return TCPInfo(
        rtt=fields[_RTT] / 1e6,
        retransmits=fields[_TOTAL_RETRANS],
        delivery_rate=fields[_DELIVERY_RATE],
        congestion_window=fields[_SND_CWND] * fields[_SND_MSS],
    )
