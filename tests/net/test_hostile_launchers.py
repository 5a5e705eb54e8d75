"""What runs in a launcher's pod harms its own migration alone, and gets nothing that is not its own."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from demo.lab import until
from migproxy.launcher import LauncherError, _Process, new_unix
from migproxy.portmap import Channel
from migproxy.proxy import ProxyError
from migproxy.shared import SharedFolder
from migproxy.source import SocketFolder
from tests.net.fuse import Silent
from tests.net.nodes import Migration, Nodes, assert_carries, connect, make_nodes

pytestmark = pytest.mark.tier("gate")

STUCK = """
import runpy, sys, threading
from migproxy.launcher import Launchers

found = Launchers.open

def open(self, launcher):
    if launcher.name == "vm":
        threading.Event().wait()
    return found(self, launcher)

Launchers.open = open
_, _, _, module, *arguments = sys.argv
sys.argv[1:] = arguments
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""A daemon that waits for ever where it looks into the folders of one launcher."""


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with make_nodes() as made:
        yield made


def error(vm: Migration, nodes: Nodes, side: int) -> str:
    return vm.report(nodes.both[side]).get("error") or ""


@pytest.mark.parametrize("side", [0, 1], ids=["source", "target"])
async def test_launcher_that_does_not_answer_hurts_only_itself(nodes: Nodes, side: int) -> None:
    node, stuck = nodes.both[side], (sys.executable, "-c", STUCK)
    await nodes.both[1 - side].start()
    await node.start(prefix=stuck)
    async with nodes.undisturbed():
        vm = nodes.migration(block=False)
        vm.begin()
        said = "launcher of default/vm: its folders have not answered for 2 s"
        await until(lambda: said in error(vm, nodes, side), "the error")
        well = nodes.migration("another", block=False)
        well.begin()
        await well.served()
    assert await node.stop(signal.SIGTERM) == 0, "its end waits for nothing"


@pytest.mark.parametrize("where", ["", "kubevirt", "kubevirt/migrationproxy"])
async def test_source_in_a_file_system_of_the_pods_is_refused_and_asks_it_nothing(nodes: Nodes, where: str) -> None:
    await nodes.start()
    vm = nodes.migration(block=False)
    with closing(Silent(vm.run_dir(nodes.source) / where)) as fuse:
        async with nodes.undisturbed():
            vm.begin()
            said = "something is mounted there" if "/" in where else "is on a file system of type fuse, which may never"
            await until(lambda: said in error(vm, nodes, 0), "the refusal")
        assert await nodes.source.stop() == 0
        assert fuse.asked == 0
    await nodes.source.start()
    await vm.served()


@pytest.mark.parametrize("where", ["libvirt", "kubevirt"])
async def test_target_in_a_file_system_of_the_pods_is_refused_and_asks_it_nothing(nodes: Nodes, where: str) -> None:
    await nodes.start()
    vm = nodes.migration(block=False)
    vm.begin()
    await vm.served()
    channel = Channel.LIBVIRT if where == "libvirt" else Channel.DIRECT
    async with vm.connection(channel) as (near, far):
        await assert_carries(near, far)
        with closing(Silent(vm.run_dir(nodes.target) / where)) as fuse:
            with connect(vm.source_path(channel)) as refused:
                assert await asyncio.get_running_loop().sock_recv(refused, 1) == b""
            await until(lambda: "of type fuse" in str(vm.report(nodes.target)["last_error"]), "the refusal")
            await assert_carries(near, far)
            assert fuse.asked == 0
    await vm.served()


@pytest.mark.root
@pytest.mark.parametrize("folders", [SocketFolder, SharedFolder])
@pytest.mark.parametrize("how", ["root", "tenant"])
@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(1, id="short", marks=pytest.mark.tier("gate")),
        pytest.param(60, id="minute", marks=pytest.mark.tier("soak")),
    ],
)
def test_folders_that_the_pod_exchanges_while_they_are_used_lead_nowhere_else(
    folders: type[SocketFolder], how: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tenant's mounts are refused before all else: what is behind that has to hold, too.
    monkeypatch.setattr(_Process, "_check_mount_namespace", lambda _: None)
    with TemporaryDirectory(dir="/run") as directory:
        race(Path(directory), folders, how, seconds)


def race(directory: Path, folders: type[SocketFolder], how: str, seconds: float) -> None:
    directory.chmod(0o711)  # the tenant has to get there
    root, prize = directory / "root", directory / "prize"
    (root / "run/kubevirt").mkdir(parents=True)
    (root / "prize").mkdir()
    prize.mkdir()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(prize / "prize.sock"))
        listener.listen()
        listener.setblocking(False)
        before = state_of(prize)
        for path in (root, *root.rglob("*")):
            os.chown(path, 107, 107)
        pod = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tests.net.racing", str(root), str(prize), how], stdout=subprocess.PIPE
            )
        )
        stack.callback(pod.kill)
        assert pod.stdout
        assert pod.stdout.readline() == b"ready\n"
        reached, refusals, deadline = 0, Counter[str](), time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                use(pod.pid, folders)
                reached += 1
            except (LauncherError, ProxyError) as error:
                refusals[str(error)[-50:]] += 1
            assert state_of(prize) == before
            with pytest.raises(BlockingIOError):
                listener.accept()
        print(f"reached {reached}, refused {refusals}")
        assert reached
        assert refusals


def state_of(folder: Path) -> list[tuple[str, int, int, int]]:
    stats = [(path.name, path.stat()) for path in (folder, *sorted(folder.iterdir()))]
    return [(name, status.st_mode, status.st_uid, status.st_gid) for name, status in stats]


def use(pid: int, folders: type[SocketFolder]) -> None:
    """All that is done in a launcher's folder, in the mount namespace of a process."""
    with _Process(f"/proc/{pid}") as process, process.open_run("run") as run:
        folder = folders(run, (107, 107))
        try:
            for name in ("beside", "x.sock"):
                if placed := folder.place(name) if folder.invites(name) else None:
                    folder.holds(name, placed)
                    folder.remove(name, placed)
                    placed.listener.close()
                folder.mend(name)
                with suppress(LauncherError), folder.kept(name) as node, new_unix() as sock:
                    node.connect(sock)
        finally:
            folder.close()
        for name in ("x.sock", "planted.sock", "prize.sock"):
            with suppress(LauncherError), run.find(f"kubevirt/migrationproxy/{name}") as node, new_unix() as sock:
                node.connect(sock)
