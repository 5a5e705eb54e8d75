"""The holder: keeps a daemon's descriptors while the daemon is dead, where there is no systemd to do it.

It speaks sd_notify's protocol for them (FDSTORE, FDSTOREREMOVE, FDNAME, BARRIER: sd_notify(3)), without knowing what
they are. One word is its own, because it does not start the daemon and so cannot pass them on at its start: FDRETURN,
with a socket on which it sends everything that it holds.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from array import array
from contextlib import suppress

import structlog

from migproxy.sockets import identity, make_way, raise_file_limit

log = structlog.get_logger(__name__)

_SPARE = 64  # descriptors for itself, and for those that a message brings before they are counted
_MESSAGE = 4096
_MOST_FDS = 253  # in one message (SCM_MAX_FD, unix(7))
_RETURN_SECONDS = 2.0  # that a daemon may take to receive one message


class HolderError(Exception):
    """The holder cannot start."""


class _Ended(BaseException):
    """SIGTERM arrived, and nothing is held."""


class Holder:
    """Owns its socket and everything that was handed to it.

    Args:
        path: Where its datagram socket stands; for its user alone.
        limit: Descriptors kept at most.

    Raises:
        HolderError: Another holder listens there, or the socket cannot be made.
    """

    def __init__(self, path: str, limit: int) -> None:
        self._path = path
        self._limit = min(limit, raise_file_limit() - _SPARE)
        self._held: dict[str, list[int]] = {}
        self._count = 0
        self._ending = False
        self._reported_full = False
        self._socket = _listen(path)

    def serve(self) -> None:
        """Serves until SIGTERM or SIGINT, and beyond it for as long as something is held: a daemon may be draining."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        log.info("holding", socket=self._path, limit=self._limit)
        try:
            while not (self._ending and not self._held):
                self._handle()
        except _Ended:
            pass
        finally:
            with suppress(OSError):
                os.unlink(self._path)
            self._socket.close()
        log.info("stopped")

    def _end(self, *_: object) -> None:
        self._ending = True
        if not self._held:
            raise _Ended
        log.info("waiting for the daemon to end what it runs", held=self._count)

    def _handle(self) -> None:
        message, fds, flags, _ = socket.recv_fds(self._socket, _MESSAGE, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        if flags & socket.MSG_CTRUNC:
            log.error("descriptors were lost on the way", remedy="raise the limit of open files (ulimit -n)")
        said = dict(line.partition("=")[::2] for line in message.decode(errors="replace").splitlines())
        name = said.get("FDNAME", "stored")
        if said.get("FDSTORE") == "1":
            fds = self._store(name, fds)
        elif said.get("FDSTOREREMOVE") == "1":
            self._remove(name)
        elif said.get("FDRETURN") == "1" and all(stat.S_ISSOCK(os.fstat(fd).st_mode) for fd in fds):
            for fd in fds:
                self._return(fd)
            fds = []
        for fd in fds:  # a BARRIER's too: that it is closed tells the sender that everything before it is done
            os.close(fd)

    def _store(self, name: str, fds: list[int]) -> list[int]:
        """Keeps them all where there is room for them, but for what it has already; returns what is not kept."""
        known = {identity(fd) for fd in self._held.get(name, ())}
        new = [fd for fd in fds if identity(fd) not in known]
        if not new:
            return fds
        if self._count + len(new) <= self._limit:
            self._held.setdefault(name, []).extend(new)
            self._count += len(new)
            return [fd for fd in fds if fd not in new]
        if not self._reported_full:
            self._reported_full = True
            log.error("full: further descriptors are not kept", limit=self._limit, remedy="raise --limit")
        return fds

    def _remove(self, name: str) -> None:
        fds = self._held.pop(name, [])
        self._count -= len(fds)
        self._reported_full = self._reported_full and not fds
        for fd in fds:
            os.close(fd)

    def _return(self, fd: int) -> None:
        with socket.socket(fileno=fd) as asked, suppress(OSError):  # a daemon that died again asks anew
            asked.settimeout(_RETURN_SECONDS)
            asked.send(f"FDSTORE={self._limit}".encode())
            for name, fds in self._held.items():
                asked.sendmsg([f"FDNAME={name}".encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])
            asked.send(b"FDRETURN=1")  # that this is all
            log.info("gave back", names=len(self._held), descriptors=self._count)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        make_way(path, socket.SOCK_DGRAM, "holder")
        umask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(umask)
    except OSError as error:
        listener.close()
        raise HolderError(f"{path}: {error.strerror or error}") from error
    return listener
