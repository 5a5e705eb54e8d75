"""The stand-in for virt-handler behaves as virt-handler does: or a mix of the two would prove little.

What it does here has been seen of KubeVirt's own migration proxy (its main branch of August 2026).
"""

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from migproxy.pki import CLIENT_NAMES, OLDER_CLIENT_NAME, SERVER_NAMES
from tests import certificates
from tests.certificates import Leaf
from tests.kube.apiserver import apply_merge_patch
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster, begin, end, vmi
from tests.virt_handler import Leg, SecureLeg, VirtHandler, contexts, look, shortened

pytestmark = pytest.mark.tier("gate")

ADDRESS = "127.0.0.1"
KEY = "uid"
OPEN = 0.1
"""Seconds after which a leg is taken to be left open."""


class Stage:
    """A virt-handler, and the legs of those that it has to do with.

    Attributes:
        virt_handler: With mTLS where certificates have been written before.
        launcher: Listens where libvirt does on a target.
        target: Listens where a source is led to.
    """

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder, self._stack = folder, stack
        (folder / "kubevirt/migrationproxy").mkdir(parents=True)
        self.launcher = stack.enter_context(socket.socket(socket.AF_UNIX))
        with shortened(folder / "libvirt-sock") as path:
            self.launcher.bind(path)
        self.target = stack.enter_context(socket.create_server((ADDRESS, 0)))
        for listener in (self.launcher, self.target):
            listener.listen()
            listener.setblocking(False)
        self.virt_handler = self.start()

    def start(self, **options: Any) -> VirtHandler:
        """Starts another one, with mTLS where there are certificates."""
        tls = contexts(self._folder) if (self._folder / "ca.crt").exists() else None
        owner = (os.getuid(), os.getgid())
        made = VirtHandler(ADDRESS, self._folder, "libvirt-sock", tls, owner, collected_after=0, **options)
        self._stack.push_async_callback(made.close)
        return made

    def certify(self, clients: tuple[str, ...] = CLIENT_NAMES, servers: tuple[str, ...] = SERVER_NAMES) -> None:
        """Makes the certificates, and has virt-handler use them."""
        authority = certificates.authority()
        source, target = authority.issue(Leaf(clients)), authority.issue(Leaf(servers, (certificates.SERVER,)))
        certificates.Cluster(self._folder, authority, source, target).write()
        self.virt_handler = self.start()

    @property
    def port(self) -> str:
        """The target's port."""
        return str(self.target.getsockname()[1])

    async def accept(self, listener: socket.socket) -> Leg:
        """The next connection that arrives there."""
        async with asyncio.timeout(20):
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        return self._kept(Leg(sock))

    async def secured(self, listener: socket.socket) -> Leg:
        """The next connection that arrives there, by mTLS."""
        async with asyncio.timeout(20):
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            leg = SecureLeg(sock, contexts(self._folder)[0], CLIENT_NAMES, server=True)
            self._kept(leg)
            await leg.handshake()
        return leg

    async def dial_source(self, channel: int = 0) -> Leg:
        """Connects as the source's launcher does."""
        sock = socket.socket(socket.AF_UNIX)
        leg = self._kept(Leg(sock))
        with shortened(self.virt_handler.path(KEY, channel)) as path:
            sock.connect(path)
        return leg

    async def dial_target(self, port: str, *, tls: bool = False) -> Leg:
        """Connects as a source does, without a word."""
        sock = socket.create_connection((ADDRESS, int(port)))
        leg = SecureLeg(sock, contexts(self._folder)[1], SERVER_NAMES, server=False) if tls else Leg(sock)
        return self._kept(leg)

    def _kept(self, leg: Leg) -> Leg:
        self._stack.push_async_callback(leg.drop)
        return leg


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield Stage(tmp_path, stack)


async def received(leg: Leg, seconds: float = 20) -> bytes:
    async with asyncio.timeout(seconds):
        return await leg.read()


async def is_open(leg: Leg) -> bool:
    """Whether nothing of a leg's end is to be seen."""
    with suppress(TimeoutError):
        return bool(await received(leg, OPEN))
    return True


def port_of(ports: dict[str, int], channel: int = 0) -> str:
    return next(port for port, number in ports.items() if number == channel)


@pytest.mark.parametrize(
    ("clients", "servers", "accepted", "is_relayed"),
    [
        pytest.param(CLIENT_NAMES, SERVER_NAMES, CLIENT_NAMES, True, id="today's"),
        pytest.param((OLDER_CLIENT_NAME,), SERVER_NAMES, CLIENT_NAMES, False, id="older"),
        pytest.param(
            (OLDER_CLIENT_NAME,), SERVER_NAMES, (*CLIENT_NAMES, OLDER_CLIENT_NAME), True, id="older-and-accepted"
        ),
        pytest.param(("kubevirt.io:system:client:other",), SERVER_NAMES, CLIENT_NAMES, False, id="another-client"),
        pytest.param(CLIENT_NAMES, ("kubevirt.io:system:node:other",), CLIENT_NAMES, False, id="another-server"),
    ],
)
async def test_it_checks_whose_certificate_a_peer_has(
    stage: Stage, clients: tuple[str, ...], servers: tuple[str, ...], accepted: tuple[str, ...], is_relayed: bool
) -> None:
    stage.certify(clients, servers)
    virt_handler = stage.virt_handler = stage.start(client_names=accepted)
    virt_handler.start_source(KEY, ADDRESS, virt_handler.start_target("other"))
    near = await stage.dial_source()
    await near.write(b"through")
    far = await stage.accept(stage.launcher)
    if is_relayed:
        assert await received(far) == b"through"
    else:
        with suppress(ConnectionResetError):  # where it has not read what the launcher sent
            assert await received(near) == b""


