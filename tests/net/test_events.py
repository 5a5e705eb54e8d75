"""Events in any order end in the right listeners, within a bounded time."""

import asyncio
import os
import shutil
import signal
import socket
import stat
import threading

import pytest

from demo.lab import run, until
from migproxy.portmap import Channel
from tests.net.nodes import (
    Nodes,
    assert_carries,
    assert_ends,
    assert_logged,
    assert_reported,
    connect,
    listeners,
)

pytestmark = pytest.mark.tier("gate")


async def test_source_that_sees_the_vmi_first_waits_for_the_targets_ports(nodes: Nodes) -> None:
    await nodes.source.start()
    vm = nodes.migration()
    vm.begin()
    await until(lambda: vm.report(nodes.source).get("state") == "waiting", "the source to wait")
    assert "waiting for the target to publish" in vm.report(nodes.source)["error"]

    await nodes.target.start()

    await vm.served()


async def test_only_the_migration_address_is_listened_on(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    ports = set(vm.published().values())
    assert ports <= listeners(nodes.target.address)
    assert not ports & (listeners("127.0.0.3") | listeners("0.0.0.0"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("running", [False, True])
async def test_restarted_target_listens_on_the_ports_that_it_published(
    nodes: Nodes, how: signal.Signals, running: bool
) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    if running:
        vm.start()
    before = vm.path.read_bytes()

    await nodes.target.stop(how)
    if how is signal.SIGKILL:
        await nodes.target.relay.stop(how)
    assert not listeners(nodes.target.address) & set(vm.published().values())
    await nodes.target.start()

    await vm.served()
    assert vm.path.read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
async def test_restarted_source_puts_its_sockets_in_place_again(nodes: Nodes, how: signal.Signals) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    await nodes.source.stop(how)
    if how is signal.SIGKILL:
        await nodes.source.relay.stop(how)
    await nodes.source.start()

    await vm.served()


async def test_source_follows_ports_that_change_before_the_start(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    inodes = {channel: vm.source_path(channel).stat().st_ino for channel in vm.channels}

    async with vm.connection() as (near, far):
        with vm.edit() as document:
            state = document["status"]["migrationState"]
            del state["targetNodeAddress"], state["targetDirectMigrationNodePorts"]
        await vm.served()
        with socket.create_server(("127.0.0.3", 0)) as elsewhere:
            port = elsewhere.getsockname()[1]
            vm.set_state(targetNodeAddress="127.0.0.3", targetDirectMigrationNodePorts={str(port): 49152})
            await until(lambda: vm.report(nodes.source).get("peer") == "127.0.0.3", "the source to follow")
            with connect(vm.source_path(Channel.DIRECT)):
                elsewhere.settimeout(10)
                elsewhere.accept()[0].close()
        await assert_carries(near, far)  # what was open before is not cut

    assert vm.source_path(Channel.DIRECT).stat().st_ino == inodes[Channel.DIRECT]
    await until(lambda: not vm.source_path(Channel.BLOCK).exists(), "the other channel's socket to go")


async def test_vmi_that_vanishes_ends_its_relays_at_once_and_takes_its_sockets_away(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.start()
    ports = vm.published().values()

    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        vm.path.unlink()
        await assert_ends(near)
        await assert_ends(far)

    await vm.gone()
    assert not listeners(nodes.target.address) & set(ports)


async def test_done_migration_leaves_nothing_behind(nodes: Nodes) -> None:
    await nodes.start()
    before = [(node.descriptors(), node.threads()) for node in nodes.both]
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.start()
    ports = vm.published().values()

    async with vm.connection() as (near, far):
        vm.end()
        await assert_ends(near)
        await assert_ends(far)

    await vm.gone()
    assert os.listdir(vm.folder(nodes.source)) == []
    assert not listeners(nodes.target.address) & set(ports)
    await until(
        lambda: all(node.descriptors() <= fds for node, (fds, _) in zip(nodes.both, before, strict=True)), "fds"
    )
    failures = 0
    for node in nodes.both:
        ended = await assert_logged(node, "proxy ended", migration_uid=vm.migration_uid)
        assert ended["connections"] == 4
        assert ended["sent"] == ended["received"] == 3 * 64
        assert ended["failed"] == len(node.logged("connection broken"))
        failures += ended["failed"]
    # Who reads of the end first resets the connection that is open; the other one may see that before it reads.
    assert failures <= 1


@pytest.mark.parametrize("gap", [True, False])
async def test_two_migrations_of_one_vmi_in_a_row_each_have_their_own_listeners(nodes: Nodes, gap: bool) -> None:
    await nodes.start(target=["--port-range", "47000-47099"])  # none is taken again at once; the kernel might
    vm = nodes.migration()
    first = vm.begin()
    await vm.served()
    first_ports = vm.published().values()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        if gap:
            vm.end()
            await vm.gone()

        second = vm.begin()

        await assert_ends(near)
    await vm.served()
    assert first != second
    assert not set(first_ports) & set(vm.published().values())
    assert not listeners(nodes.target.address) & set(first_ports)
    ended = [one for node in nodes.both for one in node.status()["migrations"] if one["migration_uid"] == first]
    assert [one["state"] for one in ended] == ["ended", "ended"]


async def test_vmi_migrates_there_and_back(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.end()
    await vm.gone()

    vm.close()
    vm.source, vm.target = vm.target, vm.source
    vm.listen()
    vm.begin()

    await vm.served()


async def test_fifty_migrations_at_once_are_served_and_removed(nodes: Nodes) -> None:
    await nodes.start()
    before = [(node.descriptors(), node.threads()) for node in nodes.both]
    many = [nodes.migration(f"vm{number}") for number in range(50)]

    for vm in many:
        vm.begin()
    await asyncio.gather(*(vm.served(30) for vm in many))
    ports = [port for vm in many for port in vm.published().values()]
    assert len(set(ports)) == 150

    for vm in many:
        vm.end()
    await asyncio.gather(*(vm.gone() for vm in many))
    assert not listeners(nodes.target.address) & set(ports)
    for node, (fds, _) in zip(nodes.both, before, strict=True):
        await until(lambda node=node, fds=fds: node.descriptors() <= fds, "fds")  # type: ignore[misc]


# The socket files


async def test_removed_socket_file_is_put_back_and_open_connections_stay(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    async with vm.connection() as (near, far):
        vm.source_path(Channel.DIRECT).unlink()
        await until(vm.source_path(Channel.DIRECT).is_socket, "the socket file", 20)
        await assert_carries(near, far)
    await vm.served()


async def test_replaced_socket_file_is_put_back(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    path = vm.source_path(Channel.DIRECT)

    other = path.with_name("other")
    other.write_text("somebody else's")
    other.rename(path)

    await until(path.is_socket, "our socket file")
    await vm.served()


async def test_folder_above_that_is_replaced_gets_the_sockets(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration(block=False)
    vm.begin()
    await vm.served()
    kubevirt = vm.folder(nodes.source).parent
    kubevirt.rename(kubevirt.with_name("renamed"))
    vm.folder(nodes.source).mkdir(parents=True)
    await vm.served()
    assert not list(kubevirt.with_name("renamed").rglob("*.sock"))


@pytest.mark.parametrize("how", ["removed", "renamed"])
async def test_folder_that_goes_is_made_again(nodes: Nodes, how: str) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    folder = vm.folder(nodes.source)

    async with vm.connection() as (near, far):
        nodes.source.signal(signal.SIGSTOP)
        try:
            if how == "removed":
                shutil.rmtree(folder)
            else:
                folder.rename(folder.with_name("moved"))
        finally:
            nodes.source.signal(signal.SIGCONT)
        await until(vm.source_path(Channel.DIRECT).is_socket, "the socket file in the new folder", 20)
        await assert_carries(near, far)
    await vm.served()


@pytest.mark.root
async def test_socket_files_belong_to_the_launchers_user(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.folder(nodes.source).rmdir()
    os.chown(vm.folder(nodes.source).parent, 107, 108)
    vm.begin()
    await vm.served()

    for path in (vm.folder(nodes.source), *(vm.source_path(channel) for channel in vm.channels)):
        assert (path.stat().st_uid, path.stat().st_gid) == (107, 108)
        assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IWOTH


@pytest.mark.root
async def test_folder_of_somebody_elses_is_given_to_nobody(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    folder = vm.folder(nodes.source)
    os.chown(folder, 5, 6)
    vm.begin()
    said = f"{folder} belongs to 5:6, not to 0:0; migproxy gives nobody what it has not made"
    await until(lambda: said in str(vm.report(nodes.source).get("error")), "the refusal")
    assert (folder.stat().st_uid, folder.stat().st_gid) == (5, 6)
    os.chown(folder, 0, 0)
    await vm.served()


@pytest.mark.root
async def test_socket_owner_option_beats_the_folders_owner(nodes: Nodes) -> None:
    await nodes.start(source=["--socket-owner", "5:6"])
    vm = nodes.migration()
    vm.begin()
    await vm.served()

    status_of_socket = vm.source_path(Channel.LIBVIRT).stat()
    assert (status_of_socket.st_uid, status_of_socket.st_gid) == (5, 6)


async def test_hostile_replacing_in_a_loop_burns_no_cpu_and_leaks_nothing(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration(block=False)
    vm.begin()
    await vm.served()
    path, stop, seconds = vm.source_path(Channel.DIRECT), threading.Event(), 3.0

    def replace() -> None:
        while not stop.wait(0.0005):
            other = path.with_name("other")
            other.touch()
            other.replace(path)

    async with nodes.undisturbed():
        fds = nodes.source.descriptors()
        hostile = threading.Thread(target=replace)
        used = nodes.source.cpu_seconds()
        hostile.start()
        await asyncio.sleep(seconds)  # what is measured is a rate
        used = nodes.source.cpu_seconds() - used
        stop.set()
        hostile.join()

        assert used < 0.5 * seconds
        await until(path.is_socket, "our socket file at last", 20)
        # More are two listeners before and the watch; what it opens while it puts the last one back is closed again.
        await until(lambda: nodes.source.descriptors() <= fds + 3, "no more descriptors than before", 20)
    assert 1 <= len(nodes.source.logged("socket files put back that somebody removed or replaced")) < 50


async def test_somebody_elses_socket_at_our_name_is_not_removed_at_the_end(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration(block=False)
    vm.begin()
    await vm.served()
    path = vm.source_path(Channel.DIRECT)
    theirs = path.with_name("theirs")

    for _ in range(9):  # until the source puts it back after a pause only
        await until(path.is_socket, "our socket file", 20)
        theirs.touch()
        theirs.replace(path)
    vm.end()

    await until(lambda: vm.report(nodes.source).get("state") == "ended", "the end")
    assert os.listdir(vm.folder(nodes.source)) == [path.name]
    assert path.is_file()


# The migration address


async def _readdress(new: str, old: str) -> None:
    await run("ip", "address", "delete", f"{old}/24", "dev", "mig2")
    await run("ip", "address", "add", f"{new}/24", "dev", "mig2")


async def test_address_that_changes_before_the_start_is_published_anew_and_followed(interfaces: Nodes) -> None:
    vm = interfaces.migration()
    vm.begin()
    await vm.served()
    assert vm.read()["targetNodeAddress"] == "10.9.0.2"

    await _readdress("10.9.0.3", "10.9.0.2")

    await until(lambda: vm.read()["targetNodeAddress"] == "10.9.0.3", "the new address in the status")
    await vm.served()


async def test_address_that_changes_after_the_start_moves_the_listeners_and_publishes_nothing(
    interfaces: Nodes,
) -> None:
    vm = interfaces.migration()
    vm.begin()
    await vm.served()
    vm.start()
    await until(lambda: vm.report(interfaces.target)["state"] == "running", "the start to be seen")
    before = vm.path.read_bytes()

    await _readdress("10.9.0.3", "10.9.0.2")

    ports = set(vm.published().values())
    await until(lambda: ports <= listeners("10.9.0.3"), "the listeners to move")
    await assert_reported(interfaces.target, vm, "10.9.0.3", "10.9.0.2", "has started")
    assert vm.path.read_bytes() == before

    await _readdress("10.9.0.2", "10.9.0.3")
    await vm.served()
    assert vm.path.read_bytes() == before


async def test_ipv4_mapped_addresses_in_a_status_are_this_nodes_own(nodes: Nodes) -> None:
    await nodes.start()
    vm, mapped, ports = nodes.migration(block=False), f"::ffff:{nodes.target.address}", {"47101": 0, "47102": 49152}
    vm.begin(
        targetNodeAddress=mapped,
        targetDirectMigrationNodePorts=ports,
        targetState={"nodeAddress": mapped, "directMigrationNodePorts": {**ports}},
        startTimestamp="2026-01-01T00:00:00Z",
    )
    before = vm.path.read_bytes()

    await until(lambda: vm.report(nodes.target).get("state") == "running", "the target to listen")
    await until(vm.source_path(Channel.DIRECT).is_socket, "the source's socket")
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
    assert vm.report(nodes.target)["error"] is None
    assert vm.path.read_bytes() == before


async def test_address_that_goes_is_told_and_everything_goes_on_when_it_returns(interfaces: Nodes) -> None:
    vm = interfaces.migration()
    vm.begin()
    await vm.served()
    before = vm.path.read_bytes()

    await run("ip", "address", "delete", "10.9.0.2/24", "dev", "mig2")

    await until(lambda: not interfaces.target.status()["ready"], "the target to be not ready")
    assert "mig2 has no global-unicast address" in interfaces.target.status()["problems"]["address"]
    await assert_logged(interfaces.target, "no migration address", "mig2 has no global-unicast address")
    await assert_reported(interfaces.target, vm, "no migration address")

    await run("ip", "address", "add", "10.9.0.2/24", "dev", "mig2")
    await vm.served()
    assert vm.path.read_bytes() == before
    await until(lambda: interfaces.target.status()["ready"], "the target to be ready")
