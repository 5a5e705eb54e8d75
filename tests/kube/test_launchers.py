"""Launchers are found by their pods' command sockets, and one VMI's trouble is nobody else's."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.clock import Clock, eventually
from tests.kube.cluster import MERGE_PATCH, VMIS, Cluster, begin, vmi
from tests.kube.world import LocalNode

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

COMMAND_SOCKET = "volumes/kubernetes.io~empty-dir/sockets/launcher-sock"
PUBLISHED = {"targetNodeAddress": "127.77.0.2", "targetDirectMigrationNodePorts": {"1": 0, "2": 49152}}

# Its /var/run is a folder with its PID for a name; its VMI's UID is on its command line, and it listens on its pod's
# command socket, as virt-launcher does.
LAUNCHER = """
import os, socket, sys
folder, sock = sys.argv[1:3]
os.makedirs(f"{folder}/{os.getpid()}/kubevirt/migrationproxy")
os.makedirs(os.path.dirname(sock))
directory = os.open(os.path.dirname(sock), os.O_PATH)
listener = socket.socket(socket.AF_UNIX)
listener.bind(f"/proc/self/fd/{directory}/launcher-sock")
listener.listen()
print(flush=True)
sys.stdin.read()
"""


class Pods:
    """The launcher pods of a node.

    Attributes:
        pattern: The daemon's --launcher-run-dir for them.
        folder: The kubelet's pods folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pods"
        self.folder.mkdir()
        self._runs = folder / "runs"
        self.pattern = f"{self._runs}/{{pid}}"

    @asynccontextmanager
    async def pod(self, uid: str, vmi_uid: str) -> AsyncIterator["Pod"]:
        """A pod of a VMI's that runs while the context lasts; its folder goes with it, as the kubelet's do."""
        command = [sys.executable, "-c", LAUNCHER, str(self._runs), str(self.folder / uid / COMMAND_SOCKET)]
        command += ["--uid", vmi_uid]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()  # blocks: no time goes by
        made = Pod(self._runs / str(process.pid), self.folder / uid, process)
        try:
            yield made
        finally:
            made.end()


