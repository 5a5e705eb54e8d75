"""A node that is both ends of a migration: nothing goes round."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.lab import until
from tests.net.nodes import (
    Nodes,
    assert_carries,
    assert_ends,
    assert_logged,
    connect,
    send,
)

pytestmark = pytest.mark.tier("gate")


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
