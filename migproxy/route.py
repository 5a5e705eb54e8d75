"""From which of this node's migration addresses a target is reached, and by which interface.

The kernel sends packets where its routes lead, whatever interface their address is on. From an address that is not of
the target's network they may leave where nobody answers them: on an interface with addresses of two networks, or after
a renumbering. A socket that is connected without an address of its own gets the one that the kernel would use, in
12 microseconds; what else there is to know is asked of rtnetlink(7), in 160. Neither waits for a lock of the kernel's
(RTM_GETROUTE needs none since Linux 4.14).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from migproxy.imports import bare
from migproxy.netif import MigrationAddress, is_own, request
from migproxy.portmap import IPAddress
from migproxy.sockets import address_of, family, sockaddr

with bare("pyroute2"):
    from pyroute2.netlink.rtnl import RTM_GETROUTE
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

_REFUSALS: Final = {
    errno.ENETUNREACH: "the kernel has none",
    errno.EHOSTUNREACH: "the kernel's is of type unreachable",
    errno.EACCES: "the kernel's is of type prohibit",
    errno.EINVAL: "the kernel's is of type blackhole",
}
"""What the kernel answers instead of a route (net/ipv4/fib_semantics.c, net/ipv6/route.c), for people."""

_GONE: Final = "it is not an address of this node any more"
"""For which the kernel has no error of its own: with IPv4 that of no route or a blackhole, with IPv6 none."""

_LOOPBACK: Final = "lo"
_ANY_PORT: Final = 9


@dataclass(frozen=True, slots=True)
class Route:
    """How packets from one of this node's addresses get to a target.

    Args:
        interface: by which they leave, "lo" to this node itself; None where there is no route, or it is not known.
        gateway: the router that they are given to; None where the target is on the link.
        refusal: why there is no route, for people; None where there is one, or it is not known.
    """

    interface: str | None = None
    gateway: str | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        """By interface and router; empty where that is not known."""
        via = f" via {self.gateway}" if self.gateway else ""
        return f" by {self.interface}{via}" if self.interface else ""


@dataclass(frozen=True, slots=True)
class Departure:
    """From where a target is reached.

    Args:
        address: the migration address to connect from.
        problem: why the target is not reached, or may not answer, and what to do; None where nothing says so.
        has_route: whether anything gets to the target at all.
    """

    address: IPAddress
    problem: str | None = None
    has_route: bool = True


def depart(target: IPAddress, own: MigrationAddress) -> Departure:
    """Find out from where a target is reached.

    Args:
        target: what is to be connected to.
        own: this node's addresses of the target's IP version, one at least.
    """
    return choose(target, own, kernels_choice(target), lambda address: look_up(target, address))


def local_address(target: IPAddress, own: MigrationAddress) -> IPAddress:
    """The address to connect from, as `depart` has it; costs nothing where there is but one.

    Args:
        target, own: as there.
    """
    return own.addresses[0] if len(own.addresses) == 1 else depart(target, own).address


def choose(
    target: IPAddress,
    own: MigrationAddress,
    preferred: IPAddress | None,
    route_from: Callable[[IPAddress], Route],
) -> Departure:
    """Decide from where a target is reached.

    It is the kernel's own choice, where that is a migration address. Else it is one whose packets leave by the
    migration interface (routing by source address), or one from which a route leads there at all: by routers of
    the network that know the address, as where BGP announces one of a loopback or dummy interface.

    Args:
        target: what is to be connected to.
        own: this node's addresses of the target's IP version, best first, one at least.
        preferred: the address that the kernel would use, None where it has no route.
        route_from: the route from an address.
    """
    if preferred in own.addresses:
        return Departure(preferred)
    routes = {address: route_from(address) for address in own.addresses}
    routed = [address for address, route in routes.items() if not route.refusal]
    straight = [address for address in routed if routes[address].interface in (own.interface, _LOOPBACK)]
    address = [*straight, *routed, *routes][0]
    route = routes[address]
    if route.refusal:
        return Departure(address, no_route(target, own, address, route), has_route=False)
    if address in straight or None in (route.interface, own.interface):
        return Departure(address)
    return Departure(address, _detour(target, own, address, route))


def no_route(target: IPAddress, own: MigrationAddress, address: IPAddress, route: Route) -> str:
    """What to say of a route that there is not, from one of this node's addresses, and what to do."""
    remedy = "give it back, or wait for another one" if route.refusal == _GONE else _remedy(target, own)
    return f"no route from {address} ({own.source}) to {target}: {route.refusal}: {remedy}"


def _detour(target: IPAddress, own: MigrationAddress, address: IPAddress, route: Route) -> str:
    return (
        f"packets from {address} ({own.source}) to {target} leave{route}, not by {own.interface}, and may stay "
        f"unanswered: {_remedy(target, own)}"
    )


def _remedy(target: IPAddress, own: MigrationAddress) -> str:
    by = f" dev {own.interface}" if own.interface else ""
    return f"add a route (ip route add {target} via ROUTER{by}), or give both nodes addresses of one network"


def kernels_choice(target: IPAddress) -> IPAddress | None:
    """The address that the kernel would use, whoever may use it; None where it has no route. No packet is sent."""
    try:
        with socket.socket(family(target), socket.SOCK_DGRAM) as probe:
            probe.connect(sockaddr(target, _ANY_PORT))
            return address_of(probe.getsockname())
    except OSError:
        return None


class _Question(rtmsg):  # type: ignore[misc]
    """With attributes that pyroute2's own lacks (linux/rtnetlink.h)."""

    nla_map = (
        *rtmsg.nla_map,
        ("RTA_PAD", "none"),
        ("RTA_UID", "uint32"),
        ("RTA_TTL_PROPAGATE", "uint8"),
        ("RTA_IP_PROTO", "uint8"),
    )


def look_up(target: IPAddress, source: IPAddress) -> Route:
    """Ask the kernel for TCP's route from one of its addresses to a target; what it does not tell is not known.

    A rule may be of one protocol (ip rule add ipproto tcp). A kernel before Linux 4.18 has no such rules, and ignores
    the question's RTA_IP_PROTO.
    """
    message, bits = _Question(), target.max_prefixlen
    message["family"], message["dst_len"], message["src_len"] = family(target), bits, bits
    try:
        if not is_own(source):
            return Route(refusal=_GONE)
        host, _, *zone = sockaddr(target, 0)
        message["attrs"] = [
            ("RTA_DST", host),
            ("RTA_SRC", sockaddr(source, 0)[0]),
            ("RTA_IP_PROTO", socket.IPPROTO_TCP),
        ]
        if zone:
            message["attrs"].append(("RTA_OIF", zone[1]))
        (found,) = request(message, RTM_GETROUTE, 0)
        return Route(socket.if_indextoname(found.get_attr("RTA_OIF") or 0), found.get_attr("RTA_GATEWAY"))
    except OSError as error:
        return Route(refusal=_REFUSALS.get(error.errno or 0))
