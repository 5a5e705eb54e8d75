"""The network namespace in which the connections between the nodes are made: this process's, or another's.

A socket belongs for ever to the namespace of the thread that made it (network_namespaces(7)), so that one thread,
which does nothing else, enters the other namespace (setns(2), CAP_SYS_ADMIN) and makes every socket there; whoever
uses them need not know.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from migproxy.portmap import IPAddress

LOOK_SECONDS: Final = 0.5
"""How often it is looked whether the namespace is still the one: the kernel gives no event for that."""

_SO_NETNS_COOKIE: Final = 71  # asm-generic/socket.h
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_POD_IP_VARIABLE: Final = b"MY_POD_IP="

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(OSError):
    """The namespace cannot be found or entered (now); the message says why, and what to do."""


class NetworkNamespace:
    """The process's own network namespace.

    Attributes:
        identity: Which it is (inode), 0 for the process's own.
        pod_ip: The IP of the pod whose namespace it is, where that is known.
        look_seconds: How often `has_moved` is to be asked; None for never.
    """

    identity: int = 0
    pod_ip: IPAddress | None = None
    look_seconds: float | None = None

    def enter(self) -> None:
        """Goes to where the namespace is now: sockets are made there from then on.

        Raises:
            NamespaceError: It is nowhere, or cannot be entered; sockets are still made where they were, if anywhere.
        """

    def has_moved(self) -> bool:
        """Whether the namespace is another one than was entered, or gone."""
        return False

    def make_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Makes a socket there; the caller owns it.

        Raises:
            OSError: As socket.socket, or there is no namespace (yet).
        """
        return socket.socket(family, kind, protocol)

    def holds(self, sock: socket.socket) -> bool:
        """Whether a socket, made by whomever, is of this namespace.

        Kernels before 5.14 do not tell: taken for yes.
        """
        try:
            with self.make_socket(sock.family, sock.type, sock.proto) as own:
                return _cookie(own) == _cookie(sock)
        except OSError as error:
            return error.errno == errno.ENOPROTOOPT


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a namespace was found.

    Args:
        path: that can be opened and handed to setns(2).
        pod_ip: see NetworkNamespace.
        is_still_there: whether the path is still what was found.
    """

    path: str
    pod_ip: IPAddress | None
    is_still_there: Callable[[], bool]


class OtherNamespace(NetworkNamespace):
    """Another network namespace; owns the thread in it.

    Args:
        find: Tells where it is; raises NamespaceError.
    """

    look_seconds = LOOK_SECONDS

    def __init__(self, find: Callable[[], Place]) -> None:
        self._find = find
        self._place: Place | None = None
        self._thread = ThreadPoolExecutor(1, "netns")

    def enter(self) -> None:
        self._place = None
        place = self._find()
        with _opened(place) as fd:
            identity = os.stat(fd).st_ino
            if identity != self.identity:
                self._thread.submit(_set_network_namespace, fd, place.path).result()
        self._place, self.identity, self.pod_ip = place, identity, place.pod_ip

    def has_moved(self) -> bool:
        place = self._place
        try:
            return place is None or os.stat(place.path).st_ino != self.identity or not place.is_still_there()
        except OSError:
            return True

    def make_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        if not self.identity:
            raise NamespaceError("the network namespace to connect from has not been found yet")
        return self._thread.submit(socket.socket, family, kind, protocol).result()


@contextmanager
def _opened(place: Place) -> Iterator[int]:
    try:
        fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(
            f"{place.path}: {error.strerror}: run as root, in the node's process namespace (hostPID: true)"
        ) from error
    try:
        if not place.is_still_there():
            raise NamespaceError(f"{place.path}: its process ended while it was being entered")
        yield fd
    finally:
        os.close(fd)


def _set_network_namespace(fd: int, path: str) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        why = os.strerror(ctypes.get_errno())
        raise NamespaceError(f"{path} cannot be entered: {why}: CAP_SYS_ADMIN is needed for --netns")


def network_namespace(where: str) -> NetworkNamespace:
    """The namespace that --netns names.

    Args:
        where: "self", "process:NAME", or a path.
    """
    return NetworkNamespace() if where == "self" else OtherNamespace(lambda: _find(where))


def go_to(where: str) -> None:
    """Has this thread, and every thread and process that it starts from now on, live in the namespace.

    Args:
        where: As `network_namespace`.

    Raises:
        NamespaceError: It is nowhere, or cannot be entered.
    """
    if where == "self":
        return
    place = _find(where)
    with _opened(place) as fd:
        _set_network_namespace(fd, place.path)


def _find(where: str) -> Place:
    kind, colon, name = where.partition(":")
    return _of_process(name) if colon and kind == "process" else Place(where, None, lambda: True)


def _of_process(name: str) -> Place:
    """Finds a process of the node by its name (comm, proc(5)).

    Whatever runs in a pod may call itself as it likes, and would draw the node's migrations into its own network:
    only processes of this one's user, PID namespace and user namespace count, where no ordinary pod is.
    """
    found = dict(_trusted(name))
    if not found:
        raise NamespaceError(f"no process called {name} runs on this node (yet), or this pod lacks hostPID: true")
    if len(found) > 1:
        pids = ", ".join(map(str, sorted(found.values())))
        raise NamespaceError(f"several processes are called {name}, in different network namespaces: {pids}")
    (pid,) = found.values()
    return Place(f"/proc/{pid}/ns/net", _pod_ip(pid), lambda: _is_called(pid, name))


def _trusted(name: str) -> Iterator[tuple[int, int]]:
    """Yields the network namespace (inode) and the PID of each."""
    for entry in os.listdir("/proc"):
        # A process may end, or deny to be looked into, at any moment: it is not the one then.
        with suppress(OSError):
            if entry.isdecimal() and _is_called(int(entry), name) and _is_of_this_node(entry):
                yield os.stat(f"/proc/{entry}/ns/net").st_ino, int(entry)


def _is_of_this_node(pid: str) -> bool:
    same = (os.stat(f"/proc/{pid}/ns/{kind}").st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino for kind in _TRUST)
    return os.stat(f"/proc/{pid}").st_uid == os.geteuid() and all(same)


_TRUST: Final = ("pid", "user")


def _is_called(pid: int, name: str) -> bool:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().rstrip(b"\n") == name.encode()[:15]  # the kernel keeps 15 bytes
    except OSError:
        return False


def _pod_ip(pid: int) -> IPAddress | None:
    """MY_POD_IP of the process, from which virt-handler takes the address to publish without a migration network."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
        values = [one.removeprefix(_POD_IP_VARIABLE).decode() for one in variables if one.startswith(_POD_IP_VARIABLE)]
        return ipaddress.ip_address(values[0]) if values else None
    except (OSError, ValueError):
        return None
