"""How many connections the processes of a node have room for, by their limits.

A connection costs descriptors and memory in two processes: the daemon, whose sockets they are, and the relay. What a
process may have is what its limits say, of open files and of its cgroup's memory.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_DESCRIPTORS: Final = 8  # of a connection, in either process: two sockets, two pipes, the counters' memory twice
_DAEMON_BYTES: Final = 64 << 10  # measured: Python's objects; TCP's buffers come on top (`tcp_buffers`)
_RELAY_BYTES: Final = 3 << 20  # the launcher's send buffer of 1 MiB, which the kernel doubles; a worker's buffers
_SHARE: Final = 0.75  # of a limit that connections may use: processes, listeners and handshakes need the rest


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may have.

    Attributes:
        descriptors: Open files.
        memory: Bytes of its cgroup; None where nothing limits them.
    """

    descriptors: int
    memory: int | None = None


@dataclass(frozen=True, slots=True, order=True)
class Capacity:
    """How many connections a node can have.

    Attributes:
        connections: That many.
        limit: What allows no more, for people.
        remedy: What to do about it.
    """

    connections: int
    limit: str
    remedy: str


def capacity(daemon: Limits, relay: Limits, buffers: int, *, together: bool) -> Capacity:
    """How many connections the two processes have room for.

    Args:
        daemon, relay: What they may have.
        buffers: Bytes that TCP may hold of a connection, at most. The kernel charges them to the cgroup of whoever made
            the socket (mem_cgroup_sk_alloc), which is the daemon.
        together: Both are in one cgroup.
    """
    daemon_bytes, relay_bytes = _DAEMON_BYTES + buffers, _RELAY_BYTES
    if together:
        daemon_bytes = relay_bytes = daemon_bytes + relay_bytes
    candidates = []
    for name, limits, cost in (("daemon", daemon, daemon_bytes), ("relay", relay, relay_bytes)):
        candidates.append(
            Capacity(
                int(limits.descriptors * _SHARE) // _DESCRIPTORS,
                f"{limits.descriptors} open files of the {name}",
                f"raise the {name}'s limit of open files (LimitNOFILE=, ulimit -Hn)",
            )
        )
        if limits.memory is not None:
            candidates.append(
                Capacity(
                    int(limits.memory * _SHARE) // cost,
                    f"{limits.memory >> 20} MiB of memory of the {name}, {cost / (1 << 20):.1f} for a connection",
                    f"raise the {name}'s memory limit (resources.limits.memory, MemoryMax=), "
                    "or lower net.ipv4.tcp_rmem and tcp_wmem",
                )
            )
    return min(candidates)


def node_capacity(relay: Callable[[], Limits | None], *, together: bool) -> Callable[[], Capacity]:
    """How many connections this process has room for, and the relay: by what limits them now.

    Args:
        relay: What the relay may have; None while that is not known.
        together: See `capacity`.
    """
    own, buffers = Limits(resource.getrlimit(resource.RLIMIT_NOFILE)[0], memory_limit()), tcp_buffers()
    return lambda: capacity(own, relay() or own, buffers, together=together)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that this process may have by its cgroups' limits, v2's memory.max or v1's; None where there is none.

    In a container the path of /proc/self/cgroup may be the host's, of which only the end is mounted: every folder from
    there up to the mount's own counts that exists.

    Args:
        root: Of /proc and /sys.
    """
    found = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
            mount, inner = root / "sys/fs/cgroup" / top, Path(path.lstrip("/"))
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):  # "max" is no number
                    found.append(int((mount / folder / name).read_text()))
    return min((one for one in found if one < 1 << 60), default=None)  # v1's "none" is nearly 2^63


def tcp_buffers(root: Path = Path("/")) -> int:
    """Bytes that the kernel may hold of one TCP connection, both ways, if nobody reads (tcp(7), tcp_rmem, tcp_wmem).

    Args:
        root: Of /proc.
    """
    folder = root / "proc/sys/net/ipv4"
    return sum(int((folder / name).read_text().split()[2]) for name in ("tcp_rmem", "tcp_wmem"))
