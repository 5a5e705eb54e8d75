"""The migration address: the rules as a table, and following real interfaces."""

import asyncio
import itertools
import os
import socket
import subprocess
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop
from pyroute2.netlink.rtnl import RTM_GETLINK
from pyroute2.netlink.rtnl.ifaddrmsg import (
    IFA_F_DADFAILED,
    IFA_F_DEPRECATED,
    IFA_F_OPTIMISTIC,
    IFA_F_SECONDARY,
    IFA_F_TENTATIVE,
)

from migproxy import netif
from migproxy.netif import AddressWatcher, Interface, InterfaceAddress, MigrationAddress, choose, is_global_unicast

pytestmark = pytest.mark.tier("gate")

numbers = itertools.count()


# The rules


@pytest.mark.parametrize("address", ["10.1.1.1", "192.168.0.1", "100.64.0.1", "8.8.8.8", "fd00::1", "2001:db8::1"])
def test_private_addresses_are_global_unicast_as_in_go(address: str) -> None:
    assert is_global_unicast(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "239.1.1.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.1.1"),
    ],
)
def test_addresses_that_no_other_host_can_dial_are_not(address: str) -> None:
    assert not is_global_unicast(ip_address(address))


def interface(*addresses: str | tuple[str, int], is_up: bool = True) -> Interface:
    pairs = [address if isinstance(address, tuple) else (address, 0) for address in addresses]
    return Interface(is_up, tuple(InterfaceAddress(ip_address(address), flags) for address, flags in pairs))


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["10.1.1.2", "10.1.1.1"], ["10.1.1.2", "10.1.1.1"]),
        (["169.254.0.1", "10.1.1.1", "fd00::1", "fe80::1"], ["10.1.1.1", "fd00::1"]),
        (["fe80::1", "fd00::1"], ["fd00::1"]),
        ([("fd00::2", IFA_F_TENTATIVE), "fd00::1"], ["fd00::1"]),
        ([("fd00::2", IFA_F_TENTATIVE | IFA_F_OPTIMISTIC), "fd00::1"], ["fd00::2", "fd00::1"]),
        ([("fd00::2", IFA_F_TENTATIVE | IFA_F_DADFAILED), "fd00::1"], ["fd00::1"]),
        ([("fd00::3", IFA_F_DEPRECATED), ("fd00::2", IFA_F_SECONDARY), "fd00::1"], ["fd00::1", "fd00::2", "fd00::3"]),
    ],
)
def test_the_first_usable_address_in_the_kernels_order(addresses: list[Any], expected: list[str]) -> None:
    chosen = choose("migration0", interface(*addresses), pod_ip=ip_address("10.9.9.9"))
    assert chosen == MigrationAddress(tuple(map(ip_address, expected)), "interface migration0", None, "migration0")


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (interface(), "no global-unicast address: give it one"),
        (interface("fe80::1"), "no global-unicast address"),
        (interface("10.1.1.1", is_up=False), "is down: ip link set migration0 up"),
        (interface(("fd00::1", IFA_F_TENTATIVE)), "fd00::1 of interface migration0 is still checked"),
        (interface(("fd00::1", IFA_F_TENTATIVE | IFA_F_DADFAILED)), "another host has the address fd00::1"),
    ],
)
def test_an_interface_without_a_usable_address_is_a_problem_and_never_the_pod_ip(
    state: Interface, problem: str
) -> None:
    chosen = choose("migration0", state, pod_ip=ip_address("10.9.9.9"))
    assert not chosen.addresses
    assert chosen.problem
    assert problem in chosen.problem


def test_the_pod_ip_serves_only_where_the_interface_does_not_exist() -> None:
    pod_ip = ip_address("10.9.9.9")
    chosen = choose("migration0", None, pod_ip=pod_ip, holders={pod_ip: "eth0"})
    assert chosen == MigrationAddress((pod_ip,), "--pod-ip", None, "eth0")
    nothing = choose("migration0", None)
    assert not nothing.addresses
    assert nothing.problem
    assert "there is no interface migration0" in nothing.problem
    assert "--pod-ip" in nothing.problem


def test_the_override_beats_all_and_must_be_an_address_of_this_node() -> None:
    override = ip_address("10.2.2.2")
    good = choose(
        "migration0", interface("10.1.1.1"), override=override, pod_ip=ip_address("10.9.9.9"), holders={override: "lo"}
    )
    assert good == MigrationAddress((override,), "--migration-address", None, "lo")
    bad = choose("migration0", interface("10.1.1.1"), override=override)
    assert not bad.addresses
    assert bad.problem == (
        "10.2.2.2 is not an address of this node: add it to an interface, or change --migration-address"
    )


def test_no_packet_leaves_by_an_interface_that_only_holds_an_address() -> None:
    chosen = choose("bgp0", Interface(True, (InterfaceAddress(ip_address("10.1.1.1")),), carries=False))
    assert chosen == MigrationAddress((ip_address("10.1.1.1"),), "interface bgp0", None, None)