class Pod:
    """A running launcher pod."""

    def __init__(self, run: Path, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self._run, self._folder, self._process = run, folder, process

    def sockets(self) -> int:
        """How many sockets the source proxy has put there."""
        return len(list(self._run.glob("kubevirt/migrationproxy/*.sock")))

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture
async def pods(tmp_path: Path) -> Pods:
    return Pods(tmp_path)


@pytest.fixture
async def node(kubernetes: Cluster, tmp_path: Path, pods: Pods) -> AsyncIterator[LocalNode]:
    """The source's node."""
    made = LocalNode("node01", "127.77.0.1", tmp_path)
    async with made.run(kubernetes.kubeconfig(tmp_path, "node01"), pods.pattern, str(pods.folder)):
        yield made


async def migrating(kubernetes: Cluster, name: str, *active: str) -> str:
    """A VMI with these pods on node01, that migrates from there and whose target has published; returns its UID."""
    document = vmi(name)
    document["status"]["activePods"] = dict.fromkeys(active, "node01")
    made = await kubernetes.request("POST", VMIS, document)
    patch = begin(f"migration-of-{name}")
    patch["status"]["migrationState"] |= PUBLISHED
    await kubernetes.request("PATCH", f"{VMIS}/{name}", patch, MERGE_PATCH)
    uid: str = made["metadata"]["uid"]
    return uid


async def set_pods(kubernetes: Cluster, name: str, **pods: Any) -> None:
    await kubernetes.request("PATCH", f"{VMIS}/{name}", {"status": {"activePods": pods}}, MERGE_PATCH)


def complaint(node: LocalNode, name: str) -> str:
    return node.migration(name).get("error") or ""


async def test_launcher_is_found_by_its_pod(kubernetes: Cluster, node: LocalNode, pods: Pods) -> None:
    uid = await migrating(kubernetes, "one", "pod-a")
    async with pods.pod("pod-a", uid) as pod, pods.pod("somebody-elses", "its-uid") as other:
        await eventually(lambda: pod.sockets() == 2, "the sockets")
        assert other.sockets() == 0


async def test_another_vmis_pod_is_refused_and_both_are_named(kubernetes: Cluster, node: LocalNode, pods: Pods) -> None:
    async with pods.pod("victims-pod", "victims-uid") as victim:
        uid = await migrating(kubernetes, "attackers", "victims-pod")
        said = f"is the launcher of 'victims-uid', not of VMI '{uid}'"
        await eventually(lambda: said in complaint(node, "attackers"), "the refusal")
        assert victim.sockets() == 0


async def test_replaced_pod_gets_the_sockets(kubernetes: Cluster, node: LocalNode, pods: Pods) -> None:
    uid = await migrating(kubernetes, "one", "a")
    async with pods.pod("a", uid) as first:
        await eventually(lambda: first.sockets() == 2, "the first pod's sockets")
        first.end()
        async with pods.pod("b", uid) as second:
            await set_pods(kubernetes, "one", a=None, b="node01")
            await eventually(lambda: second.sockets() == 2, "the second pod's sockets")
            await eventually(lambda: first.sockets() == 0, "the end of the first's")


async def test_two_candidates_are_waited_for_to_be_one(kubernetes: Cluster, node: LocalNode, pods: Pods) -> None:
    uid = await migrating(kubernetes, "one", "a", "b")
    async with pods.pod("a", uid) as first, pods.pod("b", uid) as second:
        await eventually(lambda: "several pods have a launcher-sock: a, b" in complaint(node, "one"), "the complaint")
        assert first.sockets() + second.sockets() == 0
        first.end()
        await eventually(lambda: second.sockets() == 2, "the sockets")
        assert complaint(node, "one") == ""


async def test_pod_that_goes_away_midway_is_told_and_ends_cleanly(
    kubernetes: Cluster, node: LocalNode, pods: Pods
) -> None:
    uid = await migrating(kubernetes, "one", "a")
    async with pods.pod("a", uid) as pod:
        await eventually(lambda: pod.sockets() == 2, "the sockets")
        pod.end()
        await asyncio.sleep(10)
        assert complaint(node, "one") == "", "at a migration's end it goes before that is told"
        await set_pods(kubernetes, "one", c="node02")  # anything that has it looked at again
        await kubernetes.request("PATCH", f"{VMIS}/one", {"status": {"migrationMethod": "BlockMigration"}}, MERGE_PATCH)
        await eventually(lambda: "no launcher-sock" in complaint(node, "one"), "the complaint")
        await kubernetes.request("DELETE", f"{VMIS}/one")
        await eventually(lambda: not node.migrations(), "the end")


async def test_status_that_is_wrong_in_ever_new_ways_fills_no_log(kubernetes: Cluster, node: LocalNode) -> None:
    await migrating(kubernetes, "one", "a")
    with capture_logs() as logs:
        for number in range(20):
            wrong = {"status": {"migrationState": {"targetNodeAddress": f"wrong-{number}"}}}
            await kubernetes.request("PATCH", f"{VMIS}/one", wrong, MERGE_PATCH)
            await eventually(partial(is_held, node, f"'wrong-{number}'"), "it")
        await asyncio.sleep(11)
    assert 1 <= len([line for line in logs if line["event"] == "migration cannot be served"]) <= 5
    (more,) = [line for line in logs if line["event"] == "more lines about a VMI's migrations"]
    assert more["count"] >= 15


def is_held(node: LocalNode, why: str) -> bool:
    return any(why in held.reason for held in node.node.held.values())


async def test_launcher_that_is_late_keeps_nobody_waiting_and_is_told(
    kubernetes: Cluster, node: LocalNode, pods: Pods, clock: Clock
) -> None:
    uids = [await migrating(kubernetes, f"late-{number}", f"late-pod-{number}") for number in range(10)]
    await eventually(lambda: len(node.migrations()) == 10, "the late ones' workers")
    uid = await migrating(kubernetes, "one", "a")
    async with pods.pod("a", uid) as pod:
        await eventually(lambda: pod.sockets() == 2, "the sockets of the one that is there")
        assert all("no launcher-sock" in complaint(node, f"late-{number}") for number in range(10))

        async with asyncio.timeout(4):
            while not (found := await events(kubernetes, "late-0")):
                await asyncio.sleep(0.1)
        assert clock() >= 3, "it might just be coming up"
        (event,) = found
        assert (event["reason"], event["type"]) == ("MigrationProxyFailed", "Warning")
        assert "migration source proxy on node01: no launcher-sock" in event["message"]
        assert not await events(kubernetes, "one")

    async with pods.pod("late-pod-0", uids[0]) as late:
        await eventually(lambda: late.sockets() == 2, "the late one's sockets")


async def events(kubernetes: Cluster, name: str) -> list[dict[str, Any]]:
    found = await kubernetes.request("GET", "/api/v1/namespaces/default/events")
    return [item for item in found["items"] if item["involvedObject"]["name"] == name]
