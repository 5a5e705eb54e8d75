"""Each failure has its clear error in the log and in the status, and everything else goes on."""

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from demo.lab import run, until
from migproxy.control import ControlError
from migproxy.portmap import Channel
from tests.net.nodes import (
    Migration,
    Nodes,
    assert_carries,
    assert_ends,
    assert_logged,
    assert_reported,
    connect,
    listeners,
)

pytestmark = pytest.mark.tier("gate")

UNSERVED = "migration cannot be served, retrying"
HELD = "migration cannot be served"
OBEYS_PERMISSIONS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


# Listening


async def test_full_port_range_is_told_and_a_freed_port_is_taken(nodes: Nodes) -> None:
    await nodes.start(target=["--port-range", "47000-47004"])
    async with nodes.undisturbed() as well:
        free = sorted(set(range(47000, 47005)) - set(well.published().values()))
        with socket.create_server((nodes.target.address, free[0])):
            vm = nodes.migration()
            vm.begin()
            await assert_reported(nodes.target, vm, "no free port on 127.0.0.2 in 47000-47004", "--port-range")
            await assert_logged(nodes.target, UNSERVED, "no free port", vm.migration_uid, "default/vm")
            assert "targetDirectMigrationNodePorts" not in vm.read()
            # Each try listens on those that it finds, and lets them go.
            await until(lambda: set(free[1:]).isdisjoint(listeners(nodes.target.address)), "no port to be kept")

        await vm.served()
        assert set(vm.published().values()) == set(free)
        await assert_logged(nodes.target, "migration is served again", vm.migration_uid)


@pytest.mark.parametrize(
    ("options", "port", "allowed"),
    [([], 22, "1024-65535"), (["--port-range", "47000-47099"], 31337, "--port-range 47000-47099")],
)
async def test_port_that_somebody_else_put_into_the_status_is_not_listened_on(
    nodes: Nodes, options: list[str], port: int, allowed: str
) -> None:
    await nodes.start(target=options)
    status: dict[str, Any] = {
        "targetNodeAddress": nodes.target.address,
        "targetDirectMigrationNodePorts": {str(port): 0, "47098": 49152},
    }
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin(**status)
        await vm.served()
        assert port not in listeners(nodes.target.address)
        assert vm.published()[Channel.DIRECT] == 47098, "the port that is right is kept"
        running = nodes.migration("other")
        running.begin(
            **status | {"startTimestamp": "2026-08-01T12:00:00Z", "targetDirectMigrationNodePorts": {str(port): 0}}
        )
        await assert_reported(nodes.target, running, f"port {port} is published, is outside {allowed}", "abort it")
        assert port not in listeners(nodes.target.address)


