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
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address
from typing import Any, Final

from migproxy.imports import bare
from migproxy.portmap import IPAddress, unmapped
from migproxy.sockets import family, sockaddr

with bare("pyroute2"):  # whose __init__ loads every protocol there is
    from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE
    from pyroute2.netlink.marshal import Marshal
    from pyroute2.netlink.rtnl import (
        RTM_GETADDR,
        RTM_GETLINK,
        RTM_NEWADDR,
        RTM_NEWLINK,
        RTM_NEWROUTE,
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
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
DUMP_ATTEMPTS: Final = 10
REPLY_SECONDS: Final = 10.0

# Linux headers: if.h, socket.h, netlink.h. Python's socket module has none of them.
_IFF_UP: Final = 0x1
_IFF_LOOPBACK: Final = 0x8
_SOL_NETLINK: Final = 270
_NETLINK_GET_STRICT_CHK: Final = 12


@dataclass(frozen=True, slots=True)
class MigrationAddress:
    """The addresses of this node that migrations may come in on.

    Args:
        addresses: all that could serve; the first is the one to use. Empty: there is none.
        source: where they are from, for messages: "interface migration0", "--migration-address", "--pod-ip".
        problem: what is wrong and what to do about it; addresses that were good before may still be there.
        interface: that has them, and by which packets from them should leave; None where none leave by it, as by a
            loopback interface, whose address others are told of by BGP.
    """

    addresses: tuple[IPAddress, ...]
    source: str
    problem: str | None
    interface: str | None = None

    def of_version(self, ip_version: int) -> "MigrationAddress | None":
        """The same with its addresses of an IP version (4 or 6) alone; None where there are none."""
        addresses = tuple(address for address in self.addresses if address.version == ip_version)
        return replace(self, addresses=addresses) if addresses else None


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
        carries: whether it can take packets to other nodes; a loopback or dummy interface cannot.
    """

    is_up: bool
    addresses: tuple[InterfaceAddress, ...]
    carries: bool = True


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
    holders: Mapping[IPAddress, str | None] | None = None,
) -> MigrationAddress:
    """Decide which address is the migration address.

    Args:
        name: of the migration interface.
        interface: its state; None: it does not exist.
        override: --migration-address, which beats everything.
        pod_ip: used where the interface does not exist, and only there.
        holders: the interfaces of those of override and pod_ip that are addresses of this node; see MigrationAddress.
    """
    if override is not None:
        return _given(override, "--migration-address", holders or {})
    if interface is not None:
        return _of_interface(name, interface, usable_addresses(interface))
    if pod_ip is not None:
        return _given(pod_ip, "--pod-ip", holders or {})
    return MigrationAddress(
        (),
        f"interface {name}",
        f"there is no interface {name}: create it, or give --migration-interface, --migration-address or --pod-ip",
    )


def _given(address: IPAddress, option: str, holders: Mapping[IPAddress, str | None]) -> MigrationAddress:
    if address not in holders:
        problem = f"{address} is not an address of this node: add it to an interface, or change {option}"
        return MigrationAddress((), option, problem)
    return MigrationAddress((address,), option, None, holders[address])


def _of_interface(name: str, interface: Interface, usable: tuple[IPAddress, ...]) -> MigrationAddress:
    source = f"interface {name}"
    if not interface.is_up:
        return MigrationAddress((), source, f"interface {name} is down: ip link set {name} up")
    if usable:
        return MigrationAddress(usable, source, None, name if interface.carries else None)
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
        self._override = override
        self._pod_ip = pod_ip

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
        given = [address for address in (self._override, self._pod_ip) if address and is_own(address)]
        return choose(
            self._interface,
            None if self._override else read_interface(self._interface),
            override=self._override,
            pod_ip=self._pod_ip,
            holders={address: _holder(address) for address in given},
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


def is_own(address: IPAddress) -> bool:
    """Whether this node could listen on an address: asked of the kernel, which knows all of 127.0.0.0/8."""
    try:
        with socket.socket(family(address), socket.SOCK_STREAM) as probe:
            probe.bind(sockaddr(address, 0))
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL, errno.ENODEV):
            raise
        return False
    return True


def _holder(address: IPAddress) -> str | None:
    """The interface by which packets from an address of this node should leave; see MigrationAddress."""
    host, _, zone = str(address).partition("%")
    for index, one in _addresses(0):
        if one.address == ip_address(host) and zone in ("", name := socket.if_indextoname(index)):
            interface = read_interface(name)
            return name if interface and interface.carries else None
    return None


def read_interface(name: str) -> Interface | None:
    """Ask the kernel for an interface; None where it does not exist.

    Raises:
        OSError: rtnetlink failed.
    """
    link = ifinfmsg()
    link["attrs"] = [("IFLA_IFNAME", name)]
    try:
        (found,) = request(link, RTM_GETLINK, 0)
        addresses = tuple(address for _, address in _addresses(found["index"]))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return None
    kind = found.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
    carries = kind != "dummy" and not found["flags"] & _IFF_LOOPBACK
    return Interface(bool(found["flags"] & _IFF_UP), addresses, carries)


def _addresses(index: int) -> Iterator[tuple[int, InterfaceAddress]]:
    """The addresses of an interface, or of all where that is 0, each with its interface."""
    query = ifaddrmsg()
    query["index"] = index
    for one in request(query, RTM_GETADDR, NLM_F_DUMP):
        if index in (0, one["index"]):
            # On a point-to-point link, IFA_ADDRESS is the other end's; IPv6 has IFA_LOCAL only there.
            address = ip_address(one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS"))
            yield one["index"], InterfaceAddress(address, one["flags"])


def request(message: Any, kind: int, flags: int) -> list[Any]:
    """Ask rtnetlink(7).

    Args:
        message: pyroute2's, its header apart.
        kind: of the request, RTM_GET...
        flags: NLM_F_DUMP, or 0 where one answer is due.

    Raises:
        OSError: what the kernel answers instead, or that it does not.
    """
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
    marshal.msg_map = {RTM_NEWLINK: ifinfmsg, RTM_NEWADDR: ifaddrmsg, RTM_NEWROUTE: rtmsg}
    replies: list[Any] = []
    while not replies or (is_dump and replies[-1]["header"]["type"] != NLMSG_DONE):
        for reply in marshal.parse(netlink.recv(1 << 18)):
            if reply["header"]["error"]:
                raise OSError(reply["header"]["error"].code, str(reply["header"]["error"]))
            replies.append(reply)
    return replies


def _netlink_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
