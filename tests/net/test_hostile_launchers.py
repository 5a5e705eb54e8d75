"""What runs in a launcher's pod harms its own migration alone, and gets nothing that is not its own."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import closing

import pytest

from demo.lab import until
from migproxy.portmap import Channel
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
