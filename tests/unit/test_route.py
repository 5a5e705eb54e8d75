"""From which address a target is reached: the decision as a table of what the kernel says."""

from ipaddress import ip_address

import pytest

from migproxy.netif import MigrationAddress
from migproxy.portmap import IPAddress
from migproxy.route import Departure, Route, choose

pytestmark = pytest.mark.tier("gate")

TARGET = ip_address("10.3.3.3")
ONE, TWO, OTHER = map(ip_address, ("10.1.1.1", "10.2.2.1", "192.168.0.5"))
NONE = Route(refusal="the kernel has none")
BY_ETH0 = Route("eth0", "192.168.0.1")
BY_MIGRATION0 = Route("migration0")
UNKNOWN = Route()


def own(*addresses: object, interface: str | None = "migration0") -> MigrationAddress:
    return MigrationAddress(tuple(map(ip_address, map(str, addresses))), "interface migration0", None, interface)


@pytest.mark.parametrize(
    ("preferred", "routes", "address"),
    [
        (ONE, {}, ONE),
        (TWO, {}, TWO),  # of the target's network
        (OTHER, {ONE: BY_ETH0, TWO: BY_MIGRATION0}, TWO),  # routed by the source's address
        (None, {ONE: NONE, TWO: BY_MIGRATION0}, TWO),
        (None, {ONE: UNKNOWN, TWO: BY_MIGRATION0}, TWO),
        (OTHER, {ONE: UNKNOWN, TWO: UNKNOWN}, ONE),
        (ip_address("127.0.0.1"), {ONE: Route("lo"), TWO: Route("lo")}, ONE),  # the target is this node itself
    ],
)
def test_a_target_is_reached_from_the_address_that_its_route_has(
    preferred: IPAddress, routes: dict[IPAddress, Route], address: IPAddress
) -> None:
    departure = choose(TARGET, own(ONE, TWO), preferred, routes.__getitem__)
    assert departure == Departure(address)


def test_packets_that_leave_by_another_interface_are_told_with_a_remedy() -> None:
    departure = choose(TARGET, own(ONE, TWO), OTHER, {ONE: NONE, TWO: BY_ETH0}.__getitem__)
    assert departure.address == TWO
    assert departure.has_route
    assert departure.problem == (
        "packets from 10.2.2.1 (interface migration0) to 10.3.3.3 leave by eth0 via 192.168.0.1, not by migration0, "
        "and may stay unanswered: add a route (ip route add 10.3.3.3 via ROUTER dev migration0), or give both nodes "
        "addresses of one network"
    )


def test_an_address_of_an_interface_that_carries_nothing_leaves_by_another() -> None:
    departure = choose(TARGET, own(ONE, interface=None), OTHER, {ONE: BY_ETH0}.__getitem__)
    assert departure == Departure(ONE)


def test_an_address_without_a_route_is_not_taken_where_another_one_has_one() -> None:
    departure = choose(TARGET, own(ONE, TWO, interface=None), OTHER, {ONE: NONE, TWO: BY_ETH0}.__getitem__)
    assert departure == Departure(TWO)


def test_where_no_route_leads_there_both_addresses_and_the_remedy_are_told() -> None:
    departure = choose(TARGET, own(ONE, TWO), None, {ONE: NONE, TWO: NONE}.__getitem__)
    assert departure.address == ONE
    assert not departure.has_route
    assert departure.problem == (
        "no route from 10.1.1.1 (interface migration0) to 10.3.3.3: the kernel has none: add a route (ip route add "
        "10.3.3.3 via ROUTER dev migration0), or give both nodes addresses of one network"
    )
