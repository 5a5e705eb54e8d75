"""Descriptors of which another process has a copy, too; of sockets: ending them so that their peers notice."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import struct
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of a process, or a kernel, that has no descriptor or no memory left."""

MORE_FILES: Final = "raise the limit of open files (ulimit -n, LimitNOFILE=)"
"""Their remedy."""

_TCP_ULP = 31  # linux/tcp.h
_UNSPECIFIED = struct.pack("=H14x", socket.AF_UNSPEC)  # a sockaddr, which Python's own connect does not make
_CREDENTIALS = struct.Struct("3i")  # ucred, unix(7)
_libc = ctypes.CDLL(None)


def peer_of(sock: socket.socket) -> tuple[int, int, int]:
    """PID, UID and GID of who made the other end of a unix connection, or had it listen (SO_PEERCRED).

    The PID is 0 where that process is not in our namespace, and may be another's once it has ended.
    """
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid


def is_connected(sock: socket.socket) -> bool:
    """Whether a socket has been connected, and its peer is still there."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def reset(sock: socket.socket) -> None:
    """Closes a TCP socket so that the peer sees a reset, not an end of stream that would pass for a complete one.

    Daemon and relay both have a descriptor of it, so that closing it alone would tell the peer nothing: it is
    disconnected, which resets it at once (connect(2), AF_UNSPEC). A unix socket is shut down.
    """
    with suppress(OSError):
        if sock.family == socket.AF_UNIX:
            sock.shutdown(socket.SHUT_RDWR)
        else:
            disconnect(sock)
    sock.close()


def break_off(tcp: socket.socket, unix: socket.socket) -> None:
    """Ends a connection for both peers, and whoever moves it, at once; closes nothing. The TCP peer sees a reset."""
    with suppress(OSError):
        disconnect(tcp)  # first: a FIN, or what a pump makes of the launcher's end, would look like an end
    for sock in (tcp, unix):
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def disconnect(tcp: socket.socket) -> None:
    """Resets a TCP connection at once where the kernel lets it, else when its last descriptor is closed.

    Linux 6.4 and 6.5 do not while a thread waits for the socket. Kernel TLS never does (net/tls/tls_main.c): there a
    FIN is sent, which without a close_notify is no end of stream, but a truncation (RFC 8446, 6.1).

    Raises:
        OSError: It is closed.
    """
    reset_on_close(tcp, yes=True)
    if _libc.connect(tcp.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)) and _is_tls(tcp):
        tcp.shutdown(socket.SHUT_RDWR)


def reset_on_close(tcp: socket.socket, *, yes: bool) -> None:
    """Sets what the peer sees when the last descriptor of a connection is closed: a reset, or an end of stream."""
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", yes, 0))


def _is_tls(tcp: socket.socket) -> bool:
    return tcp.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).startswith(b"tls")


def quench(listener: socket.socket) -> None:
    """Closes a listener so that nobody can connect any more, whoever else has a descriptor of it."""
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def raise_file_limit() -> int:
    """Raises the soft limit of open files, which is meant for programs that use select(2); returns the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def duplicate(fds: Iterable[int]) -> tuple[int, ...]:
    """Makes descriptors of one's own.

    Raises:
        OSError: There are not as many.
    """
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        close_all(made)
        raise
    return tuple(made)


def close_all(fds: Iterable[int]) -> None:
    """Closes descriptors."""
    for fd in fds:
        os.close(fd)


def post(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Sends a packet, and descriptors with it; does not wait.

    Raises:
        BlockingIOError: Not now: no room, or too many descriptors of this user are in flight (unix(7), ETOOMANYREFS).
        OSError: See sendmsg(2).
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    try:
        sock.sendmsg([packet], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS):
            raise BlockingIOError(error.errno, error.strerror) from error
        raise
