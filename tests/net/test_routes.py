"""Two nodes in two network namespaces: from which address the source connects, and what it says where it cannot."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from ipaddress import ip_address

import pytest

from demo.lab import run, until
from migproxy.netif import MigrationAddress
from migproxy.portmap import Channel
from migproxy.route import Departure, depart, look_up, no_route
from tests.net.nodes import Migration, Nodes, assert_ends, assert_logged, assert_reported, connect, make_nodes

pytestmark = pytest.mark.tier("gate")

At = tuple[str, ...]  # what runs a command at a node
SOAK = pytest.mark.tier("soak")
VERSIONS = pytest.mark.parametrize("version", [4, 6])


def of(version: int, network: int, host: int) -> str:
    """The address of a host in a network of an IP version."""
    return f"10.9.{network}.{host}" if version == 4 else f"fd09:{network}::{host}"


async def ip(command: str, at: At = ()) -> None:
    await run(*at, "ip", *command.split())


async def add(address: str, interface: str = "mig1", at: At = ()) -> None:
    """Gives an interface an address, which can be used at once."""
    length = "64 nodad" if ":" in address else "24"
    await ip(f"address add {address.partition('%')[0]}/{length} dev {interface}", at)


@pytest.fixture(autouse=True)
async def far() -> AsyncIterator[At]:
    """The interface mig1 here, wired to mig2 in the network namespace where the target is; neither has an address."""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--net", "sh", "-c", "echo; exec sleep infinity"), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        await process.stdout.readline()
        at = ("nsenter", "--net", "--target", str(process.pid))
        await ip(f"link add mig1 type veth peer mig2 netns {process.pid}")
        await ip("link set mig1 addrgenmode none up")
        await ip("link set mig2 addrgenmode none up", at)
        await ip("link set lo up", at)
        yield at
        await ip("link delete mig1")
    finally:
        process.kill()
        await process.wait()


@pytest.fixture
async def nodes(far: At) -> AsyncIterator[Nodes]:
    """Two nodes whose addresses are those of mig1 and mig2, and that are not started yet."""
    async with make_nodes("mig1's", "mig2's", by_interface=True) as made:
        yield made


async def start(nodes: Nodes, far: At, *options: str) -> None:
    await nodes.source.start(*options)
    await nodes.target.start(*options, prefix=far)


def elsewhere(nodes: Nodes, address: str) -> Migration:
    """A migration to a target that nobody has started."""
    vm = nodes.migration()
    vm.begin(to="elsewhere", targetNodeAddress=address, targetDirectMigrationNodePorts={"5000": 49152})
    return vm


def connected_from() -> set[str]:
    """The local addresses of the TCP connections here."""
    shown = subprocess.run(["ss", "-Htn"], check=True, capture_output=True, text=True).stdout
    return {line.split()[3].rpartition(":")[0].translate({ord("["): "", ord("]"): ""}) for line in shown.splitlines()}


@VERSIONS
async def test_of_two_addresses_the_source_connects_from_the_one_in_the_targets_network(
    nodes: Nodes, far: At, version: int
) -> None:
    for network in (1, 2) if version == 4 else (2, 1):  # the kernel has the latest of IPv6 first
        await add(of(version, network, 1))
    await add(of(version, 2, 2), "mig2", far)
    await start(nodes, far)
    await until(lambda: nodes.source.status()["address"] == of(version, 1, 1), "the first address")

    vm = nodes.migration()
    vm.begin()
    await vm.served(5)

    async with vm.connection():
        assert connected_from() == {of(version, 2, 1)}
    assert vm.report(nodes.source)["last_error"] is None


@VERSIONS
async def test_both_nodes_get_another_network_before_the_migration_starts(nodes: Nodes, far: At, version: int) -> None:
    await add(of(version, 1, 1))
    await add(of(version, 1, 2), "mig2", far)
    await start(nodes, far)
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    await add(of(version, 2, 1))
    await add(of(version, 2, 2), "mig2", far)
    if version == 6:  # as when a router announces another prefix; the old one is kept to its end
        await ip(f"address change {of(version, 1, 1)}/64 dev mig1 preferred_lft 0 valid_lft 300")
    await ip(f"address delete {of(version, 1, 2)}/{24 if version == 4 else 64} dev mig2", far)

    await until(lambda: vm.read()["targetNodeAddress"] == of(version, 2, 2), "the new address in the status")
    await vm.served(5)
    async with vm.connection():
        assert connected_from() == {of(version, 2, 1)}


@pytest.mark.parametrize(
    ("version", "kind", "why"),
    [
        (6, None, "the kernel has none"),
        (4, "unreachable", "the kernel's is of type unreachable"),
        pytest.param(4, None, "the kernel has none", marks=SOAK),
        pytest.param(6, "prohibit", "the kernel's is of type prohibit", marks=SOAK),
        pytest.param(4, "blackhole", "the kernel's is of type blackhole", marks=SOAK),
    ],
)
async def test_a_target_that_no_route_leads_to_is_told_at_once_with_both_addresses(
    nodes: Nodes, version: int, kind: str | None, why: str
) -> None:
    mine, target = of(version, 1, 1), of(version, 5, 5)
    await add(mine)
    if kind:
        await ip(f"route add {kind} {target}")
    await nodes.source.start("--dial-timeout", "0.5")
    vm = elsewhere(nodes, target)

    words = [f"no route from {mine} (interface mig1) to {target}: {why}", f"ip route add {target} via ROUTER dev mig1"]
    await assert_reported(nodes.source, vm, *words)
    await assert_logged(nodes.source, "migration cannot be served, retrying", *words, vm.migration_uid)
    with connect(vm.source_path(Channel.DIRECT)) as near:
        await assert_ends(near)
    await assert_reported(nodes.source, vm, "channel direct", *words, field="last_error")

    if kind:
        await ip(f"route delete {kind} {target}")
    await ip(f"route add {target} dev mig1")
    await until(lambda: vm.report(nodes.source)["state"] == "prepared", "the route to be found")
    assert vm.report(nodes.source)["error"] is None

    await ip(f"route delete {target} dev mig1")
    words = [f"no route from {mine} (interface mig1) to {target}: the kernel has none"]
    await assert_reported(nodes.source, vm, *words)
    await assert_logged(nodes.source, "target may not be reached", *words, vm.migration_uid)


@pytest.mark.parametrize(
    ("version", "option"),
    [
        (4, None),
        (6, "--pod-ip"),
        pytest.param(6, None, marks=SOAK),
        pytest.param(4, "--migration-address", marks=SOAK),
    ],
)
async def test_packets_that_leave_by_another_interface_are_told_before_any_is_lost(
    nodes: Nodes, version: int, option: str | None
) -> None:
    mine, router, target = of(version, 1, 1), of(version, 7, 2), of(version, 5, 5)
    await add(mine)
    await ip("link add out0 type veth peer out1")
    try:
        await ip("link set out0 up")
        await ip("link set out1 up")
        await add(of(version, 7, 1), "out0")
        await ip(f"route add default via {router} dev out0")
        given = [option, mine] if option else []
        await nodes.source.start(*given, *(["--migration-interface", "none"] if option == "--pod-ip" else []))
        vm = elsewhere(nodes, target)

        words = [
            f"packets from {mine} ({option or 'interface mig1'}) to {target} leave by out0 via {router}, not by mig1",
            f"add a route (ip route add {target} via ROUTER dev mig1)",
        ]
        await assert_reported(nodes.source, vm, *words)
        assert vm.report(nodes.source)["state"] == "prepared"
        await assert_logged(nodes.source, "target may not be reached", *words, vm.migration_uid)

        await ip(f"route add {target} dev mig1")
        await until(lambda: vm.report(nodes.source)["error"] is None, "the route to be found")
    finally:
        await ip("link delete out0")


async def test_addresses_that_only_routers_lead_to_serve_without_complaint(nodes: Nodes, far: At) -> None:
    """As where BGP announces them: on an interface that no packet leaves by, with routes that name no source."""
    await add("10.9.7.1")
    await add("10.9.7.2", "mig2", far)
    await ip("address add 10.9.1.2/32 dev lo", far)
    await ip("route add 10.9.1.1 via 10.9.7.1", far)
    await ip("route add 10.9.1.2 via 10.9.7.2")
    await ip("address add 10.9.1.1/32 dev lo")
    try:
        await start(nodes, far, "--migration-interface", "lo")
        vm = nodes.migration()
        vm.begin()
        await vm.served(5)
        async with vm.connection():
            assert connected_from() == {"10.9.1.1"}
    finally:
        await ip("address delete 10.9.1.1/32 dev lo")


async def test_routes_by_the_sources_address_are_followed(nodes: Nodes, far: At) -> None:
    """As on a node with several networks: its default route is another's, and a rule leads from each address."""
    await add("10.9.3.1")
    await add("10.9.1.1")
    await add("10.9.1.2", "mig2", far)
    await ip("link add out0 type veth peer out1")
    try:
        await ip("link set out0 up")
        await ip("link set out1 up")
        await add("10.9.7.1", "out0")
        await ip("route add 10.9.2.2 via 10.9.7.2")
        await ip("route add 10.9.2.2 via 10.9.1.2 table 100")
        await ip("rule add from 10.9.1.1 lookup 100")
        await add("10.9.2.2", "mig2", far)
        await ip("address delete 10.9.1.2/24 dev mig2", far)
        await ip("address add 10.9.1.2/24 dev mig2", far)  # behind the other: that one is published
        await start(nodes, far)
        vm = nodes.migration()
        vm.begin()
        await vm.served(5)
        assert vm.read()["targetNodeAddress"] == "10.9.2.2"
        async with vm.connection():
            assert connected_from() == {"10.9.1.1"}
    finally:
        await ip("link delete out0")
        await ip("rule delete from 10.9.1.1 lookup 100")


