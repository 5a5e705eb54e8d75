"""The failsafe and the daemon as processes: their lock, their signals, and what they may do."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from demo.lab import MIGPROXY, end, until
from migproxy import control
from migproxy.status import render
from tests.kube.beside_source import SourceScene, Targets, targets, through
from tests.kube.cluster import NODES, VMIS, Cluster, begin, vmi
from tests.kube.gate import Gate
from tests.kube.world import LocalNode
from tests.net.nodes import Daemon

pytestmark = pytest.mark.tier("gate")

ADDRESS = "127.77.0.1"
HERE = NODES[0]


SLOW = """
import pathlib, signal, sys, time
from migproxy import cli, failsafe

free = pathlib.Path(sys.argv.pop(1))
failsafe.HANG_SECONDS = 1

def mend(*_):
    print("in a pod's folder", flush=True)
    if free.parent.exists():
        signal.alarm(0)
    while not free.exists():
        time.sleep(0.01)
    return []

failsafe.mend = mend
cli.app()
"""
"""A failsafe in a folder that answers once a file is there, which is named first; never, where that cannot be."""

CAPABILITIES = ("sys_ptrace", "dac_override", "chown", "fowner")  # of its container

# Listens on its pod's command socket, as virt-launcher does; then it is QEMU's user.
LAUNCHER = """
import os, socket, sys
os.chdir(sys.argv[1])
listener = socket.socket(socket.AF_UNIX)
listener.bind("launcher-sock")
listener.listen()
os.setgid(107)
os.setuid(107)
print(flush=True)
sys.stdin.read()
"""


class Protected(SourceScene):
    """A node whose daemon and whose failsafe are processes, and a VMI that migrates from it, or to it.

    Attributes:
        daemon: `migproxy run`.
        failsafe: `migproxy failsafe`.
        log: The failsafe's.
    """

    def __init__(self, kubernetes: Cluster, node: LocalNode, uid: str, far: Targets, url: str) -> None:
        super().__init__(kubernetes, node, uid, far)
        self.folder_of_node = node.launchers.parent
        kubeconfig = kubernetes.kubeconfig(self.folder_of_node, HERE, url)
        self.options = ["--kubeconfig", str(kubeconfig), "--launcher-run-dir", f"{node.launchers}/{{uid}}"]
        self.options += ["--socket-owner", f"{os.getuid()}:{os.getgid()}"]
        beside = ["--migration-address", ADDRESS]
        self.daemon = Daemon(HERE, ADDRESS, self.folder_of_node / "daemon", *self.options, *beside)
        self.log = self.folder_of_node / "failsafe.log"
        self.failsafe: asyncio.subprocess.Process

    async def watch_over(self, *prefix: str, options: Sequence[str] = ()) -> None:
        """Starts the failsafe, by this command instead of its own if need be, and waits until it has begun."""
        command = [*(prefix or MIGPROXY), "failsafe", *self.options, *options]
        command += ["--node-name", HERE, "--control-socket", str(self.daemon.control), "--log-format", "json"]
        before = self.told("watching over the daemon") if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.failsafe = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)

        def has_begun() -> bool:
            return self.told("watching over the daemon") > before or self.failsafe.returncode is not None

        await until(has_begun, "the failsafe")

    async def complete(self) -> None:
        """The failsafe has looked at everything since the daemon's death: told to end, it does that first."""
        assert await end(self.failsafe, signal.SIGTERM) == 0, self.log.read_text()

    async def close(self) -> None:
        """Ends all of it."""
        await self.daemon.stop()
        await self.daemon.relay.stop()
        if self.failsafe.returncode is None:
            await self.complete()
        assert "Traceback" not in self.log.read_text()

    async def source_in_path(self) -> None:
        """The VMI migrates from here, virt-handler has prepared that, and ours lead there."""
        await self.change(begin("first"))
        await self.publish()
        self.prepare()
        await until(self.is_ours, "our sockets over virt-handler's")

    async def kill(self) -> None:
        """The daemon dies, and nobody starts it anew."""
        await self.daemon.stop(signal.SIGKILL)

    def answers(self) -> bool:
        """Whether the daemon has begun to start."""
        try:
            return bool(self.daemon.status())
        except control.ControlError:
            return False

    def told(self, event: str) -> int:
        """How often the failsafe has logged that."""
        return self.log.read_text().count(f'"{event}')


@pytest.fixture
async def killable(kubernetes: Cluster, tmp_path: Path, door: Gate) -> AsyncIterator[Protected]:
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    node = LocalNode(HERE, ADDRESS, tmp_path)
    node.boot_launcher(uid)
    async with targets() as far:
        made = Protected(kubernetes, node, uid, far, door.url)
        await made.watch_over()
        try:
            yield made
            await made.close()
        finally:
            if made.failsafe.returncode is None:
                made.failsafe.kill()
                await made.failsafe.wait()
        await made.virt_handler.close()