async def test_published_port_that_is_taken_after_the_start_is_told(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        vm.start()
        port = vm.published()[Channel.DIRECT]
    for dying in (nodes.target, nodes.target.relay):
        await dying.stop(signal.SIGKILL)
    with socket.create_server((nodes.target.address, port)):
        await nodes.target.start()
        await assert_reported(nodes.target, vm, f"port {port} is in use on 127.0.0.2", "has started", "ss -ltnp")
    await vm.served()


async def test_status_that_names_somebody_elses_address_is_left_alone(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin(targetNodeAddress="10.99.0.1", targetDirectMigrationNodePorts={"5000": 0, "5001": 49152})
        before = vm.path.read_bytes()
        await assert_reported(nodes.target, vm, "10.99.0.1 is not an address of this node", "left alone")
        await assert_logged(nodes.target, HELD, "10.99.0.1", vm.migration_uid)
        assert vm.path.read_bytes() == before


@pytest.mark.parametrize(
    ("ports", "words"),
    [
        ({"x": 0}, ["'x' is not a decimal port number"]),
        ({"70000": 0}, ["70000", "outside 1-65535"]),
        ({"5000": 1}, ["only unknown channels, 1"]),
        ({"5000": 0, "5001": 0}, ["libvirt channel has two ports"]),
        ({}, ["the port map is empty"]),
    ],
)
async def test_malformed_port_map_is_told(nodes: Nodes, ports: dict[str, int], words: list[str]) -> None:
    await nodes.source.start()
    vm = nodes.migration()
    vm.begin(to="elsewhere", targetNodeAddress="127.0.0.9", targetDirectMigrationNodePorts=ports)
    await assert_reported(nodes.source, vm, *words)
    await assert_logged(nodes.source, HELD, *words, vm.migration_uid)

    vm.set_state(targetDirectMigrationNodePorts={"5000": 0})
    await until(lambda: vm.report(nodes.source)["state"] == "prepared", "the mended map to be used")


async def test_migration_address_that_is_not_this_nodes_is_told_and_used_once_it_is(nodes: Nodes) -> None:
    await nodes.source.start()
    await nodes.target.start("--migration-address", "10.8.0.2")
    vm = nodes.migration()
    vm.begin()

    await assert_logged(nodes.target, "no migration address", "10.8.0.2 is not an address of this node")
    assert not nodes.target.status()["ready"]
    assert "10.8.0.2 is not an address of this node" in nodes.target.status()["problems"]["address"]
    await assert_reported(nodes.target, vm, "no migration address to listen on", "10.8.0.2")

    await run("ip", "address", "add", "10.8.0.2/32", "dev", "lo")
    try:
        await until(lambda: nodes.target.status()["ready"], "the target to be ready")
        await vm.served()
    finally:
        await run("ip", "address", "delete", "10.8.0.2/32", "dev", "lo")


# The launchers


@pytest.mark.parametrize("side", ["source", "target"])
async def test_missing_launcher_folder_is_told_and_served_once_it_is_there(nodes: Nodes, side: str) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        node = vm.source if side == "source" else vm.target
        vm.close()
        shutil.rmtree(vm.run_dir(node))
        vm.begin()
        await assert_reported(node, vm, f"{vm.run_dir(node)}: No such file or directory", "--launcher-run-dir")
        await assert_logged(node, UNSERVED, str(vm.run_dir(node)), vm.migration_uid)

        vm.folder(node).mkdir(parents=True, exist_ok=True)  # the daemon may make it first
        (vm.run_dir(node) / "libvirt").mkdir(exist_ok=True)
        vm.listen()
        await vm.served()


async def test_launcher_folder_without_permission_is_told_and_served_once_there_is(nodes: Nodes) -> None:
    await nodes.source.start(prefix=OBEYS_PERMISSIONS)
    await nodes.target.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        folder = vm.run_dir(nodes.source)
        folder.chmod(0)
        vm.begin()
        await assert_reported(nodes.source, vm, f"{folder}/kubevirt: Permission denied")
        await assert_logged(nodes.source, UNSERVED, "Permission denied", vm.migration_uid)

        folder.chmod(0o755)
        await vm.served()


@pytest.mark.root
async def test_full_disk_below_the_launcher_is_told_and_served_once_there_is_room(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        folder = vm.folder(nodes.source).parent
        await run("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=3", "tmpfs", str(folder))
        try:
            (folder / "migrationproxy").mkdir()
            (folder / "filler").touch()
            vm.begin()
            await assert_reported(nodes.source, vm, "cannot be put in place: No space left on device")
            (folder / "filler").unlink()
            await run("mount", "-o", "remount,nr_inodes=20", str(folder))
            await vm.served()
            vm.end()
            await vm.gone()
        finally:
            await run("umount", "--lazy", str(folder))


async def test_connection_waits_for_the_socket_that_qemu_is_yet_to_make(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.close(Channel.DIRECT)

    with connect(vm.source_path(Channel.DIRECT)) as near:
        await until(lambda: vm.connections(nodes.source) > 0, "the connection to reach the target")
        vm.listen(Channel.DIRECT)
        far, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(vm.listener(Channel.DIRECT)), 20)
        with far:
            await assert_carries(near, far)


async def test_connection_fails_when_the_targets_socket_does_not_appear_in_time(nodes: Nodes) -> None:
    await nodes.start(target=["--dial-timeout", "0.5"])
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        path = vm.target_path(Channel.DIRECT)
        vm.close(Channel.DIRECT)

        with connect(vm.source_path(Channel.DIRECT)) as near:
            await assert_ends(near)
        await assert_reported(nodes.target, vm, "channel direct", str(path), "tried for 0.5 s", field="last_error")
        await assert_logged(
            nodes.target, "connection failed", str(path), channel="direct", migration_uid=vm.migration_uid
        )
        await assert_logged(
            nodes.source, "connection broken", "reset", channel="direct", migration_uid=vm.migration_uid
        )

        vm.listen(Channel.DIRECT)
        await vm.served()


async def test_launcher_that_accepts_nothing_is_told(nodes: Nodes) -> None:
    await nodes.start(target=["--dial-timeout", "0.5"])
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        vm.close(Channel.DIRECT)
        vm.listen(Channel.DIRECT, backlog=0)

        with connect(vm.target_path(Channel.DIRECT)), connect(vm.source_path(Channel.DIRECT)) as near:
            await assert_ends(near)
        await assert_reported(nodes.target, vm, str(vm.target_path(Channel.DIRECT)), "unavailable", field="last_error")

        vm.close(Channel.DIRECT)
        vm.listen(Channel.DIRECT)
        await vm.served()


# What runs in a pod is not trusted


async def test_link_planted_at_the_target_socket_is_refused_at_once(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        path = vm.target_path(Channel.DIRECT)
        path.rename(path.with_name("real"))
        path.symlink_to("real")

        with connect(vm.source_path(Channel.DIRECT)) as near:
            await assert_ends(near)
        with pytest.raises(BlockingIOError):
            vm.listener(Channel.DIRECT).accept()
        await assert_reported(nodes.target, vm, str(path), "symbolic link: refused", field="last_error")
        await assert_logged(nodes.target, "connection failed", "symbolic link: refused", channel="direct")


@pytest.mark.parametrize("component", ["kubevirt", "kubevirt/migrationproxy"])
async def test_link_planted_at_the_source_folder_is_refused(nodes: Nodes, component: str) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        folder, elsewhere = vm.run_dir(nodes.source) / component, nodes.directory / "elsewhere"
        (elsewhere / "migrationproxy").mkdir(parents=True)
        shutil.rmtree(folder)
        folder.symlink_to(elsewhere)
        vm.begin()

        await assert_reported(nodes.source, vm, f"{folder} is a symbolic link: refused, never followed")
        await assert_logged(nodes.source, UNSERVED, "symbolic link: refused", vm.migration_uid)
        assert [path.name for path in elsewhere.rglob("*")] == ["migrationproxy"]


# Finding the launcher by its process


LAUNCHER = """
import os, socket, sys
os.chdir(sys.argv[1])
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("launcher-sock")
    listener.listen()
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def _launcher(nodes: Nodes, vm: Migration) -> Iterator[tuple[int, list[str]]]:
    """A launcher's process that listens on its command socket: its PID, and the options to find it."""
    folder = nodes.directory / "pods/pod1/volumes/kubernetes.io~empty-dir/sockets"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", LAUNCHER, str(folder), "--uid", vm.uid]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        run_dir = f"/proc/{{pid}}/root{nodes.source.directory}/{{name}}"
        yield process.pid, ["--pods-dir", str(nodes.directory / "pods"), "--launcher-run-dir", run_dir]


async def test_launcher_is_found_by_its_command_sockets_process(nodes: Nodes) -> None:
    vm = nodes.migration()
    with _launcher(nodes, vm) as (pid, options):
        await nodes.start(source=options)
        vm.begin()
        with vm.edit() as document:
            document["status"]["activePods"] = {"pod1": nodes.source.name, "pod2": "elsewhere"}
        await vm.served()
        assert f"/proc/{pid}/root" in vm.report(nodes.source)["channels"][0]["listening"]


async def test_daemon_outside_of_the_hosts_pid_namespace_says_so(nodes: Nodes) -> None:
    vm = nodes.migration()
    with _launcher(nodes, vm) as (_, options):
        unshare = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
        await nodes.source.start(*options, prefix=unshare)
        try:
            vm.begin(to="elsewhere", targetNodeAddress="127.0.0.9", targetDirectMigrationNodePorts={"5000": 0})
            with vm.edit() as document:
                document["status"]["activePods"] = {"pod1": nodes.source.name}
            await assert_reported(nodes.source, vm, "launcher-sock: the listener's pid is 0", "hostPID: true")
            await assert_logged(nodes.source, UNSERVED, "hostPID: true", vm.migration_uid)
        finally:
            await nodes.source.stop(signal.SIGKILL)


# The peer


async def test_peer_that_refuses_is_told(nodes: Nodes) -> None:
    await nodes.start(source=["--dial-timeout", "0.5"])
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin(
            to="elsewhere", targetNodeAddress="127.0.0.9", targetDirectMigrationNodePorts={"5000": 0, "5001": 49152}
        )
        await until(vm.source_path(Channel.DIRECT).is_socket, "the source's socket")

        with connect(vm.source_path(Channel.DIRECT)) as near:
            await assert_ends(near)
        await assert_reported(
            nodes.source, vm, "channel direct", "127.0.0.9:5001: Connection refused", field="last_error"
        )
        await assert_logged(nodes.source, "connection failed", "Connection refused", migration_uid=vm.migration_uid)


async def test_peer_that_is_silent_is_told(interfaces: Nodes) -> None:
    nodes = interfaces
    await nodes.source.stop()
    await nodes.source.start("--dial-timeout", "0.5")
    # Nobody has that hardware address: the packets are dropped without a word.
    await run("ip", "neigh", "add", "10.9.0.77", "lladdr", "02:00:00:00:00:77", "dev", "mig1", "nud", "permanent")
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin(to="elsewhere", targetNodeAddress="10.9.0.77", targetDirectMigrationNodePorts={"5000": 49152})
        await until(vm.source_path(Channel.DIRECT).is_socket, "the source's socket")

        with connect(vm.source_path(Channel.DIRECT)) as near:
            await assert_ends(near)
        words = ["10.9.0.77:5000", "no answer", "tried for 0.5 s"]
        await assert_reported(nodes.source, vm, *words, field="last_error")
        await assert_logged(nodes.source, "connection failed", *words, migration_uid=vm.migration_uid)


# Limits


async def test_connection_over_the_limit_waits_until_another_one_ends(nodes: Nodes) -> None:
    await nodes.start(source=["--max-connections", "2"])
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        async with vm.connection() as first, vm.connection():
            with connect(vm.source_path(Channel.DIRECT)) as third:
                await assert_logged(nodes.source, "connections wait: the channel is full", "--max-connections")
                with pytest.raises(BlockingIOError):
                    vm.listener(Channel.DIRECT).accept()
                for end in first:
                    end.shutdown(socket.SHUT_RDWR)
                far, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(vm.listener(Channel.DIRECT)), 10)
                with far:
                    await assert_carries(third, far)


async def test_greedy_migration_waits_when_the_node_is_full_and_another_one_has_all_it_needs(nodes: Nodes) -> None:
    await nodes.source.start(prefix=("prlimit", "--nofile=400:400"))  # 37 connections
    await nodes.target.start()
    greedy, modest = nodes.migration("greedy"), nodes.migration("modest")
    for vm in (greedy, modest):
        vm.begin()
    for vm in (greedy, modest):
        await vm.served()
    before = nodes.source.pid, nodes.source.relay.pid
    async with AsyncExitStack() as stack:
        many = [stack.enter_context(closing(connect(greedy.source_path(Channel.DIRECT)))) for _ in range(100)]
        full = await assert_logged(
            nodes.source, "connections wait: the node is full", migration_uid=greedy.migration_uid
        )
        assert full["channel"] == "direct"
        assert full["why"].startswith("400 open files of the daemon allow 37 connections, 26 are open, 26 of them this")
        assert "raise the daemon's limit of open files" in full["remedy"]
        status = nodes.source.status()
        assert status["budget"]["connections"] == 26
        (waiting,) = [one for one in status["migrations"] if one["migration_uid"] == greedy.migration_uid]
        assert {one["channel"] for one in waiting["channels"] if one["waits"]} == {"direct"}

        for _ in range(9):  # as many as KubeVirt's QEMU opens
            near, far = await stack.enter_async_context(modest.connection())
            await assert_carries(near, far)
        assert nodes.source.status()["budget"]["connections"] == 35

        for sock in many:
            sock.close()
        await until(lambda: _is_calm(greedy), "all that have waited to have been served")
        assert not any(channel["waits"] for channel in _channels(nodes, greedy))
        (direct,) = [one for one in _channels(nodes, greedy) if one["channel"] == "direct"]
        assert direct["connections_total"] >= 100
    assert (nodes.source.pid, nodes.source.relay.pid) == before
    assert not nodes.source.logged("cannot accept connections")


def _channels(nodes: Nodes, vm: Migration) -> list[dict[str, Any]]:
    (found,) = [one for one in nodes.source.status()["migrations"] if one["migration_uid"] == vm.migration_uid]
    channels: list[dict[str, Any]] = found["channels"]
    return channels


async def test_loop_of_short_connections_does_not_flood_the_log(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    for _ in range(200):
        async with vm.connection():
            pass
    vm.end()
    await assert_logged(nodes.source, "proxy ended")
    (total,) = [one["connections_total"] for one in _channels(nodes, vm) if one["channel"] == "direct"]
    assert total >= 200

    def told(what: str) -> int:
        counted: list[int] = [
            line["count"] for line in nodes.source.logged(f"more connections {what}", channel="direct")
        ]
        return len(written(what)) + sum(counted)

    def written(what: str) -> list[dict[str, Any]]:
        return nodes.source.logged(f"connection {what}", channel="direct")

    assert told("opened") == told("closed") + told("broken") == total
    assert len(written("opened")) < 100


@pytest.mark.parametrize("side", ["source", "target"])
async def test_daemon_out_of_descriptors_says_so_and_recovers(nodes: Nodes, side: str) -> None:
    short = nodes.source if side == "source" else nodes.target
    for node in nodes.both:
        await node.start(prefix=("prlimit", "--nofile=80:80") if node is short else ())

    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        with ExitStack() as stack:
            many = [stack.enter_context(closing(connect(vm.source_path(Channel.DIRECT)))) for _ in range(30)]
            await until(lambda: "Too many open files" in short.log.read_text(), "the shortage to be told")
            for sock in many:
                sock.close()
        async with asyncio.timeout(60):
            calm = 0
            while calm < 2:  # what is dialled again may be under way between two looks
                await asyncio.sleep(0.5)  # longer than the pause before the daemon accepts again
                calm = calm + 1 if _is_calm(vm) else 0
        await vm.served()


def _is_calm(vm: Migration) -> bool:
    """Ends, as the target's QEMU would, what nobody wants any more; whether there was nothing, and nothing is open."""
    calm = True
    with suppress(BlockingIOError):
        while True:
            vm.listener(Channel.DIRECT).accept()[0].close()
            calm = False
    with suppress(ControlError):  # it has no descriptor left to answer with
        return calm and not any(map(vm.connections, (vm.source, vm.target)))
    return False


# The VMIs' files


async def test_disk_full_while_publishing_is_told_and_published_once_there_is_room(nodes: Nodes) -> None:
    await run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(nodes.vmi_dir))
    try:
        await nodes.start()
        async with nodes.undisturbed():
            vm = nodes.migration()
            vm.path.parent.joinpath(".keep").write_bytes(bytes(4096))
            filler = nodes.vmi_dir / ".filler"
            nodes.target.signal(signal.SIGSTOP)
            try:
                vm.begin()
                _fill(filler)
            finally:
                nodes.target.signal(signal.SIGCONT)
            await assert_reported(
                nodes.target, vm, "cannot publish in", str(vm.path), "No space left", "free some space"
            )
            await assert_logged(nodes.target, UNSERVED, "No space left", vm.migration_uid)
            filler.unlink()
            await vm.served()
    finally:
        await nodes.close()
        await run("umount", str(nodes.vmi_dir))


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):  # noqa: PT012
        while True:
            file.write(bytes(512))


async def test_file_that_does_not_parse_is_told_and_what_it_held_stays(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        vm = nodes.migration()
        vm.begin()
        await vm.served()
        async with vm.connection() as (near, far):
            good = vm.path.read_text()
            vm.path.write_text(good + "]\n")
            await until(lambda: str(vm.path) in str(nodes.source.status()["flaws"]), "the flaw to be told")
            await assert_logged(nodes.source, "problem with VMI files", path=str(vm.path))
            assert nodes.source.status()["ready"], "it is that file's flaw, not the node's"
            await assert_carries(near, far)
            vm.path.write_text(good)
            await until(lambda: not nodes.source.status()["flaws"]["count"], "the flaw to be over")
            await assert_carries(near, far)


@pytest.mark.parametrize("what", ["file", "folder"])
async def test_unreadable_vmis_are_told_and_what_was_read_stays(nodes: Nodes, what: str) -> None:
    await nodes.source.start(prefix=OBEYS_PERMISSIONS)
    await nodes.target.start()
    async with nodes.undisturbed() as vm:
        path = vm.path if what == "file" else nodes.vmi_dir
        path.chmod(0)
        if what == "file":
            vm.path.write_text(vm.path.read_text() + "# changed\n")
        else:
            (nodes.vmi_dir / "new.yaml").touch()
        await until(lambda: "Permission denied" in str(nodes.source.status()["problems"]), "the problem to be told")
        await assert_logged(nodes.source, "problem with VMI files", str(path), "Permission denied")
        path.chmod(0o755)
        await until(lambda: not nodes.source.status()["problems"], "the problem to be over")


async def test_vmi_folder_that_vanishes_is_told_and_what_it_held_stays(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        nodes.vmi_dir.rename(nodes.directory / "away")
        await until(lambda: str(nodes.vmi_dir) in nodes.source.status()["problems"], "the problem to be told")
        await assert_logged(nodes.source, "problem with VMI files", str(nodes.vmi_dir), "stay in force")
        (nodes.directory / "away").rename(nodes.vmi_dir)
        await until(lambda: not nodes.source.status()["problems"], "the problem to be over")