async def test_target_dials_its_launcher_before_the_handshake(stage: Stage) -> None:
    stage.certify()
    await stage.dial_target(port_of(stage.virt_handler.start_target(KEY)))
    await stage.accept(stage.launcher)


async def test_end_of_the_targets_launcher_is_told_at_once(stage: Stage) -> None:
    stage.certify()
    source = await stage.dial_target(port_of(stage.virt_handler.start_target(KEY)), tls=True)
    await source.write(b"first")
    launcher = await stage.accept(stage.launcher)
    await launcher.write(b"last")
    await launcher.close()
    assert await received(source) == b"last"
    assert await received(source) == b"", "a close_notify"


async def test_end_of_the_source_is_not_passed_on_to_the_targets_launcher(stage: Stage) -> None:
    source = await stage.dial_target(port_of(stage.virt_handler.start_target(KEY)))
    launcher = await stage.accept(stage.launcher)
    await source.close()
    assert await is_open(launcher)
    await launcher.write(b"it finds out by this")
    assert await received(launcher) == b""


async def test_end_of_the_sources_launcher_is_passed_on_once_the_target_ends_and_without_a_close_notify(
    stage: Stage,
) -> None:
    stage.certify()
    stage.virt_handler.start_source(KEY, ADDRESS, {stage.port: 0})
    launcher = await stage.dial_source()
    target = await stage.secured(stage.target)
    await launcher.write(b"last")
    await launcher.close()
    assert await received(target) == b"last"
    assert await is_open(target)
    await target.write(b"it finds out by this")
    with pytest.raises(ssl.SSLError, match=r"EOF|eof"):  # Python 3.11.2 has no SSLEOFError of it
        await received(target)


async def test_several_vmis_are_served_at_once(stage: Stage) -> None:
    virt_handler, vmis = stage.virt_handler, {}
    for name, source, target in (("out", *NODES), ("in", *reversed(NODES)), ("too", *NODES)):
        vmis[name] = apply_merge_patch(vmi(name, node=source), begin(name, source, target))
        vmis[name]["metadata"]["uid"] = name
        vmis[name]["status"]["migrationState"] |= {
            "targetNodeAddress": ADDRESS,
            "targetDirectMigrationNodePorts": {stage.port: 0},
        }
    for _ in range(2):
        for one in vmis.values():
            virt_handler.follow(one, NODES[0])
        assert ({*virt_handler.sources}, {*virt_handler.targets}) == ({"out", "too"}, {"in"})
    virt_handler.follow(apply_merge_patch(vmis["too"], end()), NODES[0])
    virt_handler.forget(["out", "too"])
    assert ({*virt_handler.sources}, {*virt_handler.targets}) == ({"out"}, set())


@pytest.mark.parametrize(
    ("before", "after", "is_kept"),
    [
        pytest.param({"1": 0, "2": 49152}, {"2": 49152, "1": 0}, True, id="the-same"),
        pytest.param({"1": 0, "2": 49152}, {"1": 49152, "2": 0}, True, id="other-channels"),
        pytest.param({"1": 0, "2": 49152}, {"1": 0, "3": 49152}, False, id="another-port"),
        pytest.param({"1": 0, "2": 49152}, {"1": 0}, False, id="fewer"),
        pytest.param({"1": 0}, {"1": 0, "2": 49152}, False, id="more"),
        pytest.param({"1": 0}, {}, False, id="none"),
    ],
)
async def test_source_points_elsewhere_when_the_ports_change(
    stage: Stage, before: dict[str, int], after: dict[str, int], is_kept: bool
) -> None:
    stage.virt_handler.start_source(KEY, ADDRESS, {stage.port: before.pop("1"), **before})
    launcher = await stage.dial_source()
    await stage.accept(stage.target)
    if "1" in after:
        after[stage.port] = after.pop("1")
    stage.virt_handler.start_source(KEY, ADDRESS, after)
    if is_kept:
        assert await is_open(launcher)
    else:
        assert await received(launcher) == b""
    sockets = {path.name for path in stage.virt_handler.path(KEY, 0).parent.iterdir()}
    assert sockets == {stage.virt_handler.path(KEY, channel).name for channel in after.values()}


async def test_source_serves_a_channel_that_it_does_not_know(stage: Stage) -> None:
    stage.virt_handler.start_source(KEY, ADDRESS, {"1": 0, stage.port: 50000})
    launcher = await stage.dial_source(50000)
    target = await stage.accept(stage.target)
    await launcher.write(b"through")
    assert await received(target) == b"through"


async def test_what_it_could_not_write_for_a_conflict_it_writes_at_its_next_look(
    stage: Stage, kubernetes: Cluster
) -> None:
    if kubernetes.double is None:
        pytest.skip("a real API server makes no conflict on request")
    await kubernetes.request("POST", VMIS, vmi("one"))
    await kubernetes.request("PATCH", f"{VMIS}/one", begin("first"), MERGE_PATCH)
    kubernetes.double.faults.conflicts = 1
    headers = {"Authorization": f"Bearer {await kubernetes.kubevirt_token('kubevirt-handler')}"}
    states = []
    async with aiohttp.ClientSession(kubernetes.url, headers=headers) as session:
        for _ in range(2):
            await look(session, stage.virt_handler, NODES[1])
            states.append((await kubernetes.request("GET", f"{VMIS}/one"))["status"]["migrationState"])
    assert "targetNodeAddress" not in states[0]
    (listeners,) = stage.virt_handler.targets.values()
    assert states[1]["targetDirectMigrationNodePorts"] == listeners.ports()
