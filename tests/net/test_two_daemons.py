"""Two daemons where one should be, and a node that is both ends of a migration: nobody fights, nothing goes round."""

import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.lab import until
from migproxy.portmap import Channel
from tests.net.nodes import (
    LIBVIRT_SOCKET,
    MIB,
    Daemon,
    Migration,
    Nodes,
    assert_carries,
    assert_ends,
    assert_logged,
    connect,
    receive,
    send,
)

pytestmark = pytest.mark.tier("gate")

PATTERN = bytes(range(256)) * 4 * 1024  # a MiB
WAITS, GOES_ON = "another daemon serves this node", "no other daemon serves this node any more"


@asynccontextmanager
async def twin(nodes: Nodes, name: str, vmi_dir: Path, run_dir: Path) -> AsyncIterator[Daemon]:
    """Another daemon on the same machine, with a control socket and a relay of its own."""
    options = ["--vmi-dir", str(vmi_dir), "--launcher-run-dir", str(run_dir), "--migration-address", "127.0.0.3"]
    made = Daemon(name, "127.0.0.3", nodes.directory / "twin", *options, "--libvirt-socket", LIBVIRT_SOCKET)
    try:
        yield made
    finally:
        await made.stop()
        await made.relay.stop(signal.SIGKILL)


def http_status(url: str) -> int:
    """What a probe is answered."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


async def carry(near: socket.socket, far: socket.socket) -> None:
    """16 MiB arrive as they were sent."""
    for _ in range(16):
        await send(near, PATTERN)
        assert await receive(far, MIB) == PATTERN


async def in_one_folder(nodes: Nodes) -> tuple[Migration, Path]:
    """A migration that is served, whose source's daemon has one folder for all launchers."""
    vm = nodes.migration(block=False)
    folder = vm.run_dir(nodes.source)
    await nodes.start(source=("--launcher-run-dir", str(folder)))
    vm.begin()
    await vm.served()
    return vm, folder


async def test_second_daemon_in_a_launchers_folder_waits_for_the_first_ones_death(nodes: Nodes) -> None:
    vm, folder = await in_one_folder(nodes)
    inode = vm.source_path(Channel.DIRECT).stat().st_ino
    async with vm.connection() as (near, far), twin(nodes, "node01", nodes.vmi_dir, folder) as second:
        await second.spawn("--http-listen", "127.0.0.1:0")
        told = await assert_logged(second, WAITS, f"process {nodes.source.pid} ", str(folder), "--launcher-run-dir")
        await until(lambda: second.control.exists(), "the second one's control socket")
        assert second.status()["checks"]["synchronised"] == told["why"]
        url = second.logged("serving HTTP")[0]["url"]
        assert (http_status(f"{url}healthz"), http_status(f"{url}readyz")) == (200, 503)
        await carry(near, far)
        assert nodes.source.logged("socket files put back that somebody removed or replaced") == []
        assert vm.source_path(Channel.DIRECT).stat().st_ino == inode

        await nodes.source.stop(signal.SIGKILL)
        await assert_logged(second, GOES_ON)
        await until(lambda: vm.source_path(Channel.DIRECT).stat().st_ino != inode, "the second one's socket")
        await carry(near, far)  # what the first one's relay moves
        async with vm.connection() as wire:
            await assert_carries(*wire)

        await nodes.source.spawn()
        await assert_logged(nodes.source, WAITS, f"process {second.pid} ")
    await assert_logged(nodes.source, GOES_ON)
    await vm.served()


async def test_two_nodes_in_one_launchers_folder_do_not_serve_it_together(nodes: Nodes) -> None:
    _, folder = await in_one_folder(nodes)
    vmis = nodes.directory / "other"
    vmis.mkdir()
    async with twin(nodes, "node03", vmis, folder) as second:
        await second.spawn()
        await assert_logged(second, WAITS, f"process {nodes.source.pid} ", str(folder))
        second.signal(signal.SIGTERM)
        assert await second.ended(20) == 0
        assert second.logged("cannot leave, draining instead") == []
    assert nodes.source.status()["ready"]


