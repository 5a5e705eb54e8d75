"""What holds a migration up: the guest, this node's CPU, the network, or the other side. Pure.

The kernel keeps most of the account (struct tcp_info, linux/tcp.h): how long TCP had something to send, and how long
of that the peer's window was in its way. The rest is told by where bytes wait: in the launcher's socket, or in TCP's
queue.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

_TOLD = 0.05  # share from which on something is told to people
_MUCH = 1 << 17  # bytes: more than what arrives between two steps of a pump


class By(StrEnum):
    """What limits a migration: the values in the status, in metrics and in the log.

    A source's node tells the first four apart. A target's knows whether its own side is the limit, or what comes
    before it.
    """

    GUEST = "guest"
    SOURCE = "source"
    NETWORK = "network"
    TARGET = "target"
    UPSTREAM = "upstream"


Limits = Mapping[By, float]
"""Seconds by what limited them."""


@dataclass(frozen=True, slots=True)
class Sending:
    """A connection at one moment, as the node sees it that sends what its launcher writes.

    Attributes:
        at: The moment, seconds (`time.monotonic`).
        backlog: Bytes that the launcher has written, and nobody has taken yet (FIONREAD of its unix socket).
        busy: Seconds so far in which TCP had something sent and unacknowledged, or to send (tcpi_busy_time).
        window_limited: Seconds of these in which the peer's window was full (tcpi_rwnd_limited).
        buffer_limited: Seconds of these in which the send buffer was too small (tcpi_sndbuf_limited).
        unsent: Bytes that TCP has and has not sent (tcpi_notsent_bytes).
        is_shut: The peer's window (tcpi_snd_wnd) was closed, or half of what it had been, in the last ten seconds.
        cpu: Seconds so far in which the busiest thread of the relay has run, or waited for a CPU
            (/proc/PID/task/TID/schedstat, the first two figures).
    """

    at: float
    backlog: int
    busy: float
    window_limited: float
    buffer_limited: float
    unsent: int
    is_shut: bool
    cpu: float


@dataclass(frozen=True, slots=True)
class Receiving:
    """A connection at one moment, as the node sees it that hands what arrives to its launcher.

    Attributes:
        at: The moment, seconds (`time.monotonic`).
        arrived: Bytes that have arrived, and nobody has taken yet (FIONREAD of the TCP socket).
        unread: Bytes, with what the kernel needs to keep them, that the launcher has not read (SIOCOUTQ of its socket).
    """

    at: float
    arrived: int
    unread: int


def sending(before: Sending, after: Sending) -> Limits:
    """What limited a connection between two moments, seen from where it sends."""
    seconds = max(after.at - before.at, 0.0)
    busy = _within(after.busy - before.busy, seconds)
    window = _within(after.window_limited - before.window_limited, busy)
    buffer = _within(after.buffer_limited - before.buffer_limited, busy - window)
    # TCP is also busy while the last bytes of a slow writer are on their way.
    pressed = (busy - window - buffer) * _mean(one.unsent > 0 for one in (before, after))
    idle = seconds - window - buffer - pressed
    # Between two steps of a pump there is always something in the launcher's socket: more than the pump had CPU time
    # for is not its fault, but that of TCP, which had no room.
    backlog = idle * _mean(one.backlog > 0 for one in (before, after))
    source = min(backlog, _within(after.cpu - before.cpu, seconds))
    full = min(backlog - source, busy - window - buffer - pressed)
    held = window + buffer + pressed + full
    # A slow network never has the peer close its window.
    return {
        By.GUEST: idle - source - full,
        By.SOURCE: source,
        By.NETWORK: 0.0 if after.is_shut else held,
        By.TARGET: held if after.is_shut else 0.0,
    }


def receiving(before: Receiving, after: Receiving) -> Limits:
    """What limited a connection between two moments, seen from where its bytes arrive."""
    seconds = max(after.at - before.at, 0.0)
    target = seconds * _mean(one.arrived >= _MUCH and one.unread > 0 for one in (before, after))
    return {By.TARGET: target, By.UPSTREAM: seconds - target}


def together(each: Collection[Limits]) -> Limits:
    """What limited a migration, from what limited its connections in the same time.

    What comes before this node did only while no connection had anything to do: of a migration's connections, some wait
    for others to have had their turn.

    Args:
        each: One connection's; at least one.
    """
    waits = next(by for by in (By.GUEST, By.UPSTREAM) if by in next(iter(each)))
    limits = {by: sum(one[by] for one in each) for by in next(iter(each))}
    limits[waits] = 0.0
    idle = min(one[waits] for one in each)
    rest = max(sum(one.values()) for one in each) - idle
    total = sum(limits.values())
    shared = {by: rest * seconds / total if total else 0.0 for by, seconds in limits.items()}
    return {**shared, waits: idle if total else idle + rest}


def add(*several: Limits) -> Limits:
    """All of them, one after the other."""
    total: dict[By, float] = {}
    for one in several:
        for by, seconds in one.items():
            total[by] = total.get(by, 0.0) + seconds
    return total


def describe(limits: Limits, *, loss: float = 0.0, encrypts: bool = False) -> str:
    """A verdict for people: "81 % by the network (loss 0.3 %), 12 % by the target"; empty where there is none.

    Args:
        limits: Of some time.
        loss: Share of the segments that were sent again.
        encrypts: The relay encrypts in user space.
    """
    total = sum(limits.values())
    if total <= 0:
        return ""
    facts = {
        By.NETWORK: f" (loss {100 * loss:.1f} %)" if loss >= 0.0005 else "",
        By.SOURCE: " (TLS in user space)" if encrypts else "",
    }
    shares = sorted(((seconds / total, by) for by, seconds in limits.items()), reverse=True)
    return ", ".join(
        f"{100 * share:.0f} % by {_WORDS[by]}{facts.get(by, '')}" for share, by in shares if share >= _TOLD
    )


_WORDS = {
    By.GUEST: "the guest",
    By.SOURCE: "this node's CPU",
    By.NETWORK: "the network",
    By.TARGET: "the target",
    By.UPSTREAM: "what comes before this node",
}


def _within(value: float, most: float) -> float:
    return min(max(value, 0.0), most)


def _mean(facts: Iterable[bool]) -> float:
    known = list(facts)
    return sum(known) / len(known)
