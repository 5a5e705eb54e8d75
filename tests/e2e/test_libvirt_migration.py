"""A running virtual machine migrates live between two libvirtds, every byte through two migproxies."""

import asyncio
import hashlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from demo import guest as vm
from demo.guest import Beat, Guest, Hashes, Move
from demo.lab import Lab, LabError, Node, background, end, run, until

pytestmark = [pytest.mark.tier("soak"), pytest.mark.alone]

MALFORMED = Path(__file__).parents[1] / "net/malformed.py"
BURSTS = 4
TOLERANCE = 0.05  # between what libvirt counts, payload, and what the daemons count, payload with its framing


@pytest.fixture(scope="module", autouse=True)
def _machine_has_what_it_takes() -> None:
    vm.check()


@pytest.mark.parametrize(
    ("disk", "parallel", "tls"),
    [
        pytest.param(True, 4, True, id="copy-storage-all-parallel", marks=pytest.mark.tier("gate")),
        pytest.param(False, 0, True, id="plain"),
        pytest.param(False, 4, True, id="parallel"),
        pytest.param(True, 0, True, id="copy-storage-all"),
        pytest.param(False, 4, False, id="parallel-without-tls"),
    ],
)
async def test_running_guest_migrates_there_and_back(disk: bool, parallel: int, tls: bool) -> None:
    async with Lab(tls=tls) as lab:
        here, there = lab.nodes
        for node in lab.nodes:
            await node.proxy.start()
            assert (await node.proxy.status())["tls"]["mode"] == ("mTLS" if tls else "plaintext")
        descriptors = {node.name: node.proxy.descriptors() for node in lab.nodes}
        async with Guest.boot(lab, here, disk=disk) as guest:
            at_first = guest.hashes[0]
            for source, target in ((here, there), (there, here)):
                move = await guest.migrate(source, target, parallel=parallel)

                await assert_runs_only_on(target, lab)
                await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
                await assert_counts_agree(move, source, target, memory_connections=parallel + 1, disk=disk)
                for node in lab.nodes:
                    await assert_nothing_is_left(node, descriptors[node.name])
                await assert_reads_its_hashes(guest, target, at_first)


async def test_malformed_handshakes_at_its_listeners_leave_a_migration_alone() -> None:
    """A burst; tests/net has a hundred thousand of them, and a stream instead of a guest."""
    async with Lab(tls=True) as lab:
        source, target = lab.nodes
        for node in lab.nodes:
            await node.proxy.start()
        descriptors = {node.name: node.proxy.descriptors() for node in lab.nodes}
        async with Guest.boot(lab, source) as guest:
            at_first, bursts = guest.hashes[0], 0

            async def bombard() -> None:
                nonlocal bursts
                ports: dict[str, int] = {}
                while not ports:
                    ports = lab.vmi.read()["status"]["migrationState"].get("targetDirectMigrationNodePorts", {})
                    await asyncio.sleep(0.05)
                with suppress(LabError):  # the migration is over, and its listeners are gone
                    while True:
                        for port in ports:
                            bombardment = (str(MALFORMED), target.address, port, "100", str(bursts))
                            await run(*source.prefix("net"), sys.executable, *bombardment)
                            bursts += 1
                        if bursts >= BURSTS:  # held back for so long, or it would be over before the first
                            await source.virsh("migrate-setspeed", vm.DOMAIN, "4000")

            async with background(bombard()):
                move = await guest.migrate(source, target, "--bandwidth", "10")
            assert bursts >= BURSTS
            refused = (await target.proxy.status())["tls"]["errors"]
            assert sum(refused.values()) >= 0.9 * 100 * bursts
            await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
            await assert_counts_agree(move, source, target, memory_connections=1, disk=False)
            for node in lab.nodes:
                await assert_nothing_is_left(node, descriptors[node.name])
            assert (await guest.fresh_hashes()).memory == at_first.memory


async def test_a_guest_that_its_bandwidth_limit_keeps_slow_is_named() -> None:
    async with Lab() as lab:
        source, target = lab.nodes
        for node in lab.nodes:
            await node.proxy.start()
        async with Guest.boot(lab, source) as guest:
            await guest.migrate(source, target, "--bandwidth", "10")
            ended = [one for one in (await source.proxy.status())["migrations"] if one["role"] == "source"]
            seconds = ended[0]["limited"]["all"]["seconds"]
    assert sum(seconds.values()) > 3, "a limit of 10 MiB/s lasts"
    assert seconds["guest"] >= 0.8 * sum(seconds.values()), seconds


async def test_disk_on_the_target_is_the_sources_byte_for_byte() -> None:
    async with Lab() as lab:
        source, target = lab.nodes
        for node in lab.nodes:
            await node.proxy.start()
        async with Guest.boot(lab, source, disk=True) as guest:
            await guest.migrate(source, target, "--suspend")
            assert await target.virsh("domstate", vm.DOMAIN) == "paused"
            assert (source.images / "disk").read_bytes() == (target.images / "disk").read_bytes()

            await target.virsh("resume", vm.DOMAIN)
            await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))