@VERSIONS
async def test_a_route_of_tcp_alone_is_found(version: int) -> None:
    mine, target = of(version, 1, 1), of(version, 5, 5)
    await add(mine)
    rule = f"-{version} rule {{}} ipproto tcp lookup 100"
    await ip(f"route add {target} dev mig1 table 100")
    await ip(rule.format("add"))
    try:
        own = MigrationAddress((ip_address(mine),), "interface mig1", None, "mig1")
        assert depart(ip_address(target), own) == Departure(ip_address(mine))
    finally:
        await ip(rule.format("delete"))


@VERSIONS
async def test_an_address_that_has_just_gone_is_told_as_that(version: int) -> None:
    await add(of(version, 1, 1))
    gone, target = ip_address(of(version, 1, 7)), ip_address(of(version, 1, 2))
    own = MigrationAddress((gone,), "interface mig1", None, "mig1")
    why = no_route(target, own, gone, look_up(target, gone))
    assert why == (
        f"no route from {gone} (interface mig1) to {target}: it is not an address of this node any more: give it back, "
        "or wait for another one"
    )


async def test_a_link_that_is_down_is_waited_for_like_a_route(nodes: Nodes) -> None:
    await add("10.9.1.1")
    await nodes.source.start("--dial-timeout", "0.5")
    vm = elsewhere(nodes, "10.9.1.2")
    await until(vm.source_path(Channel.DIRECT).is_socket, "the source's socket")
    await ip("link set mig1 down")
    await until(lambda: nodes.source.status()["address"] is None, "no address")

    with connect(vm.source_path(Channel.DIRECT)) as near:
        await assert_ends(near)
    words = "no address to connect from: interface mig1 is down: ip link set mig1 up (tried for 0.5 s)"
    await assert_reported(nodes.source, vm, words, field="last_error")


