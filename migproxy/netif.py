"""This node's migration address: which it is, and following it while it changes.

KubeVirt's virt-handler takes the first global-unicast address of the interface migration0, or the pod's IP
where there is no such interface, and looks once, at its start. This follows rtnetlink(7) instead: a message
in the link and address groups only says that something changed, and the state is then read anew. That is
right after any loss of messages too, and needs no copy of the kernel's tables. (pyroute2 encodes and decodes;
its own asynchronous socket cannot be used, as uvloop refuses to open a datagram endpoint on AF_NETLINK.)
"""

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address
from typing import Any, Final

from migproxy.imports import bare
from migproxy.portmap import IPAddress, unmapped

with bare("pyroute2"):  # whose __init__ loads every protocol there is
    from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE
    from pyroute2.netlink.marshal import Marshal
    from pyroute2.netlink.rtnl import (
        RTM_GETADDR,
        RTM_GETLINK,
        RTM_NEWADDR,
        RTM_NEWLINK,
        RTMGRP_IPV4_IFADDR,
        RTMGRP_IPV6_IFADDR,
        RTMGRP_LINK,
    )
    from pyroute2.netlink.rtnl.ifaddrmsg import (
        IFA_F_DADFAILED,
        IFA_F_DEPRECATED,
        IFA_F_OPTIMISTIC,
        IFA_F_SECONDARY,
        IFA_F_TENTATIVE,
        ifaddrmsg,
    )
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
DUMP_ATTEMPTS: Final = 10
REPLY_SECONDS: Final = 10.0

# Linux headers: if.h, socket.h, netlink.h. Python's socket module has none of them.
_IFF_UP: Final = 0x1
_SOL_NETLINK: Final = 270
_NETLINK_GET_STRICT_CHK: Final = 12


@dataclass(frozen=True, slots=True)
class MigrationAddress:
    """The addresses of this node that migrations may come in on.

    Args:
        addresses: all that could serve; the first is the one to use. Empty: there is none.
        source: where they are from, for messages: "interface migration0", "--migration-address", "--pod-ip".
        problem: what is wrong and what to do about it; addresses that were good before may still be there.
    """

    addresses: tuple[IPAddress, ...]
    source: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An address on an interface, with the kernel's IFA_F_ flags."""

    address: IPAddress
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface.

    Args:
        is_up: administratively up (IFF_UP).
        addresses: in the kernel's order.
    """

    is_up: bool
    addresses: tuple[InterfaceAddress, ...]


def is_global_unicast(address: IPAddress) -> bool:
    """What Go's net.IP.IsGlobalUnicast says; private ranges count, unlike in Python's `is_global`."""
    address = unmapped(address)
    return not (
        address.is_unspecified
        or address.is_loopback
        or address.is_multicast
        or address.is_link_local
        or address == IPv4Address("255.255.255.255")
    )


def usable_addresses(interface: Interface) -> tuple[IPAddress, ...]:
    """The global-unicast addresses that can be bound, best first.

    An address under or past a failed duplicate address detection cannot be bound. Deprecated ones come last,
    secondary (IPv4) and temporary (IPv6) ones after those that are there to stay.
    """
    unusable = IFA_F_TENTATIVE | IFA_F_DADFAILED
    usable = [
        one
        for one in interface.addresses
        if is_global_unicast(one.address) and (not one.flags & unusable or one.flags & IFA_F_OPTIMISTIC)
    ]
    usable.sort(key=lambda one: (bool(one.flags & IFA_F_DEPRECATED), bool(one.flags & IFA_F_SECONDARY)))
    return tuple(dict.fromkeys(one.address for one in usable))


def choose(
    name: str,
    interface: Interface | None,
    *,
    override: IPAddress | None = None,
    pod_ip: IPAddress | None = None,
    foreign: Collection[IPAddress] = (),
) -> MigrationAddress:
    """Decide which address is the migration address.

    Args:
        name: of the migration interface.
        interface: its state; None: it does not exist.
        override: --migration-address, which beats everything.
        pod_ip: used where the interface does not exist, and only there.
        foreign: those of override and pod_ip that are not addresses of this node.
    """
    if override is not None:
        return _given(override, "--migration-address", foreign)
    if interface is not None:
        return _of_interface(name, interface, usable_addresses(interface))
    if pod_ip is not None:
        return _given(pod_ip, "--pod-ip", foreign)
    return MigrationAddress(
        (),
        f"interface {name}",
        f"there is no interface {name}: create it, or give --migration-interface, --migration-address or --pod-ip",
    )


def _given(address: IPAddress, option: str, foreign: Collection[IPAddress]) -> MigrationAddress:
    if address.is_unspecified or address.is_multicast:
        problem = f"{address} is no address that one host could be reached at: change {option}"
    elif address in foreign:
        problem = f"{address} is not an address of this node: add it to an interface, or change {option}"
    else:
        return MigrationAddress((address,), option, None)
    return MigrationAddress((), option, problem)


def _of_interface(name: str, interface: Interface, usable: tuple[IPAddress, ...]) -> MigrationAddress:
    source = f"interface {name}"
    if not interface.is_up:
        return MigrationAddress((), source, f"interface {name} is down: ip link set {name} up")
    if usable:
        return MigrationAddress(usable, source, None)
    candidates = [one for one in interface.addresses if is_global_unicast(one.address)]
    if not candidates:
        problem = f"interface {name} has no global-unicast address: give it one (ip address add ... dev {name})"
    elif candidates[0].flags & IFA_F_DADFAILED:
        problem = f"another host has the address {candidates[0].address} of interface {name}: change one of them"
    else:
        problem = (
            f"the address {candidates[0].address} of interface {name} is still checked for duplicates:"
            " wait; without a carrier it will not end"
        )
    return MigrationAddress((), source, problem)


class AddressWatcher:
    """Follows the migration address.

    Args:
        interface: name of the migration interface.
        override: --migration-address.
        pod_ip: --pod-ip.
    """

    def __init__(
        self,
        interface: str,
        override: IPAddress | None = None,
        pod_ip: IPAddress | None = None,
    ) -> None:
        self._interface = interface
        self._override = override and unmapped(override)
        self._pod_ip = pod_ip and unmapped(pod_ip)

    async def states(self) -> AsyncGenerator[MigrationAddress, None]:
        """Yield the migration address as it is now, and then each time it is another one or has a problem.

        Where netlink itself fails, the last addresses stay, with the problem, and it is tried again.
        """
        source = "--migration-address" if self._override else f"interface {self._interface}"
        last: MigrationAddress | None = None
        failures = 0
        while True:
            try:
                async with aclosing(self._follow()) as states:
                    async for state in states:
                        failures = 0
                        if state != last:
                            last = state
                            yield state
            except OSError as error:
                problem = f"cannot read the addresses of this node from the kernel, trying again: {error}"
            failed = replace(last or MigrationAddress((), source, None), problem=problem)
            if failed != last:
                last = failed
                yield failed
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    async def _follow(self) -> AsyncGenerator[MigrationAddress, None]:
        with _netlink_socket() as bell:
            bell.setblocking(False)
            bell.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
            while True:
                # In a thread: the kernel answers under a lock that others may hold for long.
                yield await asyncio.to_thread(self._look)
                await _rung(bell)

    def _look(self) -> MigrationAddress:
        given = {address for address in (self._override, self._pod_ip) if address}
        return choose(
            self._interface,
            None if self._override else read_interface(self._interface),
            override=self._override,
            pod_ip=self._pod_ip,
            foreign={address for address in given if not _is_own(address)},
        )


async def _rung(bell: socket.socket) -> None:
    """Wait for messages, and drop all that have come: one look answers them all."""
    try:
        await asyncio.get_running_loop().sock_recv(bell, 65536)
        while True:
            bell.recv(65536)
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno != errno.ENOBUFS:  # messages were lost, which says as much as a message
            raise


def _is_own(address: IPAddress) -> bool:
    """Whether this node could listen on an address: asked of the kernel, which knows all of 127.0.0.0/8."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL):
            raise
        return False
    return True