# Real interfaces


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


@pytest.fixture
def link() -> Iterator[str]:
    """One end of a veth pair, up, with a carrier, and without any address."""
    name = f"mig{next(numbers)}"
    create(name)
    yield name
    subprocess.run(["ip", "link", "delete", name], check=False, stderr=subprocess.DEVNULL, timeout=30)


def create(name: str) -> None:
    ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")
    for end in (name, f"{name}-peer"):
        ip("link", "set", end, "addrgenmode", "none", "up")


class Follower:
    """The states of an address watcher, with bounded patience."""

    def __init__(self, watcher: AddressWatcher) -> None:
        self.states: AsyncGenerator[MigrationAddress, None] = watcher.states()
        self.seen: list[MigrationAddress] = []

    async def next(self) -> MigrationAddress:
        self.seen.append(await asyncio.wait_for(anext(self.states), 20))
        return self.seen[-1]

    async def until(self, *addresses: str, problem: str | None = None) -> MigrationAddress:
        """Go on until these are the addresses and the problem contains this."""
        while True:
            state = await self.next()
            matches = state.problem is None if problem is None else problem in (state.problem or "")
            if matches and [str(address) for address in state.addresses] == [*addresses]:
                return state


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on uvloop (the daemon's) and on asyncio's own loop."""

    @pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
    def run(factory: Callable[[], asyncio.AbstractEventLoop], link: str) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(test(link))

    return run


@on_both_loops
async def test_the_state_now_comes_first_and_then_each_change(link: str) -> None:
    ip("address", "add", "10.1.1.1/24", "dev", link)
    follower = Follower(AddressWatcher(link))
    assert await follower.next() == MigrationAddress((ip_address("10.1.1.1"),), f"interface {link}", None, link)
    ip("address", "add", "10.1.2.1/24", "dev", link)
    await follower.until("10.1.1.1", "10.1.2.1")
    ip("address", "delete", "10.1.1.1/24", "dev", link)
    await follower.until("10.1.2.1")
    ip("address", "delete", "10.1.2.1/24", "dev", link)
    await follower.until(problem="no global-unicast address")
    ip("address", "add", "10.1.3.1/24", "dev", link)
    await follower.until("10.1.3.1")
    ip("link", "set", link, "down")
    await follower.until(problem="is down")
    ip("link", "set", link, "up")
    await follower.until("10.1.3.1")
    assert all(one != other for one, other in itertools.pairwise(follower.seen))
    await follower.states.aclose()


@on_both_loops
async def test_an_interface_that_comes_and_goes(link: str) -> None:
    ip("link", "delete", link)
    follower = Follower(AddressWatcher(link, pod_ip=ip_address("127.0.0.3")))
    assert (await follower.next()).source == "--pod-ip"
    for number in (1, 2):
        create(link)
        ip("address", "add", f"10.1.1.{number}/24", "dev", link)
        await follower.until(f"10.1.1.{number}")
        ip("link", "delete", link)
        await follower.until("127.0.0.3")
    await follower.states.aclose()


@on_both_loops
async def test_a_macvlan_as_multus_makes_it(link: str) -> None:
    name = f"{link}-mv"
    follower = Follower(AddressWatcher(name))
    await follower.until(problem="there is no interface")
    ip("link", "add", name, "link", link, "type", "macvlan", "mode", "bridge")
    ip("link", "set", name, "up")
    ip("address", "add", "10.1.1.7/24", "dev", name)
    await follower.until("10.1.1.7")
    ip("link", "delete", name)
    await follower.until(problem="there is no interface")
    await follower.states.aclose()


@on_both_loops
async def test_ipv6_counts_once_it_is_known_to_be_no_duplicate(link: str) -> None:
    ip("address", "add", "fe80::7/64", "dev", link, "nodad")
    follower = Follower(AddressWatcher(link))
    await follower.until(problem="no global-unicast address")
    Path(f"/proc/sys/net/ipv6/conf/{link}/router_solicitation_delay").write_text("0")
    Path(f"/proc/sys/net/ipv6/neigh/{link}/retrans_time_ms").write_text("50")
    ip("link", "set", f"{link}-peer", "down")  # without a carrier the check does not end
    ip("address", "add", "fd00::1/64", "dev", link)
    assert "still checked for duplicates" in ((await follower.next()).problem or "")
    ip("link", "set", f"{link}-peer", "up")
    await follower.until("fd00::1")
    with socket.create_server(("fd00::1", 0), family=socket.AF_INET6):
        pass
    ip("address", "add", "10.1.1.1/24", "dev", link)
    await follower.until("10.1.1.1", "fd00::1")
    await follower.states.aclose()


@on_both_loops
async def test_an_ipv6_duplicate_is_named(link: str) -> None:
    ip("address", "add", "fd00::1/64", "dev", f"{link}-peer", "nodad")
    ip("address", "add", "fd00::1/64", "dev", link)
    follower = Follower(AddressWatcher(link))
    await follower.until(problem="another host has the address fd00::1")
    await follower.states.aclose()


@on_both_loops
async def test_the_address_of_a_point_to_point_link_is_our_own_end(link: str) -> None:
    ip("address", "add", "10.1.1.1", "peer", "10.1.1.2", "dev", link)
    ip("address", "add", "fd00::1", "peer", "fd00::2", "dev", link, "nodad")
    follower = Follower(AddressWatcher(link))
    await follower.until("10.1.1.1", "fd00::1")
    await follower.states.aclose()


@on_both_loops
async def test_an_override_is_followed_too(link: str) -> None:
    follower = Follower(AddressWatcher("no-such", override=ip_address("10.1.1.5")))
    await follower.until(problem="10.1.1.5 is not an address of this node")
    ip("address", "add", "10.1.1.5/24", "dev", link)
    state = await follower.until("10.1.1.5")
    assert state.source == "--migration-address"
    ip("address", "delete", "10.1.1.5/24", "dev", link)
    await follower.until(problem="is not an address of this node")
    await follower.states.aclose()


@on_both_loops
async def test_any_loopback_address_may_be_given(link: str) -> None:
    follower = Follower(AddressWatcher(link, override=ip_address("127.0.0.2")))
    assert (await follower.until("127.0.0.2")).interface is None
    await follower.states.aclose()


@on_both_loops
async def test_the_interface_of_an_address_that_is_given_is_found(link: str) -> None:
    ip("address", "add", "10.1.1.5/24", "dev", link)
    ip("address", "add", "fe80::5/64", "dev", link, "nodad")
    ip("address", "add", "fe80::5/64", "dev", f"{link}-peer", "nodad")
    for address in ("10.1.1.5", f"fe80::5%{link}", f"fe80::5%{link}-peer"):
        follower = Follower(AddressWatcher("no-such", override=ip_address(address)))
        assert (await follower.until(address)).interface == (address.partition("%")[2] or link)
        await follower.states.aclose()
    follower = Follower(AddressWatcher("no-such", override=ip_address("fe80::5%no-such")))
    await follower.until(problem="fe80::5%no-such is not an address of this node")
    await follower.states.aclose()


@pytest.mark.parametrize(("kind", "carries"), [("veth", True), ("dummy", False)])
def test_a_dummy_interface_is_none_to_leave_by(
    link: str, kind: str, carries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each kernel has them: another one's answer says that it is one."""
    ask = netif.request

    def request(message: Any, what: int, flags: int) -> list[Any]:
        answers = ask(message, what, flags)
        for one in answers:
            for name, value in one["attrs"] if what == RTM_GETLINK else ():
                if name == "IFLA_LINKINFO":
                    value["attrs"] = [("IFLA_INFO_KIND", kind)]
        return answers

    monkeypatch.setattr(netif, "request", request)
    state = netif.read_interface(link)
    assert state
    assert state.carries is carries


@on_both_loops
async def test_lost_messages_do_no_harm(link: str) -> None:
    ip("address", "add", "10.1.1.1/24", "dev", link)
    follower = Follower(AddressWatcher(link))
    await follower.until("10.1.1.1")
    # The loop stands still meanwhile: more messages than the netlink socket can hold (ENOBUFS).
    batch = "".join(f"address {verb} 10.2.0.1/24 dev {link}\n" for _ in range(3000) for verb in ("add", "del"))
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True, timeout=60)
    ip("address", "delete", "10.1.1.1/24", "dev", link)
    ip("address", "add", "10.1.1.2/24", "dev", link)
    await follower.until("10.1.1.2")
    await follower.states.aclose()