async def test_launchers_are_found_by_their_command_sockets() -> None:
    async with Lab() as lab:
        source, target = lab.nodes
        pods = lab.directory / "pods"
        document = lab.vmi.read()
        uid, names = document["metadata"]["uid"], {node: pod for pod, node in document["status"]["activePods"].items()}
        async with (
            launcher(source, pods / source.name, names[source.name], uid),
            launcher(target, pods / target.name, names[target.name], uid),
        ):
            for node in lab.nodes:
                where = ("--launcher-run-dir", "/proc/{pid}/root/run", "--pods-dir", str(pods / node.name))
                await node.proxy.start(*where)
            async with Guest.boot(lab, source) as guest:
                move = await guest.migrate(source, target)
                await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
                await assert_counts_agree(move, source, target, memory_connections=1, disk=False)


async def assert_runs_only_on(target: Node, lab: Lab) -> None:
    for node in lab.nodes:
        assert await node.virsh("list", "--all", "--name") == (vm.DOMAIN if node is target else "")
    assert await target.virsh("domstate", vm.DOMAIN) == "running"


async def assert_heartbeat_goes_on(guest: Guest, before: Beat, after: Beat) -> None:
    await until(lambda: guest.beats[-1].number >= after.number + 5, "more heartbeats")
    numbers = sorted(beat.number for beat in guest.beats)
    # The line that the migration tears apart, one half on each console, is not read: one number may be missing.
    assert {later - earlier for earlier, later in pairwise(numbers)} <= {1, 2}
    assert after.number - before.number <= 2


async def assert_counts_agree(move: Move, source: Node, target: Node, *, memory_connections: int, disk: bool) -> None:
    sent, received = await source.proxy.traffic(move.uid), await target.proxy.traffic(move.uid)
    assert sent.keys() == received.keys() == {"libvirt", "direct"} | ({"block"} if disk else set())
    for channel, there in sent.items():
        assert there.sent == received[channel].received
        assert there.received == received[channel].sent
        assert there.connections == received[channel].connections
    # One for everything, or multifd's and one for the devices and the control of the migration.
    assert sent["direct"].connections == memory_connections
    assert sent["direct"].sent == pytest.approx(move.job["memory_processed"], rel=TOLERANCE)
    if disk:
        assert sent["block"].sent == pytest.approx(move.job["disk_processed"], rel=TOLERANCE)


async def assert_nothing_is_left(node: Node, descriptors: int) -> None:
    await until(lambda: not node.sockets(), f"the end of {node.sockets()} in {node.migrationproxy}")
    assert await node.exec("ss", "--listening", "--tcp", "--numeric", "--no-header", "sport != :9470") == ""
    await until(lambda: node.proxy.descriptors() <= descriptors, f"{descriptors} file descriptors again")


async def assert_reads_its_hashes(guest: Guest, target: Node, at_first: Hashes) -> None:
    """Memory and disk are what they were at first, and so is the disk's file on the target, where there is one."""
    now = await guest.fresh_hashes()
    assert (now.memory, now.disk) == (at_first.memory, at_first.disk)
    if guest.disk:
        assert now.disk == sha256_of_front(target.images / "disk")


def sha256_of_front(image: Path) -> str:
    """Of the part of the disk that the guest does not rewrite."""
    with image.open("rb") as disk:
        return hashlib.sha256(disk.read((vm.DISK_MIB - vm.TAIL_MIB) << 20)).hexdigest()


@asynccontextmanager
async def launcher(node: Node, pods: Path, pod: str, uid: str) -> AsyncIterator[None]:
    """A process in the node's namespaces that listens on a pod's command socket, as a VMI's virt-launcher does."""
    folder = pods / pod / "volumes/kubernetes.io~empty-dir/sockets"
    folder.mkdir(parents=True)
    directory = os.open(folder, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as command:
        command.bind(f"/proc/self/fd/{directory}/launcher-sock")
        os.close(directory)
        # Whoever listens is the socket's peer (SO_PEERCRED), whoever bound it: the node's process listens.
        listen = (
            f"import signal, socket; command = socket.socket(fileno={command.fileno()}); "
            "command.listen(); print(); signal.pause()"
        )
        process = await asyncio.create_subprocess_exec(
            *node.prefix("mount"),
            *(sys.executable, "-u", "-c", listen, "--uid", uid),
            pass_fds=[command.fileno()],
            stdout=asyncio.subprocess.PIPE,
        )
    try:
        assert process.stdout
        assert await process.stdout.readline()
        yield
    finally:
        await end(process, signal.SIGTERM)