async def test_killed_daemons_sources_go_by_virt_handler_again_until_there_is_another_daemon(
    killable: Protected,
) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.source_in_path()

    await scene.kill()
    await until(scene.is_given_back, "virt-handler's sockets")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}

    await scene.daemon.start()
    await until(scene.is_ours, "our sockets again")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}


async def test_daemon_that_is_there_and_cannot_do_anything_yet_is_none(killable: Protected) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.source_in_path()
    await scene.kill()
    await scene.daemon.relay.stop(signal.SIGKILL)
    await scene.daemon.spawn(start_relay=False)
    await until(scene.answers, "the next daemon")
    await until(scene.is_given_back, "virt-handler's sockets")
    await scene.daemon.relay.start()
    await until(scene.is_ours, "our sockets again")


async def test_daemon_waits_for_a_failsafe_that_is_in_a_folder(killable: Protected) -> None:
    scene, free = killable, killable.folder_of_node / "free"
    await scene.complete()
    await scene.daemon.start()
    await scene.source_in_path()
    await scene.watch_over(sys.executable, "-c", SLOW, str(free))
    await scene.kill()
    await until(lambda: "in a pod's folder" in scene.log.read_text(), "the failsafe to act")

    lives = len(scene.daemon.logged("synchronised"))
    await scene.daemon.spawn()
    await until(scene.answers, "its start")
    assert len(scene.daemon.logged("synchronised")) == lives
    free.touch()
    await until(lambda: len(scene.daemon.logged("synchronised")) > lives, "it")


async def test_failsafe_that_hangs_in_a_folder_ends_and_keeps_no_daemon_waiting(killable: Protected) -> None:
    scene = killable
    await scene.complete()
    await scene.daemon.start()
    await scene.source_in_path()
    await scene.watch_over(sys.executable, "-c", SLOW, "/nonesuch/free")
    await scene.kill()
    assert await asyncio.wait_for(scene.failsafe.wait(), 30) == -signal.SIGALRM
    await scene.daemon.start()
    assert not scene.daemon.logged("somebody else has the lock: goes on without it")


@pytest.mark.root
async def test_its_containers_capabilities_are_all_that_it_needs(killable: Protected) -> None:
    scene = killable
    await scene.complete()
    pod = scene.folder_of_node / "pods/one-pod-1/volumes/kubernetes.io~empty-dir/sockets"
    pod.mkdir(parents=True)
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-c", LAUNCHER, str(pod), "--uid", scene.uid]
    launcher = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        assert launcher.stdout
        await launcher.stdout.readline()
        await scene.daemon.start("--socket-owner", "107:107")
        await scene.source_in_path()
        for path in (scene.folder.parent, scene.folder):
            os.chown(path, 107, 107)
            path.chmod(0o1700)
        await scene.kill()
        bound = ",".join(f"+{one}" for one in CAPABILITIES)
        options = ["--pods-dir", str(scene.folder_of_node / "pods"), "--socket-owner", "107:107"]
        options += ["--launcher-run-dir", f"/proc/{{pid}}/root{scene.node.launchers}/{scene.uid}"]
        await scene.watch_over("setpriv", f"--bounding-set=-all,{bound}", *MIGPROXY, options=options)
        await until(scene.is_given_back, "virt-handler's sockets")
    finally:
        launcher.kill()
        await launcher.wait()


async def test_second_failsafe_of_a_daemon_is_refused(killable: Protected) -> None:
    scene = killable
    first = scene.failsafe
    await scene.watch_over()
    assert await asyncio.wait_for(scene.failsafe.wait(), 20) == 1
    assert "another failsafe watches over the daemon" in scene.log.read_text()
    scene.failsafe = first


async def test_who_has_connected_to_a_dead_daemon_is_served_by_the_next_one(killable: Protected) -> None:
    scene = killable
    await scene.daemon.start()
    await scene.source_in_path()
    await until(lambda: scene.daemon.status()["relay"]["descriptors"] >= 2, "the listeners at the relay")

    await scene.kill()
    assert scene.is_ours()
    with scene.dial() as near:
        await until(scene.is_given_back, "virt-handler's sockets")
        await scene.daemon.start()
        with await scene.arrived() as far:
            await through(near, far)
    assert not scene.virt_handler.relayed
    await scene.daemon.stop()


async def test_status_says_whether_a_failsafe_runs(killable: Protected) -> None:
    scene = killable
    await scene.daemon.start()
    assert "no failsafe" not in render(scene.daemon.status())
    scene.failsafe.kill()
    await scene.failsafe.wait()
    assert "no failsafe" in render(scene.daemon.status())