def read_interface(name: str) -> Interface | None:
    """Ask the kernel for an interface; None where it does not exist.

    Raises:
        OSError: rtnetlink failed.
    """
    link, query = ifinfmsg(), ifaddrmsg()
    link["attrs"] = [("IFLA_IFNAME", name)]
    try:
        (found,) = _request(link, RTM_GETLINK, 0)
        query["index"] = found["index"]
        addresses = _request(query, RTM_GETADDR, NLM_F_DUMP)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return None
    return Interface(
        is_up=bool(found["flags"] & _IFF_UP),
        addresses=tuple(
            # On a point-to-point link, IFA_ADDRESS is the other end's; IPv6 has IFA_LOCAL only there.
            InterfaceAddress(ip_address(one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS")), one["flags"])
            for one in addresses
            if one["index"] == found["index"]
        ),
    )


def _request(message: Any, kind: int, flags: int) -> list[Any]:
    message["header"] = {"type": kind, "flags": NLM_F_REQUEST | flags, "sequence_number": 1, "pid": 0}
    message.encode()
    for _ in range(DUMP_ATTEMPTS):
        with _netlink_socket() as netlink:
            netlink.settimeout(REPLY_SECONDS)
            # The kernel then filters a dump of addresses by the query's interface.
            netlink.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            netlink.send(message.data)
            replies = _replies(netlink, is_dump=bool(flags & NLM_F_DUMP))
        if not any(reply["header"]["flags"] & NLM_F_DUMP_INTR for reply in replies):
            return [reply for reply in replies if reply["header"]["type"] != NLMSG_DONE]
    raise OSError(errno.EAGAIN, "the addresses change faster than they can be read")


def _replies(netlink: socket.socket, *, is_dump: bool) -> list[Any]:
    marshal = Marshal()
    marshal.msg_map = {RTM_NEWLINK: ifinfmsg, RTM_NEWADDR: ifaddrmsg}
    replies: list[Any] = []
    while not replies or (is_dump and replies[-1]["header"]["type"] != NLMSG_DONE):
        for reply in marshal.parse(netlink.recv(1 << 18)):
            if reply["header"]["error"]:
                raise OSError(reply["header"]["error"].code, str(reply["header"]["error"]))
            replies.append(reply)
    return replies


def _netlink_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