async def test_a_silent_target_is_told_with_both_addresses_and_the_way_of_the_packets(nodes: Nodes) -> None:
    await add("10.9.1.1")
    await ip("route add 10.9.5.0/24 via 10.9.1.2")
    await ip("neigh add 10.9.1.2 lladdr 02:00:00:00:00:77 dev mig1 nud permanent")  # nobody has it
    await nodes.source.start("--dial-timeout", "0.5")
    vm = elsewhere(nodes, "10.9.5.5")
    await until(vm.source_path(Channel.DIRECT).is_socket, "the source's socket")

    with connect(vm.source_path(Channel.DIRECT)) as near:
        await assert_ends(near)
    words = "10.9.5.5:5000: no answer to packets from 10.9.1.1 by mig1 via 10.9.1.2 (tried for 0.5 s)"
    await assert_reported(nodes.source, vm, words, field="last_error")


async def test_a_target_of_an_ip_version_that_this_node_lacks_is_told_at_once(nodes: Nodes) -> None:
    await add("10.9.1.1")
    await nodes.source.start()
    vm = elsewhere(nodes, "fd09:1::2")
    words = "no address to connect from: this node's migration address is not IPv6: give both nodes addresses of one"
    await assert_reported(nodes.source, vm, words)


async def test_link_local_addresses_keep_their_zone_wherever_they_go(far: At) -> None:
    await ip("link set mig2 down name mig1 up", far)
    ends = "fe80::1%mig1", "fe80::2%mig1"
    await add(ends[0])
    await add(ends[1], at=far)
    async with make_nodes(*ends) as nodes:
        await start(nodes, far)
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        assert vm.read()["targetNodeAddress"] == ends[1]

        await nodes.target.stop()  # and another daemon takes the listeners over where they are
        await nodes.target.start(prefix=far)
        ports = vm.published()
        await vm.served()
        assert vm.published() == ports
        async with vm.connection():
            assert connected_from() == {"fe80::1%mig1"}