async def test_second_daemon_of_a_nodes_name_publishes_nothing_before_the_first_ones_death(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration(block=False)
    vm.begin()
    await vm.served()
    folder = nodes.directory / "elsewhere"
    for name in ("kubevirt", "libvirt"):
        (folder / name).mkdir(parents=True)
    async with vm.connection() as (near, far), twin(nodes, nodes.target.name, nodes.vmi_dir, folder) as second:
        await second.spawn()
        await assert_logged(second, WAITS, f"process {nodes.target.pid} ", str(nodes.vmi_dir), "--node-name")
        await until(lambda: second.control.exists(), "the second one's control socket")
        assert second.status()["migrations"] == []
        await carry(near, far)
        await vm.served()

        await nodes.target.stop(signal.SIGKILL)
        await assert_logged(second, GOES_ON)
        await assert_reported_of(second, vm, "targetNodeAddress 127.0.0.2 is not an address of this node")
        await carry(near, far)


async def assert_reported_of(node: Daemon, migration: Migration, words: str) -> None:
    """A daemon reports an error of a migration's target."""

    def told() -> bool:
        found = [one for one in node.status()["migrations"] if one["migration_uid"] == migration.migration_uid]
        return any(words in (one["error"] or "") for one in found)

    await until(told, f"{node.name} to report {words}")


async def test_daemon_that_was_killed_is_not_held_up_by_the_relay_that_it_has_started(nodes: Nodes) -> None:
    nodes.source.start_relays_itself()
    vm, folder = await in_one_folder(nodes)
    relay = nodes.source.status()["relay"]["pid"]
    async with vm.connection() as (near, far):
        await carry(near, far)
        held = {path.readlink() for path in Path(f"/proc/{relay}/fd").iterdir()}
        assert held.isdisjoint({folder, *nodes.vmi_dir.glob(".migproxy-*.lock")})
        for _ in range(3):
            await nodes.source.stop(signal.SIGKILL)
            await nodes.source.start("--launcher-run-dir", str(folder))
            await carry(near, far)
        assert nodes.source.status()["relay"]["pid"] == relay
    assert nodes.source.logged(WAITS) == []
    assert nodes.source.logged("a second daemon that serves the same would not be noticed") == []
    await vm.served()


async def test_folder_that_cannot_be_locked_keeps_no_daemon_from_starting(nodes: Nodes) -> None:
    await nodes.source.start("--launcher-run-dir", str(nodes.directory / "nonesuch"))
    (told,) = nodes.source.logged("a second daemon that serves the same would not be noticed")
    assert (told["lock"], told["error"]) == (str(nodes.directory / "nonesuch"), "No such file or directory")


# One node is both ends


async def test_migration_from_a_node_to_itself_is_refused_for_both_roles(nodes: Nodes) -> None:
    vm = nodes.migration()
    await nodes.source.start("--launcher-run-dir", str(vm.run_dir(nodes.source)))
    vm.begin(to=nodes.source.name)

    def errors() -> dict[str, str]:
        return {one["role"]: one["error"] or "" for one in nodes.source.status()["migrations"]}

    await until(lambda: len(errors()) == 2, "both roles to be told of")
    for error in errors().values():
        assert all(words in error for words in ("source and target are one node", nodes.source.name, "--node-name"))
    assert vm.published() == {}


def write(path: Path, document: dict[str, Any]) -> None:
    """Puts a VMI's file in place."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(document))
    new.replace(path)


def decentralized(nodes: Nodes) -> tuple[Path, Path]:
    """Two VMIs of one decentralized migration, both on the source's node; returns their files."""
    common = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance"}
    node, sync = nodes.source.name, {"syncAddress": "10.0.0.1:9185"}
    source, target = (nodes.vmi_dir / f"{name}.yaml" for name in ("leaving", "coming"))
    write(
        target,
        common
        | {
            "metadata": {
                "name": "coming",
                "uid": "coming-uid",
                "labels": {"kubevirt.io/migrationTargetNodeName": node},
                "annotations": {"kubevirt.io/create-migration-target": "true"},
            },
            "status": {
                "phase": "WaitingForSync",
                "migrationTransport": "Unix",
                "migrationState": {
                    "migrationUid": "m-coming",
                    "sourceNode": node,
                    "sourceState": {"virtualMachineInstanceUID": "leaving-uid", **sync},
                },
            },
        },
    )
    write(
        source,
        common
        | {
            "metadata": {"name": "leaving", "uid": "leaving-uid"},
            "status": {
                "phase": "Running",
                "nodeName": node,
                "migrationTransport": "Unix",
                "migrationState": {
                    "migrationUid": "m-leaving",
                    "sourceNode": node,
                    "sourceState": {"node": node},
                    "targetState": {"virtualMachineInstanceUID": "coming-uid", **sync},
                },
            },
        },
    )
    return source, target


async def tell_the_source(source: Path, target: Path) -> None:
    """Does what the two clusters' synchronisation does, once the target has published."""

    def published() -> dict[str, Any]:
        return dict(yaml.safe_load(target.read_text())["status"]["migrationState"])

    await until(lambda: "targetNodeAddress" in published(), "the target to publish")
    document = json.loads(source.read_text())
    document["status"]["migrationState"]["targetState"] |= {
        "nodeAddress": published()["targetNodeAddress"],
        "directMigrationNodePorts": published()["targetDirectMigrationNodePorts"],
    }
    write(source, document)


NAME = "leaving-uid-49152-source.sock"


async def test_connection_that_would_come_back_to_its_source_is_refused_and_goes_round_not_once(nodes: Nodes) -> None:
    folder = nodes.directory / "one"
    for name in ("kubevirt/migrationproxy", "libvirt"):
        (folder / name).mkdir(parents=True)
    await nodes.source.start("--launcher-run-dir", str(folder))
    await tell_the_source(*decentralized(nodes))
    path = folder / "kubevirt/migrationproxy" / NAME
    await until(path.is_socket, "the source's socket")
    before = nodes.source.descriptors()
    with connect(path) as near:
        await send(near, b"x")
        await assert_ends(near)
    failed = await assert_logged(
        nodes.source, "connection failed", f"{path} is not the target launcher's", "--node-name", "--launcher-run-dir"
    )
    assert (failed["role"], failed["name"]) == ("target", "coming")

    def counted() -> dict[str, tuple[int, dict[str, int]]]:
        return {
            one["role"]: (channel["connections_total"], channel["failures"])
            for one in nodes.source.status()["migrations"]
            for channel in one["channels"]
            if channel["channel"] == "direct"
        }

    once = {"source": (1, {"reset": 1}), "target": (0, {"dial": 1})}
    await until(lambda: counted() == once, "one connection to have come and gone, as both roles see it")
    await until(lambda: nodes.source.descriptors() <= before, "its descriptors to be closed")


async def test_two_vmis_of_one_decentralized_migration_may_be_on_one_node(nodes: Nodes) -> None:
    for name, part in (
        ("leaving", "kubevirt/migrationproxy"),
        ("coming", "kubevirt/migrationproxy"),
        ("coming", "libvirt"),
    ):
        (nodes.source.directory / name / part).mkdir(parents=True)
    folder = nodes.source.directory
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.bind(str(folder / "coming/kubevirt/migrationproxy" / NAME))
        qemu.listen()
        await nodes.source.start()
        await tell_the_source(*decentralized(nodes))
        path = folder / "leaving/kubevirt/migrationproxy" / NAME
        await until(path.is_socket, "the source's socket")
        with connect(path) as near:
            await until(lambda: nodes.source.logged("connection opened", role="target") != [], "the connection")
            far, _ = qemu.accept()
            with far:
                far.setblocking(False)
                await assert_carries(near, far)