@on_both_loops
async def test_a_failure_of_netlink_keeps_the_last_address_and_is_tried_again(link: str) -> None:
    real, failing = netif.read_interface, False

    def read_interface(name: str) -> Interface | None:
        if failing:
            raise OSError(12, "Cannot allocate memory")
        return real(name)

    ip("address", "add", "10.1.1.1/24", "dev", link)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(netif, "read_interface", read_interface)
        patch.setattr(netif, "RETRY_SECONDS", (0.01, 0.02))
        follower = Follower(AddressWatcher(link))
        await follower.until("10.1.1.1")
        failing = True
        ip("address", "add", "10.1.2.1/24", "dev", link)
        await follower.until("10.1.1.1", problem="Cannot allocate memory")
        failing = False
        await follower.until("10.1.1.1", "10.1.2.1")
        await follower.states.aclose()


@on_both_loops
async def test_nothing_is_left_open(link: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    follower = Follower(AddressWatcher(link))
    await follower.next()
    await follower.states.aclose()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_kernel_filters_the_addresses_of_many_interfaces(link: str) -> None:
    for number in range(20):
        ip("address", "add", f"10.3.{number}.1/24", "dev", f"{link}-peer")
        ip("address", "add", f"10.4.{number}.1/24", "dev", link)
    state = netif.read_interface(link)
    assert state
    assert [str(one.address) for one in state.addresses] == [f"10.4.{number}.1" for number in range(20)]
